"""onnxruntime: what timm's `onnx_export` makes; tests/models/test_export.py has whole models at one size."""
import pytest
import torch

pytestmark = pytest.mark.interop

# A layer of attention takes seconds to export: those at the first and the last stride.
LESS = {
    'gsa_resnet_tiny': dict(attn_stages=(1, 4)),
    'san_tiny_pairwise': dict(layers=(1, 0, 0, 0, 1)),
    'san_tiny_patchwise': dict(layers=(1, 0, 0, 0, 1)),
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
    model = create(ours, num_classes=7, **LESS.get(ours, {})).eval()

    def export(*size):
        path = tmp_path / f'{size[0]}.onnx'
        onnx_export(model, str(path), batch_size=2, input_size=(3, *size), use_dynamo=True, dynamic_size=True)
        return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])

    session = export(64, 64)
    small = (1, 48, 32)
    assert error(model, session, (1, 64, 64), (3, 64, 64)) < 1e-3
    if ours.startswith('san'):
        with pytest.raises(Exception, match='Pad reflect'):  # maps no larger than the padding take another way
            error(model, session, small)
        record_property('result', 'works untouched; onnxruntime refuses images below 64 px')
        small = (1, 64, 80)
    elif error(model, session, small) > 1e-3:
        # A table of positions that fits is taken as it is, and torch.onnx drops the condition.
        assert ours == 'gsa_resnet_tiny'
        record_property(
            'result', 'needs `input_size=` of another height and width than the model is built for: '
            'a graph made at those is right there alone, and below wrong without an error')
        session = export(96, 80)
    assert error(model, session, small, (1, 64, 64), (2, 96, 80), (1, 65, 97)) < 1e-3
