"""SAN's operations as the textbook has them: every neighbour of every position is written out, by `F.unfold`."""
import torch
import torch.nn.functional as F

from .neighbourhood import reflect_pad, same_padding

__all__ = [
    'aggregation',
    'difference_moments',
    'difference_network',
    'normed_difference_network',
    'patch_moments',
    'patch_network',
]


def _neighbours(x: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Neighbours of every position, (B, C, K * K, H, W)."""
    padded = reflect_pad(x, same_padding(kernel_size, dilation))
    return F.unfold(padded, kernel_size, dilation=dilation).unflatten(1, (x.shape[1], -1)).unflatten(3, x.shape[2:])


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """A 1 x 1 convolution of (B, C, ., H, W)."""
    return F.conv3d(x, weight[:, :, None, None, None], bias)


def aggregation(value: torch.Tensor, weight: torch.Tensor, kernel_size: int, dilation: int = 1) -> torch.Tensor:
    """The sum over neighbours by einsum."""
    neighbours = _neighbours(value, kernel_size, dilation).unflatten(1, (-1, weight.shape[1]))
    out = torch.einsum('bsgkhw,bgkhw->bsghw', neighbours, weight.to(value.dtype))
    return out.reshape(value.shape)


def difference_network(
        query: torch.Tensor,
        key: torch.Tensor,
        weight1: torch.Tensor,
        bias1: torch.Tensor,
        weight2: torch.Tensor,
        bias2: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """Two 1 x 1 convolutions of the differences."""
    dtype = weight2.dtype
    weight1, bias1, weight2, bias2 = (x.to(query.dtype) for x in (weight1, bias1, weight2, bias2))
    relation = (query[:, :, None] - _neighbours(key, kernel_size, dilation)).relu()
    return _linear(_linear(relation, weight1, bias1).relu(), weight2, bias2).to(dtype)


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
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two 1 x 1 convolutions of the differences and a batch norm between them."""
    dtype = weight2.dtype
    weight1, scale, shift, weight2, bias2 = (x.to(query.dtype) for x in (weight1, scale, shift, weight2, bias2))
    hidden = _linear((query[:, :, None] - _neighbours(key, kernel_size, dilation)).relu(), weight1)
    variance, mean = torch.var_mean(hidden, (0, 2, 3, 4), correction=0)
    normed = F.batch_norm(hidden, None, None, scale, shift, training=True, eps=eps).relu()
    return _linear(normed, weight2, bias2).to(dtype), mean.detach().double(), variance.detach().double()


def patch_network(
        key: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> torch.Tensor:
    """A 1 x 1 convolution of the patches."""
    scale, shift, weight = (x.to(key.dtype) for x in (scale, shift, weight))
    patches = _neighbours(key, kernel_size, dilation).flatten(1, 2)
    return F.conv2d((patches * scale[:, None, None] + shift[:, None, None]).relu(), weight[:, :, None, None])


def difference_moments(
        query: torch.Tensor,
        key: torch.Tensor,
        kernel_size: int,
        dilation: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of differences that are written out."""
    relation = query[:, :, None].double() - _neighbours(key.double(), kernel_size, dilation)
    return relation.mean((0, 2, 3, 4)), relation.var((0, 2, 3, 4), correction=0)


def patch_moments(key: torch.Tensor, kernel_size: int, dilation: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of patches that are written out."""
    patches = _neighbours(key.double(), kernel_size, dilation).flatten(1, 2)
    return patches.mean((0, 2, 3)), patches.var((0, 2, 3), correction=0)
