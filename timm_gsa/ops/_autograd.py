"""Registers operators: their implementations, fakes, gradients of any order and FLOP formulas.

A compiler and a tracer see an operator as one step. Operators are defined through `torch.library.Library`: its first
call in eager mode does not import the compiler, as that of a `custom_op` does.
"""
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

__all__ = [
    'differentiable_gradients',
    'gradients',
    'implement',
    'like',
    'operator',
    'plain_gradients',
    'register',
]

_LIBRARY = torch.library.Library('timm_gsa', 'DEF')


def operator(
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        flops: Callable[..., int] | None = None,
        device: str = 'CPU',
) -> Any:
    """Define an operator `timm_gsa::name`.

    Args:
        name: Its name.
        function: What computes it; the annotations of its arguments are the operator's schema.
        fake: The same without computing: empty tensors of the shapes, dtypes and strides that `function` returns.
        flops: Floating point operations from the shapes of the arguments, two for a multiply-add.
        device: Dispatch key that `function` is for, 'CPU' or 'CUDA'.

    Returns:
        The operator, to be called as `function`.
    """
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f'timm_gsa::{name}', fake, lib=_LIBRARY)
    packet = getattr(torch.ops.timm_gsa, name)
    if flops is not None:
        register_flop_formula(packet)(flops)
    return packet.default


def implement(name: str, function: Callable[..., Any], device: str = 'CUDA') -> None:
    """Let an operator be computed by `function` on another device."""
    _LIBRARY.impl(name, function, device)


def gradients(
        name: str,
        count: int,
        backward: Callable[..., tuple[Any, ...]],
        plain: Callable[..., torch.Tensor],
) -> None:
    """Register the gradients of an operator `timm_gsa::name` whose first `count` arguments are tensors.

    Args:
        name: The operator's name.
        count: Number of tensors that have gradients; they come first among the arguments.
        backward: Gradients of these tensors from that of the output and all arguments; need not be differentiable.
        plain: The same as the operator, by differentiable operations. Gradients of gradients are taken of it.
    """
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.more = inputs[count:]

    def compute(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            return differentiable_gradients(plain, ctx.saved_tensors, grad, *ctx.more)
        return *backward(grad, *ctx.saved_tensors, *ctx.more), *(None for _ in ctx.more)

    torch.library.register_autograd(f'timm_gsa::{name}', compute, setup_context=keep, lib=_LIBRARY)


def differentiable_gradients(
        function: Callable[..., torch.Tensor],
        tensors: tuple[torch.Tensor, ...],
        grad: torch.Tensor,
        *more: Any,
) -> tuple[Any, ...]:
    """Gradients, differentiable in turn, of a function of tensors and of arguments that have none.

    Gradients are taken with respect to aliases: saved tensors may depend on one another, and a gradient with respect to
    the tensors themselves would follow those paths as well.
    """
    aliases = tuple(x.view_as(x) for x in tensors)
    sources = [x for x in aliases if x.requires_grad]
    grads = iter(torch.autograd.grad(function(*aliases, *more), sources, grad, create_graph=True, allow_unused=True))
    return *(next(grads) if x.requires_grad else None for x in aliases), *(None for _ in more)


def plain_gradients(function: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Gradients of a function of tensors from that of its result and the tensors, for the inside of an operator."""
    def compute(grad: torch.Tensor, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            vjp = torch.func.vjp(function, *tensors)[1]
            return tuple(like(each, x) for each, x in zip(vjp(grad), tensors, strict=True))

    return compute


def like(x: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """`x` in the dtype of `pattern` and with the strides that `torch.empty_like(pattern)` has, as fakes promise."""
    x = x.to(pattern.dtype)
    expected = torch.empty_like(pattern, device='meta').stride()
    return x if x.stride() == expected else torch.empty_like(pattern).copy_(x)


def register(name: str, backward: Callable[..., tuple[Any, ...]], keep: Callable[..., None]) -> None:
    """Register the gradients of an operator `timm_gsa::name` by a backward function with its own context.

    Args:
        name: The operator's name.
        backward: Gradients of all arguments, or None, from the context and the gradient of each output.
        keep: Saves in the context what `backward` needs; called with the context, the arguments and the output.
    """
    torch.library.register_autograd(f'timm_gsa::{name}', backward, setup_context=keep, lib=_LIBRARY)
