"""Tell what this package can use on this machine, and check that it computes rightly.

examples:
  timm-gsa doctor
  timm-gsa doctor --check
  timm-gsa doctor --device cuda --check

Lists versions, the device, the backends and why those that are missing are, and the weights that are present. --check
compares every form of every operation with its reference: outputs, gradients and gradients of gradients in each dtype.
The exit status is 1 if one is wrong.
"""
import argparse
import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from ..ops import _backend, _checks

PACKAGES = ('timm-gsa', 'timm', 'torch', 'triton', 'huggingface-hub', 'safetensors', 'numpy')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument('--device', default='cpu', help='device to look at and to check on: cpu, cuda, cuda:1 ...')
    parser.add_argument('--check', action='store_true', help='compare every form of every operation with its reference')


def run(args: argparse.Namespace) -> int:
    """Print what there is; returns 1 if a check fails, else 0.

    Raises:
        ValueError: There is no such device.
    """
    device = usable(args.device)
    for name, what in (*versions(), ('device', describe(device)), *backends(device), *weights()):
        print(f'{name:<16} {what}')
    if not args.check:
        return 0
    print()
    return check(device)


def usable(name: str) -> torch.device:
    """The device of this name, if tensors can be put there."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        cause = str(error).partition('\n')[0]
        raise ValueError(f'--device must be a device of this machine, {name!r} is not: {cause}') from error


def versions() -> Iterator[tuple[str, str]]:
    """Python and the packages that matter here, with their versions."""
    yield 'python', f'{platform.python_version()} on {platform.system()} {platform.machine()}'
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, 'not installed'


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == 'cuda':
        major, minor = torch.cuda.get_device_capability(device)
        return f'{device}: {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}'
    return f'{device}: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}'


def backends(device: torch.device) -> Iterator[tuple[str, str]]:
    """The backends, and why one cannot be used."""
    for name in _backend.BACKENDS:
        if name == 'auto':
            continue
        reason = _backend.why_not_available(name)
        if reason is None and name == 'cpu' and device.type != 'cpu':
            reason = f'it computes on a CPU only, not on {device.type}'
        yield f'backend {name}', 'available' if reason is None else f'not available: {reason}'


def weights() -> Iterator[tuple[str, str]]:
    """Files of weights in the package."""
    folder = Path(__file__).parents[1] / 'weights'
    for path in sorted(folder.glob('*.safetensors')):
        yield 'weights', f'{path.stem}, {path.stat().st_size / 2 ** 20:.1f} MiB'


def check(device: torch.device) -> int:
    """Print a table of the largest errors; returns 1 if one is larger than rounding explains."""
    forms = ['torch']
    if device.type == 'cpu':
        forms.append('cpu')
    if _backend.why_not_available('triton') is None and (device.type == 'cuda' or _backend.interprets()):
        forms.append('triton')
    print(f'{"operation":<28}{"form":<8}{"dtype":<10}' + ''.join(f'{order:>24}' for order in _checks.ORDERS))
    failed = 0
    for family in _checks.FAMILIES:
        for form in forms:
            for dtype in DTYPES:
                failed += print_rows(list(_checks.check(family, form, dtype, device)))
    print(f'\n{failed} failed' if failed else '\nall right')
    return 1 if failed else 0


def print_rows(results: list[_checks.Result]) -> int:
    """A row for each operation; returns how many of them failed."""
    failed = 0
    for operation in dict.fromkeys(result.operation for result in results):
        own = [result for result in results if result.operation == operation]
        wrong = [result for result in own if not result.passed]
        form, dtype = own[0].form, str(own[0].dtype).removeprefix('torch.')
        cells = [cell([result for result in own if result.order == order]) for order in _checks.ORDERS]
        row = f'{operation:<28}{form:<8}{dtype:<10}' + ''.join(f'{each:>24}' for each in cells)
        reasons = dict.fromkeys(result.reason for result in own if result.reason is not None)
        note = '; '.join(reasons)
        print(row + ('  WRONG' if wrong else '') + (f'  {note}' if note else ''))
        failed += bool(wrong)
    return failed


def cell(results: list[_checks.Result]) -> str:
    """The largest error of some results."""
    errors = [result.error for result in results if result.error is not None]
    return f'{max(errors):.1e}' if errors else '-'
