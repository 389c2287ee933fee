"""What all Triton kernels share: how they are launched, and their check before they are used on a device.

Kernels give way to plain operators where they fail their check or cannot be launched. This file does not import Triton.
"""
import functools
import importlib.metadata
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..version import __version__

__all__ = [
    'Layout',
    'TooManyPrograms',
    'grid_of',
    'guarded',
    'layout_of',
    'why_no_products',
    'why_not_proven',
    'why_not_started',
]

_MOST_PROGRAMS = 2 ** 31 - 1  # of axis 0; the other axes of a grid take 65,535


class TooManyPrograms(RuntimeError):
    """A launch needs more programs than a grid has."""


def grid_of(programs: int) -> tuple[int]:
    """Grid of a launch. It has one axis, as the others are too short for large inputs.

    Raises:
        TooManyPrograms: There are more than 2^31 - 1.
    """
    if programs > _MOST_PROGRAMS:
        raise TooManyPrograms(f'a launch takes at most {_MOST_PROGRAMS} programs, got {programs}')
    return (programs,)


class Layout(NamedTuple):
    """How a tensor lies in memory, as a kernel is told.

    steps: Strides in steps of `factor` numbers; 0 along axes of one index and along the innermost ones.
    factor: The kernel multiplies steps by it as a constant, so Triton knows how loads are aligned.
    span: Numbers between the first and the last of an image.
    """

    steps: list[int]
    factor: int
    span: int


def layout_of(x: torch.Tensor, innermost: tuple[int, ...] = ()) -> Layout:
    """Layout of a tensor whose first axis is the batch.

    Args:
        x: The tensor.
        innermost: Axes that the kernel knows to be contiguous and to be the innermost in memory. Without any, loads are
            of single numbers and the factor is 1.
    """
    strides = [
        0 if size == 1 or axis in innermost else stride
        for axis, (stride, size) in enumerate(zip(x.stride(), x.shape, strict=True))
    ]
    span = sum(stride * (size - 1) for stride, size in zip(x.stride()[1:], x.shape[1:], strict=True))
    factor = math.gcd(16 // x.element_size(), *strides) if innermost else 1
    return Layout([stride // factor for stride in strides], factor, span)


def cache_file() -> Path:
    """Where results of checks are kept, in the user's cache."""
    base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
    return Path(base) / 'timm_gsa' / 'kernels.json'


def why_not_started(device: torch.device) -> str | None:
    """Why Triton cannot compile or launch anything: no driver, no C compiler, no Python headers."""
    try:
        import triton

        with torch.cuda.device(device):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # Triton raises what its parts raise
        return f'Triton does not start: {type(error).__name__}: {error}'
    return None


def why_no_products(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels cannot multiply matrices of this dtype."""
    if dtype == torch.float64:
        return 'float64'
    if dtype == torch.bfloat16 and device.type == 'cpu':
        return "Triton's interpreter has no products of bfloat16"
    return None


@functools.lru_cache(maxsize=64)
def why_not_proven(family: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels of a family may not be used; None once they passed their check on this device, with this software.

    The check runs once, some seconds, and its result is kept in the user's cache. A failure is told by one warning.
    """
    key = _key(family, dtype, device)
    results = _read()
    if key not in results:
        from ._checks import fault

        results[key] = fault(family, 'triton', dtype, device)
        _write(results)
    if results[key] is not None:
        warnings.warn(
            f'timm_gsa computes {family} in {dtype} without its Triton kernels on {device}: {results[key]}',
            stacklevel=2)
    return results[key]


def _key(family: str, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'interpreter'
    versions = __version__, torch.__version__, importlib.metadata.version('triton')
    return '|'.join((family, str(dtype), name, *versions))


def _read() -> dict[str, str | None]:
    try:
        results = json.loads(cache_file().read_text(encoding='utf-8'))
    except (OSError, ValueError):  # none yet, or damaged: checked anew
        return {}
    return results if isinstance(results, dict) else {}


def _write(results: dict[str, str | None]) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False, encoding='utf-8') as file:
            json.dump(results, file, indent=1)
        os.replace(file.name, path)
    except OSError:  # a read-only home: the next process checks again
        return


def guarded(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function that launches kernels. Where the device lacks what a launch needs, `plain` computes."""
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def compute(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                # OutOfResources is Triton's own, which need not be imported for it.
                if type(error).__name__ != 'OutOfResources' and not isinstance(error, TooManyPrograms):
                    raise
                _warn_once(function.__name__.strip('_'), str(error))
                return plain(*args)

        return compute

    return decorate


@functools.lru_cache(maxsize=256)
def _warn_once(name: str, cause: str) -> None:
    warnings.warn(f'timm_gsa computes without the Triton kernel of {name}: {cause}', stacklevel=4)
