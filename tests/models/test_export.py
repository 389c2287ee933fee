"""Ways out of Python: torch.export, ONNX, TorchScript by script and by trace."""
import io
import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim, export

from .blocks import LESS, SHALLOW, assert_logits_close, one_fast


@pytest.fixture
def model(name, create):
    return create(name, num_classes=7).eval()


@pytest.fixture
def shallow(name, create):
    return create(name, num_classes=7, **SHALLOW.get(name, {})).eval()


def images(batch, height=64, width=64):
    return torch.randn(batch, 3, height, width)


def assert_same(model, other, *inputs):
    with torch.no_grad():
        for x in inputs:
            assert_logits_close(other(x), model(x))


@pytest.mark.parametrize('strict', [pytest.param(True, marks=pytest.mark.slow), False], ids=['strict', 'not strict'])
def test_export_with_dynamic_batch(shallow, strict):
    batch = {'x': {0: Dim('batch', min=1, max=64)}}
    program = export(shallow, (images(2),), strict=strict, dynamic_shapes=batch)
    assert_same(shallow, program.module(), images(1), images(3))


@pytest.mark.parametrize('name', one_fast((*SHALLOW, 'resnet26')))
def test_export_with_dynamic_size_from_the_size_the_model_is_built_for(shallow):
    if torch.__version__.startswith('2.5.'):
        pytest.skip('torch 2.5 has no Dim.DYNAMIC')
    axes = {axis: Dim.DYNAMIC for axis in (0, 2, 3)}
    program = export(shallow, (images(2),), strict=False, dynamic_shapes={'x': axes})
    assert_same(
        shallow, program.module(),
        images(2), images(3, 96, 64), images(2, 80, 112), images(1, 64, 97), images(1, 264, 264))


def test_exported_program_survives_a_file(shallow):
    file = io.BytesIO()
    torch.export.save(export(shallow, (images(2),), strict=False), file)
    file.seek(0)
    assert_same(shallow, torch.export.load(file).module(), images(2))


class SideBySide(nn.Module):
    """Several models on the same images: one program, as most of the time to build one is the C++ compiler's start."""

    def __init__(self, *models):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x):
        return torch.stack([model(x) for model in self.models])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++'), reason='AOTInductor needs a C++ compiler')
@pytest.mark.skipif(torch.__version__.startswith('2.5.'), reason='inductor of torch 2.5 fails at its CPU code')
def test_aotinductor_package_serves_all_sizes(create, tmp_path):
    """Made from an image whose maps are even, and run where they are odd too."""
    names = ('gsa_resnet_tiny', 'san_tiny_pairwise')  # a minute each
    models = SideBySide(*(create(name, num_classes=7, **LESS[name]) for name in names)).eval()
    axes = {axis: Dim.DYNAMIC for axis in (0, 2, 3)}
    with torch.no_grad():
        program = export(models, (images(2, 64, 128),), strict=False, dynamic_shapes={'x': axes})
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / 'models.pt2'))
    assert_same(
        models, torch._inductor.aoti_load_package(path),
        images(2, 64, 128), images(1, 97, 65), images(3, 96, 80), images(5, 80, 161))


@pytest.mark.parametrize('ours', one_fast(SHALLOW))
def test_onnx_agrees_with_the_model(ours, create, tmp_path):
    """By way of torch.export, with batch, height and width left open."""
    if torch.__version__.startswith('2.5.'):
        pytest.skip("today's onnxscript and torch 2.5 fail at timm's own ResNet")
    for package in ('onnx', 'onnxscript'):
        pytest.importorskip(package, reason='torch.onnx.export needs it')
    onnxruntime = pytest.importorskip('onnxruntime', reason='runs the exported graph')
    model, path = create(ours, num_classes=7, **SHALLOW[ours]).eval(), tmp_path / 'model.onnx'
    axes = {axis: Dim.DYNAMIC for axis in (0, 2, 3)}
    torch.onnx.export(model, (images(2),), path, dynamo=True, dynamic_shapes={'x': axes}, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    [name] = [one.name for one in session.get_inputs()]
    assert_same(
        model, lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]),
        *(images(batch, *size) for batch in (2, 5) for size in ((64, 64), (96, 80))))


def test_script_runs_at_every_size(model):
    scripted = torch.jit.script(model)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert_same(model, torch.jit.load(file), images(2), images(1, 96, 80), images(3, 33, 47))


def test_script_trains_alike(name, create):
    model, other = (create(name, num_classes=7, dtype=torch.float64).train() for _ in range(2))
    scripted = torch.jit.script(other)
    x = images(4).double()
    for each in (model, scripted):
        each(x).square().sum().backward()
    grads = dict(scripted.named_parameters())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[key].grad, parameter.grad, msg=lambda text, key=key: f'{key}: {text}')


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # that sizes become constants, as the name says
def test_trace_keeps_the_size_it_saw(model):
    traced = torch.jit.trace(model, images(2))
    assert_same(model, traced, images(2), images(5))
