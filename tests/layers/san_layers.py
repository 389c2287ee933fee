"""What tests of SAN's layers share."""
import torch
import torch.nn.utils.prune
from torch import nn

import timm_gsa


def biased(layer):
    layer.conv1.bias = nn.Parameter(torch.randn(layer.conv1.out_channels, dtype=torch.float64))


def patched(name):
    def change(layer):
        module = getattr(layer, name)
        forward = module.forward
        module.forward = lambda x: 2 * forward(x)
    return change


def padded(layer):
    conv = layer.conv2
    layer.conv2 = nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1).double()


# What only the equation can compute.
CHANGES = [
    lambda layer: layer.norm2.train(),
    lambda layer: setattr(layer, 'norm1', nn.GroupNorm(1, layer.norm1.num_features).double()),
    lambda layer: setattr(layer, 'norm2', nn.Identity()),
    lambda layer: setattr(layer, 'act1', nn.Identity()),
    lambda layer: setattr(layer, 'act2', nn.GELU()),
    lambda layer: setattr(layer, 'conv1', nn.Sequential(layer.conv1)),
    lambda layer: layer.norm2.register_forward_hook(lambda module, args, output: 2 * output),
    lambda layer: layer.act1.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    lambda layer: layer.conv1.register_full_backward_hook(lambda module, given, returned: None),
    lambda layer: layer.conv2.register_full_backward_pre_hook(lambda module, grads: None),
    lambda layer: torch.nn.utils.parametrizations.weight_norm(layer.conv1),
    lambda layer: torch.nn.utils.spectral_norm(layer.conv2),
    lambda layer: torch.nn.utils.prune.l1_unstructured(layer.conv1, 'weight', 0.5),
    biased,
    padded,
    patched('conv1'),
    patched('act2'),
]


def images(batch, height, width, channels_last=False):
    x = torch.randn(batch, 48, height, width, dtype=torch.float64)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def generally(function, *args):
    """Call a function on the equation of the layers, submodule by submodule."""
    with timm_gsa.use_backend('torch'):
        return function(*args)


def short_cuts(layer, x):
    """Names of the short cuts by which a layer computes x."""
    choices = timm_gsa.explain(nn.Sequential(layer), x).get('0', [])
    taken = (choice.operation for choice in choices if choice.form not in ('torch', 'reference'))
    return [operation for operation in taken if operation.startswith(('pairwise', 'patchwise'))]


def traced_calls(layer, x):
    """Names of what a compiler is given of a layer."""
    names = []

    def record(graph, _):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == 'call_function')
        return graph.forward

    torch._dynamo.reset()
    torch.compile(layer, backend=record, fullgraph=True)(x)
    torch._dynamo.reset()
    return names
