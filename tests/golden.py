"""Golden numbers of sMLPNet's and DC-AC's authors' code: the files, what they were computed from, the agreement.

`data/smlpnet` and `data/dcac` hold parts of them; the environment variables TIMM_GSA_SMLPNET_FIXTURES and
TIMM_GSA_DCAC_FIXTURES name folders of the full sets, which are then used instead. `manifest.json` there describes
everything that is put into code here.
"""
import gzip
import json
import math
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parent / 'data'


def folder(family: str) -> Path:
    return Path(os.environ.get(f'TIMM_GSA_{family.upper()}_FIXTURES') or DATA / family)


@cache
def manifest(family: str) -> dict[str, Any]:
    return json.loads((DATA / family / 'manifest.json').read_text())


@cache
def arrays(family: str, file: str) -> dict[str, np.ndarray]:
    with np.load(folder(family) / f'{file}.npz') as archive:
        return dict(archive)


def golden(family: str, file: str, case: str) -> dict[str, np.ndarray]:
    """Arrays of a case, by their names without '<case>/'."""
    start = f'{case}/' if case else ''
    return {k.removeprefix(start): a for k, a in arrays(family, file).items() if k.startswith(start)}


@cache
def official_shapes(family: str, network: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the authors' state dict of a network, in its order."""
    keys = json.loads(gzip.decompress((DATA / family / 'official_keys.json.gz').read_bytes()))
    return {name: tuple(shape) for name, shape in keys[network]}


# What the golden numbers were computed from


def _uniform(label: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.RandomState(zlib.crc32(label.encode()))
    return 2 * generator.random_sample(math.prod(shape)).reshape(shape) - 1


def made_input(label: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Input or cotangent of unit variance, float32."""
    return torch.from_numpy((_uniform(label, shape) * math.sqrt(3)).astype(np.float32))


def made_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that the authors' network holds under `name`."""
    if name.endswith('num_batches_tracked'):
        return torch.tensor(0)
    t = _uniform(name, shape)
    if name.endswith('running_var') or (name.endswith('.weight') and len(shape) == 1):
        t = 1 + 0.5 * t
    elif name.endswith(('running_mean', '.bias')):
        t = 0.4 * t
    else:
        t = t * math.sqrt(3) / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(t.astype(np.float32))


def made_state(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: made_weight(name, shape) for name, shape in shapes.items()}


# The measure of agreement


def assert_agrees(
        family: str,
        file: str,
        case: str,
        got: dict[str, torch.Tensor],
        tolerance: float,
) -> None:
    """Compare every golden array of a case: largest difference over the largest golden number, within `tolerance`.

    Gradients that are zero but for rounding are compared with the largest of all gradients. Arrays that are stored in
    float32 are no more exact than that.

    Args:
        family: 'smlpnet' or 'dcac'.
        file: Name of the file.
        case: Name of the case in it, or ''.
        got: What was computed, whole, under the names of the golden arrays without _digest and _strided.
        tolerance: Largest error.
    """
    want = golden(family, file, case)
    stems = {name.removesuffix('_digest').removesuffix('_strided') for name in want}
    assert stems == set(got)
    most = manifest(family)['most'][file]
    gradients = [a for name, a in want.items() if 'grad_' in name and not name.endswith('_digest')]
    largest = max((np.abs(a).max() for a in gradients), default=0.)
    failures = []
    for name, array in want.items():
        value = got[name.removesuffix('_digest').removesuffix('_strided')].detach().double()
        if name.endswith('_digest'):
            value = torch.stack([value.mean(), value.std(correction=0), value.norm()])
            scale = np.maximum(np.abs(array), array[2] / math.sqrt(got[name.removesuffix('_digest')].numel()))
        else:
            if name.endswith('_strided'):
                value = value.flatten()[::math.ceil(value.numel() / 4096)]
            if value.shape != array.shape:
                value = value.flatten()[::math.ceil(value.numel() / most)]
            assert value.shape == array.shape, name
            scale = np.abs(array).max()
        if 'grad_' in name:
            scale = np.where(scale < 1e-9 * largest, largest, scale)
        stored = 2e-7 if array.dtype == np.float32 else 0.
        error = (np.abs(value.numpy() - array) / scale).max()
        if not error <= max(tolerance, stored):
            failures.append(f'{name}: error {error:.1e}')
    assert not failures, f'{file}/{case}, tolerance {tolerance:.0e}\n' + '\n'.join(failures)
