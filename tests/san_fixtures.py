"""Golden numbers of the SAN authors' code: the files, what they were computed from, and the measure of agreement.

`data/san` holds a part of them; the environment variable TIMM_GSA_SAN_FIXTURES names the folder of the full set, which
is then used instead. `manifest.json` there describes everything that is put into code here.
"""
import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

FOLDER = Path(os.environ.get("TIMM_GSA_SAN_FIXTURES") or Path(__file__).parent / "data" / "san")
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())

# The authors' names inside an attention module and a block, and ours; the projections are one convolution here.
_ATTENTION = {
    "conv_p": "position",
    "conv_w.0": "norm1",
    "conv_w.2": "conv1",
    "conv_w.3": "norm2",
    "conv_w.5": "conv2",
}
_PROJECTIONS = ("conv1", "conv2", "conv3")
_BLOCK = {"bn1": "norm1", "bn2": "norm2", "conv": "conv"}
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@cache
def arrays(group: str) -> dict[str, np.ndarray]:
    """All arrays of a group, by '<case>/<array>'."""
    with np.load(FOLDER / f"{group}.npz") as file:
        return dict(file)


def golden(group: str, case: str) -> dict[str, np.ndarray]:
    """Results of a case: everything but its stored inputs."""
    start = f"{case}/"
    found = {key.removeprefix(start): array for key, array in arrays(group).items() if key.startswith(start)}
    return {name: array for name, array in found.items() if not name.startswith("in_")}


def cases(group: str) -> list[str]:
    return sorted({key.partition("/")[0] for key in arrays(group)})


def modes(groups: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of group and mode ('eval', 'train') that the folder holds."""
    return [(group, case) for group in groups if (FOLDER / f"{group}.npz").exists() for case in cases(group)]


def official_shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the authors' state dict of a config, in its order, without the prefix 'module.'."""
    return {name.removeprefix("module."): tuple(shape) for name, shape, _ in _official_keys()[config]["entries"]}


@cache
def _official_keys() -> dict[str, Any]:
    path = FOLDER / "official_keys.json"
    text = path.read_bytes() if path.exists() else gzip.decompress(path.with_suffix(".json.gz").read_bytes())
    return json.loads(text)["configs"]


# What the golden numbers were computed from


def _uniform(label: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.RandomState(zlib.crc32(label.encode()))
    return 2 * generator.random_sample(math.prod(shape)).reshape(shape) - 1


def made_input(label: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Input or cotangent of unit variance, float32."""
    return torch.from_numpy((_uniform(label, shape) * math.sqrt(3)).astype(np.float32))


def made_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor that the authors' network holds under `name`."""
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    t = _uniform(name, shape)
    if name.endswith(".running_var") or (name.endswith(".weight") and len(shape) == 1):
        t = 1 + 0.5 * t
    elif name.endswith("conv_w.5.bias"):
        t = t / math.sqrt(shape[0])
    elif name.endswith((".running_mean", ".bias")):
        t = 0.4 * t
    else:
        fan, gain = math.prod(shape[1:]), 1.
        if name.endswith("conv_w.5.weight"):
            fan, gain = shape[0], 4. if shape[0] < shape[1] else 1.
        elif name.endswith("conv_p.weight"):
            gain = 12.
        elif fnmatch(name, "*.conv.weight"):
            gain = 0.7
        t = t * math.sqrt(3) * gain / math.sqrt(fan)
    return torch.from_numpy(t.astype(np.float32))


def official_state(config: str) -> dict[str, torch.Tensor]:
    """The authors' state dict of a config as the golden numbers were computed with it."""
    return {name: made_weight(name, shape) for name, shape in official_shapes(config).items()}


# Our names and the authors'


def _same_module(tensors: dict[str, Any], theirs: str, ours: str) -> Iterator[tuple[str, Any]]:
    for leaf in _LEAVES:
        if f"{ours}.{leaf}" in tensors:
            yield f"{theirs}.{leaf}", tensors[f"{ours}.{leaf}"]


def official_attention(
        tensors: dict[str, torch.Tensor],
        dim_key: int,
        theirs: str = "",
        ours: str = "",
) -> dict[str, torch.Tensor]:
    """Tensors of an attention layer under the authors' names; query, key and value are views of ours."""
    out = {}
    for leaf in ("weight", "bias"):
        qkv = tensors[f"{ours}qkv.{leaf}"]
        parts = qkv.split([dim_key, dim_key, len(qkv) - 2 * dim_key])
        out.update({f"{theirs}{name}.{leaf}": part for name, part in zip(_PROJECTIONS, parts, strict=True)})
    for name, module in _ATTENTION.items():
        out.update(_same_module(tensors, theirs + name, ours + module))
    return out


def official_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a network (a state dict of ours, gradients by parameter name) under the authors' names."""
    out = {}
    for name, module in (("conv_in", "conv1.conv"), ("bn_in", "conv1.norm"), ("fc", "fc")):
        out.update(_same_module(tensors, name, module))
    for stage in range(5):
        start = f"layer{stage}" if stage else "conv1"
        out.update(_same_module(tensors, f"conv{stage}", f"{start}.proj"))
        out.update(_same_module(tensors, f"bn{stage}", f"{start}.norm" if stage else "bn1"))
        block = 0
        while f"{start}.block{block}.conv.weight" in tensors:
            theirs, ours = f"layer{stage}.{block}.", f"{start}.block{block}."
            for name, module in _BLOCK.items():
                out.update(_same_module(tensors, theirs + name, ours + module))
            dim_key = len(tensors[f"{ours}norm1.weight"]) // 16
            out.update(official_attention(tensors, dim_key, theirs + "sam.", ours + "attn."))
            block += 1
    return out


# The measure of agreement


def assert_agrees(
        group: str,
        case: str,
        got: dict[str, torch.Tensor],
        dtype: torch.dtype,
        rounded: Sequence[dict[str, torch.Tensor]] = (),
) -> None:
    """Compare every golden array of a case with what was computed, within the manifest's tolerance for `dtype`.

    Args:
        group: Name of the file.
        case: Name of the case in it.
        got: What was computed, under exactly the names of the golden arrays.
        dtype: Precision of the computation, float32 or float64.
        rounded: The same of slightly other inputs: ten times as far from the golden arrays is in tolerance too.
    """
    want = golden(group, case)
    assert set(got) == set(want)
    table = MANIFEST["tolerances"][str(dtype).removeprefix("torch.")]
    gradients = [name for name in want if name.startswith("grad_") and not name.endswith("digest")]
    largest = max((np.abs(want[name]).max() for name in gradients), default=0.)
    failures = []
    for name, array in want.items():
        tolerance = table["exceptions"].get(f"{group}/{case}/{name}", table["default"])
        if tolerance is None:  # the authors' own code is too noisy in this precision
            continue
        array = array.astype(np.float64)
        if name.endswith("_digest"):
            scale = _digest_scale(name, array)
        else:
            scale = np.abs(array).max()
            if name in gradients and scale < 1e-9 * largest:
                scale = largest
        error, *others = (_error(each[name], array, scale) for each in (got, *rounded))
        tolerance = max([tolerance, *(10 * other for other in others)])
        if not error <= tolerance:
            failures.append(f"{name}: error {error:.1e}, tolerance {tolerance:.1e}")
    assert not failures, f"{group}/{case} in {dtype}\n" + "\n".join(failures)


def _error(tensor: torch.Tensor, array: np.ndarray, scale: np.ndarray) -> float:
    value = tensor.detach().double().numpy()
    assert value.shape == array.shape
    return (np.abs(value - array) / scale).max()


def _digest_scale(name: str, rows: np.ndarray) -> np.ndarray:
    norm = rows[..., 2:3] if name.startswith("tap_") else rows[..., :1]
    if name == "grad_params_digest":
        norm = np.where(norm < 1e-9 * norm.max(), norm.max(), norm)
    return np.maximum(np.abs(rows), norm)


def every(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Every step-th element, `count` at most: how the manifest thins out large tensors."""
    return tensor.detach().flatten()[::math.ceil(tensor.numel() / count)]


def tap_digest(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().double()
    return torch.stack([tensor.mean(), tensor.std(correction=0), tensor.norm()])


def digest(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().double()
    return torch.stack([tensor.norm(), tensor.sum(), (tensor * made_input(f"probe/{name}", tensor.shape)).sum()])
