"""Compares the forms of operations with their references, on small inputs of odd shapes.

`timm-gsa doctor --check` prints the results; `_kernels.py` runs a check before Triton kernels are used on a device.
"""
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ._backend import Form, Operation, use_backend

__all__ = ['Case', 'FAMILIES', 'Result', 'check', 'fault']

# Relative errors, by norm, that rounding of inputs to a dtype explains.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}

ORDERS = ('output', 'gradients', 'gradients of gradients')


class Case(NamedTuple):
    """Inputs of an operation: tensors, in float64 on a CPU, and further arguments, which have no gradients."""

    operation: Operation
    tensors: tuple[torch.Tensor, ...]
    more: tuple[Any, ...] = ()


class Result(NamedTuple):
    """Largest relative error of a form of an operation, or why it was not computed; `order` is one of `ORDERS`."""

    operation: str
    form: str
    dtype: torch.dtype
    order: str
    error: float | None
    reason: str | None

    @property
    def passed(self) -> bool:
        """True if the error is within what rounding explains, or nothing was computed."""
        return self.error is None or self.error <= TOLERANCES[self.dtype]


def _gsa_cases() -> Iterator[Case]:
    from .gsa import COLUMN, CONTENT, CONTENT_AND_ROW

    # Heads, channels of a head, height, width, image: narrow and wide heads, a single row, several blocks of a line.
    for heads, depth, height, width in ((3, 4, 5, 7), (2, 8, 3, 40), (1, 12, 1, 5)):
        maps = torch.randn(4, 2, height, width, heads, depth, dtype=torch.float64)
        query, key, value, column = maps.permute(0, 1, 4, 5, 2, 3)
        rows, columns = (torch.randn(2 * length - 1, depth, dtype=torch.float64) for length in (height, width))
        yield Case(CONTENT, (query, key, value))
        yield Case(COLUMN, (query, value, rows))
        yield Case(CONTENT_AND_ROW, (query, key, value, column, columns))


def _san_cases() -> Iterator[Case]:
    from .san import AGGREGATION, DIFFERENCE, PATCH

    # Channels, groups, places a side, dilation, height, width.
    sizes = (8, 2, 3, 1, 5, 7), (6, 3, 5, 1, 9, 4), (4, 4, 3, 2, 5, 5)
    for channels, groups, kernel_size, dilation, height, width in sizes:
        window, places = (kernel_size, dilation), kernel_size ** 2
        query, key, value = torch.randn(3, 2, channels, height, width, dtype=torch.float64)
        weight = torch.randn(2, groups, places, height, width, dtype=torch.float64)
        first, second = torch.randn(channels, channels, dtype=torch.float64), torch.randn(groups, channels).double()
        bias1, bias2 = torch.randn(channels, dtype=torch.float64), torch.randn(groups, dtype=torch.float64)
        scale, shift = torch.randn(2, channels * places, dtype=torch.float64)
        matrix = torch.randn(groups, channels * places, dtype=torch.float64)
        yield Case(AGGREGATION, (value, weight), window)
        yield Case(DIFFERENCE, (query, key, first, bias1, second, bias2), window)
        yield Case(PATCH, (key, scale, shift, matrix), window)


def _gaussian_cases() -> Iterator[Case]:
    from .gaussian import GAUSSIAN

    for height, width, dilation in ((5, 7, 1), (16, 12, 2)):
        value = torch.randn(2, 3, height, width, dtype=torch.float64)
        yield Case(GAUSSIAN, (value, torch.ones(1, dtype=torch.float64)), (dilation,))


def _axial_cases() -> Iterator[Case]:
    from .axial_mixing import COLUMN_MIXING, ROW_MIXING

    for height, width in ((5, 7), (1, 4)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        for operation, length in ((ROW_MIXING, width), (COLUMN_MIXING, height)):
            matrix, bias = torch.randn(length, length, dtype=torch.float64), torch.randn(length, dtype=torch.float64)
            yield Case(operation, (x, matrix, bias))


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    'gsa': _gsa_cases,
    'san': _san_cases,
    'gaussian': _gaussian_cases,
    'axial': _axial_cases,
}


def check(
        family: str,
        form: str,
        dtype: torch.dtype,
        device: torch.device,
        orders: tuple[str, ...] = ORDERS,
) -> Iterator[Result]:
    """Compare one form of every operation of a family with the reference in float64.

    Args:
        family: Key of `FAMILIES`.
        form: 'torch', 'cpu' or 'triton'.
        dtype: Dtype of the inputs of the form.
        device: Device that it computes on.
        orders: Orders to compare, of `ORDERS`.

    Yields:
        A result for each case and order. An exception of the form is the reason of one.
    """
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), use_backend(form):
        torch.manual_seed(0)
        for case in FAMILIES[family]():
            yield from _check_case(case, form, dtype, device, orders)


def _check_case(
        case: Case,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        orders: tuple[str, ...],
) -> Iterator[Result]:
    form = getattr(case.operation, name)
    label = case.operation.name, name, dtype
    if form is None:
        return
    tensors = [x.to(dtype).to(device) for x in case.tensors]  # `to` keeps the layout
    if isinstance(form, Form):
        reason = form.why_not(*tensors, *case.more)
        if reason is not None:
            yield Result(*label, orders[0], None, reason)
            return
        form = form.compute
    assert case.operation.reference is not None
    expected = _derivatives(case.operation.reference, [x.double().cpu() for x in tensors], case.more, len(orders))
    try:
        actual = _derivatives(form, tensors, case.more, len(orders))
    except Exception as failure:  # a kernel may fail in any way: the reason says how
        yield Result(*label, orders[0], float('inf'), f'{type(failure).__name__}: {failure}')
        return
    for order, ours, theirs in zip(orders, actual, expected, strict=True):
        errors = [
            float((a.detach().double().cpu() - b.detach()).norm() / (b.detach().norm() + 1e-3 * b.numel() ** 0.5))
            for a, b in zip(ours, theirs, strict=True)
        ]
        error = max(errors)
        yield Result(*label, order, error if error == error else float('inf'), None)


def _derivatives(
        function: Callable[..., torch.Tensor],
        tensors: list[torch.Tensor],
        more: tuple[Any, ...],
        count: int,
) -> list[list[torch.Tensor]]:
    """Output, gradients and gradients of gradients of a function, the first `count` of them."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, *more)
    orders = [[out]]
    if count > 1:
        cotangent = torch.linspace(-.5, 1., out.numel(), dtype=torch.float64).view(out.shape).to(out)
        orders.append(list(torch.autograd.grad(out, leaves, cotangent, create_graph=count > 2)))
    if count > 2:
        probes = [torch.linspace(1., -.5, x.numel(), dtype=torch.float64).view(x.shape).to(x) for x in orders[1]]
        total = sum((x.double() * probe.double()).sum() for x, probe in zip(orders[1], probes, strict=True))
        assert isinstance(total, torch.Tensor)
        orders.append(list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)))
    return orders


def fault(family: str, form: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a form may not be used for a family on a device: None if outputs and gradients agree with the reference."""
    for result in check(family, form, dtype, device, ORDERS[:2]):
        if not result.passed:
            cause = result.reason or f'{result.order} of {result.operation} off by {result.error:.1e}'
            return f'the kernels fail their check: {cause}'
    return None
