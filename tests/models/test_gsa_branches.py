"""GSA's branches alone: content without position, position without content."""
import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_gsa
from timm_gsa.layers import GlobalSelfAttention
from timm_gsa.ops.gsa.reference import column_attention as column_attention_reference
from timm_gsa.ops.gsa.reference import content_attention as content_attention_reference


def layer(branches: str, stride: int = 1) -> GlobalSelfAttention:
    """A layer whose norm does something, in evaluation mode."""
    torch.manual_seed(0)
    module = GlobalSelfAttention(16, (5, 7), num_heads=4, stride=stride, branches=branches).double()
    if branches != 'content':
        nn.init.uniform_(module.norm.weight, 0.5, 1.5)
        nn.init.uniform_(module.norm.bias)
    return module.eval()


def row_reference(query, value, table):
    return column_attention_reference(query.transpose(-1, -2), value.transpose(-1, -2), table).transpose(-1, -2)


def position_of(module, query, value):
    column = column_attention_reference(query, value, module.rel_h)
    return row_reference(query, module.norm(column.flatten(1, 2)).reshape(value.shape), module.rel_w)


@pytest.mark.parametrize('grad', [False, True])
def test_each_branch_alone_is_its_operation(grad):
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        content, position = layer('content'), layer('position')
        query, key, value = content.project(x)
        torch.testing.assert_close(content(x), content_attention_reference(query, key, value).flatten(1, 2))
        query, value = position.project(x)
        torch.testing.assert_close(position(x), position_of(position, query, value).flatten(1, 2))


def test_both_branches_are_the_sum_of_each_alone():
    both, content, position = layer('both'), layer('content'), layer('position')
    weight = both.qkv.weight.detach()
    content.load_state_dict({'qkv.weight': weight})
    position.load_state_dict({
        **{key: tensor for key, tensor in both.state_dict().items() if key != 'qkv.weight'},
        'qkv.weight': torch.cat([weight[:16], weight[32:]]),
    })
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(both(x), content(x) + position(x))


@pytest.mark.parametrize('branches, parameters, gflops', [
    ('content', 18_012_200, 6.566), ('position', 16_795_000, 6.368), ('both', 18_052_856, 7.170)])
def test_counts_of_ablated_networks(branches, parameters, gflops):
    model = timm.create_model('gsa_resnet50', attn_branches=branches, device='meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, abs=600)  # 16.795 M, to its digits
    assert round(counter.get_total_flops() / 1e9, 3) == gflops


@pytest.mark.parametrize('branches', ['content', 'position'])
def test_ablated_networks_train_script_and_decay_as_others(branches):
    model = timm.create_model('gsa_resnet_tiny', attn_branches=branches, num_classes=7, img_size=64).train()
    x = torch.randn(4, 3, 96, 64)
    model(x).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert len(model.no_weight_decay()) == (0 if branches == 'content' else 8)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.compile(model, backend='eager', fullgraph=True)(x), model(x))
    twin = timm.create_model('gsa_resnet_tiny', attn_branches=branches, num_classes=7, img_size=96).eval()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x), rtol=1e-4, atol=1e-5)


def test_unknown_branches_and_maps_of_one_branch_are_refused():
    with pytest.raises(ValueError, match="branches must be 'both', 'content' or 'position', got 'key'"):
        GlobalSelfAttention(16, 4, num_heads=4, branches='key')
    model = timm.create_model('gsa_resnet_tiny', attn_branches='content').eval()
    with pytest.raises(ValueError, match=r"layer layer\d\.0\.conv2 must have both branches, got 'content'"):
        timm_gsa.attention_maps(model, torch.randn(1, 3, 64, 64), points=[(3, 3)])
