"""PyTorch Lightning: a step of its Trainer."""
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.interop


def test_step_of_the_trainer_is_that_of_plain_pytorch(ours, needs, tmp_path, fresh_classifier, plain_step, batch):
    lightning = needs('lightning', '`Trainer(fast_dev_run=True)`: a step of training and of validation', ours)

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = fresh_classifier()

        def training_step(self, batch, index):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def validation_step(self, batch, index):
            self.log('loss', self.training_step(batch, index))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Classifier()
    images = DataLoader(TensorDataset(*batch), batch_size=4)
    trainer = lightning.Trainer(
        accelerator='cpu', fast_dev_run=True, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False)
    trainer.fit(module, images, images)
    assert trainer.global_step == 1
    assert trainer.callback_metrics['loss'].isfinite()
    torch.testing.assert_close(module.model.state_dict(), plain_step)
