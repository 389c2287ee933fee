"""Triton kernels prove themselves before they are used on a device, and give way where they cannot be launched."""
import functools
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

__all__ = ['guarded', 'why_not_proven', 'why_not_started']


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


@functools.cache
def why_not_proven(family: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels of a family may not be used; None once they passed their check on this device, with this software.

    The check runs once, some seconds, and its result is kept in the user's cache. A failure is told by one warning.
    """
    key = _key(family, dtype, device)
    known = _read()
    if key not in known:
        from ._checks import fault

        known[key] = fault(family, 'triton', dtype, device)
        _write(known)
    if known[key] is not None:
        warnings.warn(
            f'timm_gsa computes {family} in {dtype} without its Triton kernels on {device}: {known[key]}', stacklevel=2)
    return known[key]


def _key(family: str, dtype: torch.dtype, device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'interpreter'
    versions = __version__, torch.__version__, importlib.metadata.version('triton')
    return '|'.join((family, str(dtype), name, *versions))


def _read() -> dict[str, str | None]:
    try:
        known = json.loads(cache_file().read_text(encoding='utf-8'))
    except (OSError, ValueError):  # none yet, or damaged: checked anew
        return {}
    return known if isinstance(known, dict) else {}


def _write(known: dict[str, str | None]) -> None:
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile('w', dir=path.parent, delete=False, encoding='utf-8') as file:
            json.dump(known, file, indent=1)
        os.replace(file.name, path)
    except OSError:  # a read-only home: the next process checks again
        return


def guarded(plain: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator of a function that launches kernels: where the device lacks what a launch needs, `plain` computes."""
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def compute(*args: Any) -> Any:
            try:
                return function(*args)
            except Exception as error:
                if type(error).__name__ != 'OutOfResources':  # Triton's own, which it need not be imported for
                    raise
                _warn_once(function.__name__.strip('_'), str(error))
                return plain(*args)

        return compute

    return decorate


@functools.cache
def _warn_once(name: str, cause: str) -> None:
    warnings.warn(f'timm_gsa computes without the Triton kernel of {name}: {cause}', stacklevel=4)
