"""onnxruntime: what timm's `onnx_export` makes; tests/models/test_export.py has whole models at one size."""
import pytest
import torch

pytestmark = [pytest.mark.interop, pytest.mark.slow]

# A layer of attention takes seconds to export: those at the first and the last stride.
LESS = {
    'gsa_resnet_tiny': dict(attn_stages=(1, 4)),
    'san_tiny_pairwise': dict(layers=(1, 0, 0, 0, 1)),
    'san_tiny_patchwise': dict(layers=(1, 0, 0, 0, 1)),
    'priorattn_resnet_tiny': dict(attn_stages=(1, 4)),
    'smlpnet_mini': dict(depths=(1, 0, 0, 1)),
}


def error(model, session, *sizes):
    """Largest difference between the scores of graph and model for images of these sizes, as a share of the scores."""
    [name] = [each.name for each in session.get_inputs()]
    worst = 0.
    for batch, *size in sizes:
        x = torch.randn(batch, 3, *size)
        with torch.no_grad():
            scores, own = torch.from_numpy(session.run(None, {name: x.numpy()})[0]), model(x)
        worst = max(worst, ((scores - own).abs().max() / own.abs().max()).item())
    return worst


def test_one_graph_for_all_batches_and_sizes(ours, needs, create, tmp_path, record_property):
    did = "timm's `onnx_export(use_dynamo=True, dynamic_size=True)`: other batches and image sizes"
    onnxruntime = needs('onnxruntime', did, ours)
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package, reason=f'{package} is not installed')
    if torch.__version__.startswith('2.5.'):
        pytest.skip("today's onnxscript and torch 2.5 fail at timm's own ResNet")
    from timm.utils.onnx import onnx_export
    model = create(ours, num_classes=7, **LESS[ours]).eval()
    path = tmp_path / 'model.onnx'
    # Made at the size that GSA's tables are built for, where they are taken as they are.
    onnx_export(model, str(path), batch_size=2, input_size=(3, 64, 64), use_dynamo=True, dynamic_size=True)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    small = (1, 48, 32)
    if ours.startswith('san'):
        with pytest.raises(Exception, match='Pad reflect'):  # maps no larger than the padding take another way
            error(model, session, small)
        record_property('result', 'works untouched; onnxruntime refuses images below 64 px')
        small = (1, 64, 80)
    assert error(model, session, small, (3, 64, 64), (2, 96, 80), (1, 65, 97)) < 1e-3
