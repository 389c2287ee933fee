"""What a model attends to: the exact weights of its attention layers at chosen positions, and their rollout.

Each family has a reader, which knows its layers; nothing else here does. A new family adds its reader and a line in
`_run.py`.
"""
from collections.abc import Sequence

import torch
import torch.nn as nn

from ._condenser import CondenserMaps, GateMaps
from ._global_self_attention import GlobalMaps
from ._prior_attention import GaussianMaps
from ._reader import Frame, LayerAttention
from ._rollout import NoRolloutError, attention_rollout
from ._run import attention_layers, cells_of, reader_of, run, unwrapped
from ._san import NeighbourhoodMaps
from ._sparse_mlp import AxialMaps

__all__ = [
    'AxialMaps',
    'CondenserMaps',
    'GateMaps',
    'GaussianMaps',
    'GlobalMaps',
    'LayerAttention',
    'NeighbourhoodMaps',
    'NoRolloutError',
    'attention_maps',
    'attention_rollout',
]


def attention_maps(
        model: nn.Module,
        images: torch.Tensor,
        points: Sequence[tuple[float, float]] | torch.Tensor | None = None,
        layers: Sequence[str] | None = None,
) -> dict[str, LayerAttention]:
    """Effective weight that each input position of an attention layer has in its output at chosen positions.

    The weights are exact: applied to the layer's values (`LayerAttention.attend`) they give the layer's own output.
    Equations and shapes are in the classes returned, one for each kind of layer. The model runs once, without
    gradients; memory is P maps of each layer's size for every head or weight group.

    A compiled model runs without its compiled code, `DistributedDataParallel` without communication.

    Args:
        model: Model of this package, or any network with layers of `timm_gsa.layers`, in eval mode; also compiled, in
            a wrapper or as timm's feature extractor.
        images: Batch of preprocessed images as the model takes them, (B, channels, height, width).
        points: Query positions (x, y) in pixels of `images`, from the upper left corner; for each layer the position
            of its output map that covers the pixel. The centre where None.
        layers: Names of layers, or of modules that contain some, as in `model.named_modules()`; all where None.

    Returns:
        What each layer attends to, by the name of the layer, in the order in which the layers run.

    Raises:
        ValueError: The model is in training mode, has no attention layer, or one whose norm is not a fixed affine map;
            a name in `layers` is none of its layers; a point lies outside the images; or `images` is no batch.
        RuntimeError: A layer asked for did not run.
    """
    cells = cells_of(points, images)

    def read(name: str, layer: nn.Module, x: torch.Tensor, output: torch.Tensor) -> LayerAttention:
        reader = reader_of(layer)
        assert reader is not None
        out_size = (output.shape[-2], output.shape[-1])
        return reader.read(Frame(name, out_size, images.shape[-2:], cells(out_size).to(x.device)), layer, x)

    model = unwrapped(model)
    with torch.inference_mode(False), torch.no_grad():
        return run(model, images, attention_layers(model, layers), read)
