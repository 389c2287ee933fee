"""Shared by the tests of whole models: lists of models, and `create`, which builds one with trained-like norms."""
import functools
import gc
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# timm's own ResNet at the size of the tiny models. A test that it does not pass is wrong.
CONTROL = 'resnet26'
CONTROL_SHAPE = dict(layers=(1, 2, 2, 1), channels=(32, 64, 96, 128), stem_type='deep', stem_width=12)

# Worker processes, and processes that tests start, share the cores. torch reads this when it is imported.
if workers := os.environ.get('PYTEST_XDIST_WORKER_COUNT'):
    os.environ.setdefault('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // int(workers))))

from timm_gsa.commands.models import registered as registered_models  # noqa: E402
from timm_gsa.models._families import FAMILIES, Family, family_of, tiny_models  # noqa: E402

# One tiny and one real model of each kind. The real ones run on the meta device only.
TINY = tiny_models(untrained=True)
SMALLEST = tuple(name for family in FAMILIES for name in family.smallest)
ALL = tuple(registered_models())

# Of timm's feature extractors around a model, which also call `stages.0` `stages_0`.
WRAPPERS = r'^(body|model|graph_module)\.'


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The longest first, so that no process is left with them at the end.
    items.sort(key=lambda item: item.path.name not in ('test_export.py', 'test_compile.py'))
    if not config.getoption('--slow'):
        for item in items:
            if item.get_closest_marker('slow'):
                item.add_marker(pytest.mark.skip(reason='takes long: pytest --slow runs it'))


def pytest_collection_finish() -> None:
    """Collect garbage less often: it takes a fifth of the time in which torch traces a model."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(params=TINY)
def ours(request: pytest.FixtureRequest) -> str:
    """Name of a tiny model of each kind."""
    return request.param


@pytest.fixture(params=tiny_models())
def pretrained(request: pytest.FixtureRequest) -> str:
    """Name of a tiny model of each kind that has weights in the package."""
    return request.param


@pytest.fixture(params=(*TINY, CONTROL))
def name(request: pytest.FixtureRequest) -> str:
    """Name of a tiny model of each kind, and of timm's own ResNet."""
    return request.param


@pytest.fixture(params=SMALLEST)
def real(request: pytest.FixtureRequest) -> str:
    """Name of the smallest model of the paper's size of each kind."""
    return request.param


@pytest.fixture(params=ALL)
def registered(request: pytest.FixtureRequest) -> str:
    """Name of every model of the package."""
    return request.param


@pytest.fixture(scope='session')
def families() -> dict[str, dict[str, Any]]:
    """Values of the fixture `name`, with the arguments by which `create` makes a tiny model of each."""
    return {**{name: {} for name in TINY}, CONTROL: CONTROL_SHAPE}


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Family:
    """Record of the model that the test is about; timm's own ResNet can do what GSA-ResNet can."""
    [about] = {'name', 'ours', 'real', 'registered'} & set(request.fixturenames)
    model = request.getfixturevalue(about)
    return family_of('gsa_resnet' if model == CONTROL else model)


@pytest.fixture
def promised() -> tuple[str, ...]:
    """Names of all models of the package."""
    return ALL


@pytest.fixture(scope='session')
def create(families: dict[str, dict[str, Any]]) -> Callable[..., Any]:
    """`timm.create_model` with the same weights every time: random, with norms as after training.

    Fresh norms are the identity, or zero at the end of a residual branch, and would hide errors before them. Running
    statistics fit the weights, so that the last map depends on the image. With `fresh`, on the meta device and for
    models not in `families`, the model is as timm makes it, from a fixed seed.
    """
    import timm
    import torch

    import timm_gsa  # noqa: F401  # not needed where it is installed, but these tests are not about that

    @functools.cache
    def trained(name: str) -> dict[str, Any]:
        torch.manual_seed(0)
        model = timm.create_model(name, **families[name])
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d | torch.nn.GroupNorm | torch.nn.LayerNorm):
                    module.weight.uniform_(0.5, 1.)
                    module.bias.uniform_(-0.2, 0.2)
                    module.momentum = 1.  # batch norm takes the statistics of the next batch
            model.train()(torch.randn(8, 3, 64, 64))
            # Logits of DC-AC hardly differ between images, as each gate divides by its channels: scaled to 0.1 or more.
            spread = model.eval()(torch.randn(8, 3, 64, 64)).std(0).mean().item()
            model.get_classifier().weight.div_(min(spread / 0.1, 1.))
        return model.state_dict()

    def create(name: str, fresh: bool = False, **kwargs: Any) -> Any:
        torch.manual_seed(1)
        model = timm.create_model(name, **dict(families.get(name, {}), **kwargs))
        if name in families and not fresh:
            weights = trained(name)
            for key, tensor in model.state_dict().items():
                source = weights.get(re.sub(WRAPPERS, '', key).replace('stages_', 'stages.', 1))
                if source is not None and source.shape == tensor.shape and tensor.device.type != 'meta':
                    tensor.copy_(source)
        torch.manual_seed(2)
        return model

    return create


@pytest.fixture
def run_tool(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script to its `SystemExit` in this process, where torch and timm are imported already."""
    def run_tool(path: Path, *arguments: object) -> subprocess.CompletedProcess:
        line = [str(path), *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', line)
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(line[0], run_name='__main__')
        return subprocess.CompletedProcess(line, caught.value.code, *capsys.readouterr())

    return run_tool
