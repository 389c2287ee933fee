"""The networks between relations and weights as operators that keep no relations: backward passes compute them anew.

What goes over relations is in rows.py, for CPUs, and in triton_relation_network.py: both have the same functions. What
is here are matrices and norms, which are the same everywhere.

Of a norm nothing but matrices of C x C numbers has to be known. With a = relu(query - key) and the hidden channels
h = weight1 a, the moments of [a; 1] give mean and variance of h, and with sum dy a^T also the gradients of weight1,
scale and shift, for dy the gradient of what the norm gives. These matrices are float64.
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import _autograd
from .._backend import wide_type
from .neighbourhood import reflect_pad, same_padding
from .plain import network_flops, on_differences, on_patches, patch_flops

__all__ = ['Networks', 'define_networks']


class Networks(NamedTuple):
    """The networks of `timm_gsa.ops` by the operators of one backend, with their arguments and results."""

    difference_network: Callable[..., torch.Tensor]
    normed_difference_network: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    patch_network: Callable[..., torch.Tensor]


class _Norm(NamedTuple):
    """A norm of the hidden channels as an affine map: h -> factor * h + summand."""

    mean: torch.Tensor
    variance: torch.Tensor
    rstd: torch.Tensor
    factor: torch.Tensor
    folded: torch.Tensor  # matrix (M, C + 1) from [a; 1] to what the norm gives


def _norm(
        weight1: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        moments: torch.Tensor,
        eps: float | None,
) -> _Norm:
    first, second = moments[:-1, -1], moments[:-1, :-1]
    mean = weight1 @ first
    variance = ((weight1 @ (second - first * first[:, None])) * weight1).sum(1).clamp(min=0)
    rstd = torch.ones_like(variance) if eps is None else (variance + eps).rsqrt()
    factor = scale * rstd
    folded = torch.cat([weight1 * factor[:, None], (shift - mean * factor)[:, None]], dim=1)
    return _Norm(mean, variance, rstd, factor, folded)


class _Backend(NamedTuple):
    """What the networks of one backend differ in.

    prefix: Of the operators' names.
    kernels: Gives the module whose functions go over relations.
    devices: Dispatch keys of the operators.
    map_layout: Memory layout of the maps that these functions return; that of the input if `preserve_format`.
    groups_innermost: True if logits lie in memory with groups innermost, then places.
    """

    prefix: str
    kernels: Callable[[], Any]
    devices: tuple[str, ...]
    map_layout: torch.memory_format
    groups_innermost: bool

    def as_map(self, x: torch.Tensor) -> torch.Tensor:
        """An empty map like `x`, as the functions return it."""
        return torch.empty_like(x, memory_format=self.map_layout)


def define_networks(
        prefix: str,
        kernels: Callable[[], Any],
        devices: tuple[str, ...],
        map_layout: torch.memory_format,
        groups_innermost: bool,
) -> Networks:
    """Define the operators of one backend; for its arguments see `_Backend`.

    Returns:
        The networks on maps that are padded here.
    """
    backend = _Backend(prefix, kernels, devices, map_layout, groups_innermost)
    difference, patch = _Difference(backend).define(), _Patch(backend).define()

    def difference_network(
            query: torch.Tensor,
            key: torch.Tensor,
            weight1: torch.Tensor,
            bias1: torch.Tensor,
            weight2: torch.Tensor,
            bias2: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> torch.Tensor:
        padded = reflect_pad(key, same_padding(kernel_size, dilation))
        scale = torch.ones_like(bias1)
        return difference(query, padded, weight1, scale, bias1, weight2, bias2, None, kernel_size, dilation)[0]

    def normed_difference_network(
            query: torch.Tensor,
            key: torch.Tensor,
            weight1: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            eps: float,
            weight2: torch.Tensor,
            bias2: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        padded = reflect_pad(key, same_padding(kernel_size, dilation))
        return difference(query, padded, weight1, scale, shift, weight2, bias2, eps, kernel_size, dilation)[:3]

    def patch_network(
            key: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> torch.Tensor:
        padded = reflect_pad(key, same_padding(kernel_size, dilation))
        return patch(padded, scale, shift, weight, kernel_size, dilation)

    return Networks(difference_network, normed_difference_network, patch_network)


class _Difference:
    """The operator of networks of differences, on keys behind `reflect_pad`.

    It gives logits, mean, variance and moments of `normed_difference_network`. With `eps` None a factor and a summand
    stand in place of the norm, and the moments are zeros.
    """

    def __init__(self, backend: _Backend) -> None:
        self.backend = backend
        self.kernels = backend.kernels
        self.name = f'{backend.prefix}difference_network'

    def forward(
            self,
            query: torch.Tensor,
            padded: torch.Tensor,
            weight1: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight2: torch.Tensor,
            bias2: torch.Tensor,
            eps: float | None,
            kernel_size: int,
            dilation: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        window = kernel_size, dilation
        if eps is None:
            moments = query.new_zeros(query.shape[1] + 1, query.shape[1] + 1, dtype=torch.float64)
        else:
            moments = self.kernels().rectified_moments(query, padded, *window, weight2.dtype).double()
            moments /= _count(query, kernel_size)
        norm = _norm(weight1.double(), scale, shift, moments, eps)
        folded = norm.folded.to(wide_type(query.dtype))
        logits = self.kernels().difference_logits(query, padded, folded, weight2, bias2, *window)
        return logits, norm.mean, norm.variance, moments

    def fake(
            self,
            query: torch.Tensor,
            padded: torch.Tensor,
            weight1: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight2: torch.Tensor,
            bias2: torch.Tensor,
            eps: float | None,
            kernel_size: int,
            dilation: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        batch, channels, height, width = query.shape
        groups, places = weight2.shape[0], kernel_size ** 2
        if self.backend.groups_innermost:
            logits = query.new_empty(batch, height, width, places, groups, dtype=weight2.dtype).permute(0, 4, 3, 1, 2)
        else:
            logits = query.new_empty(batch, groups, places, height, width)
        mean, variance = (torch.empty_like(scale, dtype=torch.float64) for _ in range(2))
        return logits, mean, variance, query.new_empty(channels + 1, channels + 1, dtype=torch.float64)

    def backward(
            self,
            grad: torch.Tensor,
            query: torch.Tensor,
            padded: torch.Tensor,
            weight1: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight2: torch.Tensor,
            bias2: torch.Tensor,
            moments: torch.Tensor,
            eps: float | None,
            kernel_size: int,
            dilation: int,
    ) -> tuple[
        torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    ]:
        maps, window = (query, padded), (kernel_size, dilation)
        norm, wide = _norm(weight1.double(), scale, shift, moments, eps), wide_type(query.dtype)
        folded = norm.folded.to(wide)
        grad_weight2, products, grad_bias2 = self.kernels().difference_products(grad, *maps, folded, weight2, *window)
        grads, correction = _gradients_of_norm(
            products, weight1.double(), norm, moments, None if eps is None else _count(query, kernel_size))
        back = (weight1.double() * norm.factor[:, None]).t().to(wide).contiguous()
        grad_maps = self.kernels().difference_input_gradients(
            grad, *maps, folded, back, None if correction is None else correction.to(wide), weight2, *window)
        return *grad_maps, *_like_each((weight1, scale, shift, weight2, bias2), (*grads, grad_weight2, grad_bias2))

    def fake_backward(
            self,
            grad: torch.Tensor,
            query: torch.Tensor,
            padded: torch.Tensor,
            *more: Any,
    ) -> tuple[torch.Tensor, ...]:
        return self.backend.as_map(query), self.backend.as_map(padded), *(x.new_empty(x.shape) for x in more[:5])

    @staticmethod
    def flops(query: Any, padded: Any, weight1: Any, *more: Any, **_: Any) -> int:
        scale, shift, weight2, bias2, eps, kernel_size = more[:6]
        return network_flops(query, weight1, weight2, kernel_size)

    @staticmethod
    def backward_flops(grad: Any, query: Any, padded: Any, weight1: Any, *more: Any, **_: Any) -> int:
        scale, shift, weight2, bias2, moments, eps, kernel_size = more[:7]
        return network_flops(query, weight1, weight2, kernel_size, products=3)

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:7], output[3])
        ctx.more = inputs[7:]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def define(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Register the operator, and return it."""
        operator = _define(self.name, self.forward, self.fake, self.flops, self.backend)
        backward = _define(
            f'{self.name}_backward', self.backward, self.fake_backward, self.backward_flops, self.backend)

        def gradients(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[Any, ...]:
            if grad is None:
                return (None,) * 10
            if torch.is_grad_enabled():
                return _autograd.differentiable_gradients(
                    lambda *x: on_differences(*x)[0], ctx.saved_tensors[:7], grad, *ctx.more)
            return *backward(grad, *ctx.saved_tensors, *ctx.more), None, None, None

        _autograd.register(self.name, gradients, self.keep)
        return operator


def _define(name: str, function: Any, fake: Any, flops: Any, backend: _Backend) -> Callable[..., Any]:
    """Register an operator for all devices of a backend."""
    operator = _autograd.operator(name, function, fake, flops, backend.devices[0])
    for device in backend.devices[1:]:
        _autograd.implement(name, function, device)
    return operator


def _gradients_of_norm(
        products: torch.Tensor,
        weight1: torch.Tensor,
        norm: _Norm,
        moments: torch.Tensor,
        count: int | None,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Gradients of weight1, scale and shift from sum dy [a; 1]^T, and the part of a batch norm in that of a.

    With a batch norm over `count` numbers, n, of a channel,
    da = weight1^T factor (dy - grad_shift / n - (h - mean) rstd grad_scale / n). The part is a matrix (C, C + 1) that
    is applied to [a; 1]; None without a batch norm, where `count` is None.
    """
    products, grad_shift = products[:, :-1].double(), products[:, -1].double()
    grad_scale = ((products * weight1).sum(1) - norm.mean * grad_shift) * norm.rstd
    grad_weight1 = products * norm.factor[:, None]
    if count is None:
        return (grad_weight1, grad_scale, grad_shift), None
    slope = (norm.factor * norm.rstd * grad_scale / count)[:, None]
    constant = (norm.factor * grad_shift / count)[:, None] - slope * norm.mean[:, None]
    first, second = moments[:-1, -1], moments[:-1, :-1]
    grad_weight1 -= slope * (weight1 @ second) * count + constant * first * count
    return (grad_weight1, grad_scale, grad_shift), weight1.t() @ torch.cat([weight1 * slope, constant], dim=1)


class _Patch:
    """The operator of networks of patches, `patch_network` of keys behind `reflect_pad`."""

    def __init__(self, backend: _Backend) -> None:
        self.backend = backend
        self.kernels = backend.kernels
        self.name = f'{backend.prefix}patch_network'

    def forward(
            self,
            padded: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> torch.Tensor:
        return self.kernels().patch_hidden(padded, scale, shift, weight, kernel_size, dilation)

    def fake(
            self,
            padded: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> torch.Tensor:
        batch, height, width = _positions(padded.shape, kernel_size, dilation)
        return self.backend.as_map(padded.new_empty(batch, weight.shape[0], height, width))

    def backward(
            self,
            grad: torch.Tensor,
            padded: torch.Tensor,
            scale: torch.Tensor,
            shift: torch.Tensor,
            weight: torch.Tensor,
            kernel_size: int,
            dilation: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        grad_padded, *grads = self.kernels().patch_gradients(
            grad, padded, scale, shift, weight, kernel_size, dilation)
        return grad_padded, *_like_each((scale, shift, weight), tuple(grads))

    def fake_backward(
            self,
            grad: torch.Tensor,
            padded: torch.Tensor,
            *more: Any,
    ) -> tuple[torch.Tensor, ...]:
        return self.backend.as_map(padded), *(x.new_empty(x.shape) for x in more[:3])

    @staticmethod
    def flops(padded: Any, scale: Any, shift: Any, weight: Any, kernel_size: int, dilation: int, **_: Any) -> int:
        return patch_flops(_positions(padded, kernel_size, dilation), weight)

    def backward_flops(self, grad: Any, *more: Any, **_: Any) -> int:
        return 2 * self.flops(*more)

    def define(self) -> Callable[..., torch.Tensor]:
        """Register the operator, and return it."""
        operator = _define(self.name, self.forward, self.fake, self.flops, self.backend)
        backward = _define(
            f'{self.name}_backward', self.backward, self.fake_backward, self.backward_flops, self.backend)
        _autograd.gradients(self.name, 4, backward, on_patches)
        return operator


def _positions(padded: Any, kernel_size: int, dilation: int) -> tuple[int, int, int]:
    """Batch size, height and width of a map from the shape of the same map behind `reflect_pad`."""
    margin = 2 * same_padding(kernel_size, dilation)
    return padded[0], padded[2] - margin, padded[3] - margin


def _count(query: torch.Tensor, kernel_size: int) -> int:
    """Relations of a channel in a batch."""
    return query[:, 0].numel() * kernel_size ** 2


def _like_each(inputs: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Gradients in the dtypes of what they belong to, each contiguous."""
    return [grad.to(x.dtype).contiguous() for x, grad in zip(inputs, grads, strict=True)]
