"""The tool that looks for outputs that are not finite; tests/models/test_finite.py uses its conditions."""
import stability
import timm
import torch

import timm_gsa  # noqa: F401


def test_photos_of_the_package_stand_in_for_a_data_set():
    images = stability.load(timm.create_model('san_tiny_pairwise'), None, 'val', 10)
    assert images.shape == (4, 3, 64, 64) and images.isfinite().all()


def test_outputs_that_are_not_finite_are_counted():
    class Overflowing(torch.nn.Module):
        pretrained_cfg = dict(mean=(0.5,) * 3, std=(0.5,) * 3)

        def forward(self, x):
            return x.mean((2, 3)).exp().log()  # infinite from a mean of 89 in float32

    images = torch.full((2, 3, 8, 8), 20.)
    found = {name: wrong for name, _, wrong, _ in stability.probe(Overflowing(), images)}
    assert found['as they are'] == 0 and found['contrast x10'] == 2
