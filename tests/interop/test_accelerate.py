"""Accelerate: a step through what its `prepare` gives."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.interop


def test_prepared_step_is_that_of_plain_pytorch(ours, needs, fresh_classifier, plain_step, batch):
    accelerate = needs('accelerate', '`Accelerator.prepare`: a training step', ours)
    model = fresh_classifier().train()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), DataLoader(TensorDataset(*batch), batch_size=4))
    for images, labels in loader:
        accelerator.backward(F.cross_entropy(prepared(images), labels))
        optimizer.step()
    torch.testing.assert_close(accelerator.unwrap_model(prepared).state_dict(), plain_step)
