"""tools/checks/run_timm_tests.py: that it aims timm's tests at our models, and that nothing but a full pass is a pass.

timm's tests are played by a stand-in of a few lines, in the forms that timm's have; the runner, its plugin, pytest,
timm and the registered models are the real ones. Nothing is downloaded: pip takes the stand-in from a folder.
"""

import dataclasses
import importlib
import io
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import timm
import torch

import timm_gsa  # noqa: F401, registers the models where the package is not installed
from timm_gsa.models._families import FAMILIES

TOOLS = Path(__file__).parents[2] / "tools" / "checks"
MODELS = ["gsa_resnet_tiny", "san_tiny_pairwise"]
HEAD = """
import os
import pytest
from timm import create_model, list_models, list_pretrained

for_each = pytest.mark.parametrize
"""

# Every form that timm's tests come in.
GOOD = HEAD + """
FEAT_INTER_FILTERS = ['vision_transformer', 'resnet']

@for_each('model_name', list_models(exclude_filters=['*_7b_*']))
@for_each('batch_size', [2])
def test_model_forward(model_name, batch_size):
    assert batch_size == 2

@for_each('model_name', list_models(include_tags=True))
def test_model_default_cfgs(model_name):
    pass

@for_each('model_name', list_models(module=FEAT_INTER_FILTERS))
def test_model_forward_intermediates(model_name):
    pass

@for_each('model_name', list_models(module=['vision_transformer']))
def test_vit_of_another_module(model_name):
    raise AssertionError('not for us')

@for_each('model_name', list_pretrained('test_*'))
def test_model_inference(model_name):
    raise AssertionError('not for us')

@for_each('model_name', list_models(pretrained=True))
def test_model_load_pretrained(model_name):
    pass

@for_each('model_name', ['convnext_atto', 'inception_next_atto'])
@for_each('output_stride', [8, 16])
def test_model_features_output_stride(model_name, output_stride):
    pass

@for_each('model_name,stop_early_final', [('ghostnet_050', True), ('mobilenetv3_small_050', False)])
def test_prune_intermediate_layers_last_feature(model_name, stop_early_final):
    assert stop_early_final

@for_each('model_name, model_kwargs', [('resnet18', {}), ('convnext_atto', dict(head_hidden_size=64))])
def test_head_hidden_size(model_name, model_kwargs):
    assert model_kwargs == {}

def test_resnet_pruned_grad_checkpointing(request):
    model = create_model('test_resnet')
    assert type(model).__module__.startswith('timm_gsa')
    assert request.node.name == f'test_resnet_pruned_grad_checkpointing[{model.pretrained_cfg["architecture"]}]'

@for_each('window', [1, 2])
def test_swin_family_windows(window):
    raise AssertionError('not for us')

if 'GITHUB_ACTIONS' in os.environ:
    raise RuntimeError('timm would leave out tests')
"""

# One way each to be no pass.
BAD = HEAD + """
@for_each('model_name', list_models())
def test_fails_for_one(model_name):
    assert model_name == 'gsa_resnet_tiny'

@for_each('model_name', list_models())
def test_skips_for_one(model_name):
    if model_name == 'gsa_resnet_tiny':
        pytest.skip('Fixed input size model > limit.')

@pytest.mark.skipif(True, reason='requires what is not there')
@for_each('model_name', list_models())
def test_marked_skip(model_name):
    pass

@pytest.mark.xfail
@for_each('model_name', list_models())
def test_expected_to_fail(model_name):
    raise AssertionError

@pytest.fixture
def broken():
    yield
    raise RuntimeError('after the test')

@for_each('model_name', list_models())
def test_breaks_afterwards(model_name, broken):
    pass

@for_each('model_name', list_models('gsa_*'))
def test_does_not_reach_every_model(model_name):
    pass

@for_each('model_name', ['resnet18'])
def test_unheard_of(model_name):
    pass

@for_each('model_name', list_models())
def test_swin_family_aimed_at_us(model_name):
    pass

def test_gcvit_batch_consistency():
    create_model('gcvit_of_another_name')
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("run_timm_tests")


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("_timm_tests_plugin")


class Case:
    """What the plugin sees of a test case."""

    def __init__(self, nodeid: str, **params: str):
        self.nodeid = self.name = nodeid
        self.originalname = nodeid.partition("[")[0]
        self.callspec = SimpleNamespace(params=params)


class Config:
    """What the plugin sees of pytest's configuration."""

    def __init__(self) -> None:
        self.dropped: list[Case] = []
        self.hook = SimpleNamespace(pytest_deselected=lambda items: self.dropped.extend(items))


def run(source: str, *pytest_args: str, models: list[str] = MODELS, seed: int = 7) -> tuple[int, dict[str, Any]]:
    """Run a stand-in of timm's tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        patch.setenv("GITHUB_ACTIONS", "true")
        patch.setenv("PYTEST_ADDOPTS", "-k nothing_at_all")
        module = importlib.import_module("run_timm_tests")
        status, report = module.run_tests({"tests/test_models.py": source.encode()}, models, seed, pytest_args)
    assert report is not None
    return status, report


@pytest.fixture(scope="module")
def good() -> tuple[int, dict[str, Any]]:
    return run(GOOD)


@pytest.fixture(scope="module")
def bad() -> tuple[int, dict[str, Any]]:
    return run(BAD)


def reached(report: Mapping[str, Any], function: str) -> list[str]:
    """Parameters of the cases of a function."""
    start = f"tests/test_models.py::{function}["
    return sorted(case.removeprefix(start)[:-1] for case in report["cases"] if case.startswith(start))


def outcomes(report: Mapping[str, Any], function: str) -> dict[str, str]:
    return {c["model"]: c["outcome"] for c in report["cases"].values() if c["function"] == function}


def archive(path: Path, version: str, files: Mapping[str, str]) -> Path:
    """Write a source archive with the given version and files."""
    folder = f"timm-{version}"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in {"timm/version.py": f"__version__ = '{version}'\n", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return path


def test_registry_lists_are_narrowed_to_the_chosen_models(good: tuple[int, dict[str, Any]]) -> None:
    status, report = good
    assert status == 0
    assert reached(report, "test_model_forward") == ["2-gsa_resnet_tiny", "2-san_tiny_pairwise"]
    assert reached(report, "test_model_default_cfgs") == timm.list_models(MODELS, include_tags=True)


def test_module_filter_that_takes_in_resnet_takes_in_ours(good: tuple[int, dict[str, Any]]) -> None:
    assert reached(good[1], "test_model_forward_intermediates") == MODELS
    assert reached(good[1], "test_vit_of_another_module") == []


def test_tests_of_loading_weights_run_for_models_that_have_some(good: tuple[int, dict[str, Any]]) -> None:
    assert reached(good[1], "test_model_load_pretrained") == timm.list_models(MODELS, pretrained=True)


def test_tests_of_named_models_are_aimed_at_ours(good: tuple[int, dict[str, Any]]) -> None:
    report = good[1]
    assert reached(report, "test_model_features_output_stride") == sorted(f"{s}-{m}" for s in (8, 16) for m in MODELS)
    assert reached(report, "test_prune_intermediate_layers_last_feature") == [f"{m}-True" for m in MODELS]
    assert len(reached(report, "test_head_hidden_size")) == 2


def test_model_named_in_the_body_is_replaced_by_ours(good: tuple[int, dict[str, Any]]) -> None:
    assert outcomes(good[1], "test_resnet_pruned_grad_checkpointing") == dict.fromkeys(MODELS, "passed")


def test_everything_left_out_has_a_reason(good: tuple[int, dict[str, Any]], tool: ModuleType) -> None:
    report = good[1]
    left_out = {"test_vit_of_another_module", "test_model_inference", "test_swin_family_windows"}
    assert report["left_out"].keys() == left_out
    assert all(report["left_out"].values())
    assert all(name in tool.left_out(report) for name in left_out)


def test_full_pass_is_good(
        good: tuple[int, dict[str, Any]], tool: ModuleType, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "MINIMUM_FUNCTIONS", {(1, 0): 7})
    assert tool.judge(*good, timm.__version__) == []
    assert good[1]["cases"] and all(c["outcome"] == "passed" for c in good[1]["cases"].values())


def test_vanished_test_function_is_noticed(
        good: tuple[int, dict[str, Any]], tool: ModuleType, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tool, "MINIMUM_FUNCTIONS", {(1, 0): 8})
    assert tool.judge(*good, "1.0.99") == [f"{m}: 7 test functions, timm 1.0.99 has at least 8" for m in MODELS]


@pytest.mark.parametrize(("version", "expected"), [("1.0.21", 11), ("1.0.30", 11), ("1.0.31", 28), ("1.1.0.dev0", 28)])
def test_number_of_functions_to_expect_follows_the_release(tool: ModuleType, version: str, expected: int) -> None:
    report = dict.fromkeys(("cases", "functions", "missing", "undecided", "contradictions", "needs_weights"), ())
    problems = tool.judge(0, {**report, "cases": {}, "models": ["some"]}, version)
    assert f"some: 0 test functions, timm {version} has at least {expected}" in problems


def test_summary_counts_functions_and_cases_of_each_model(good: tuple[int, dict[str, Any]], tool: ModuleType) -> None:
    head, *lines = tool.summarize(good[1]).splitlines()
    assert head.split()[:4] == ["model", "functions", "cases", "passed"]
    weights = {n.partition(".")[0] for n in timm.list_models(pretrained=True)}
    for model, line in zip(MODELS, lines, strict=True):
        extra = model in weights
        assert line.split()[:4] == [model, str(7 + extra), str(8 + extra), str(8 + extra)]
        assert line.endswith("with weights") == extra


@pytest.mark.parametrize(("function", "expected"), [
    ("test_fails_for_one", ["passed", "failed"]),
    ("test_skips_for_one", ["skipped", "passed"]),
    ("test_marked_skip", ["skipped", "skipped"]),
    ("test_expected_to_fail", ["skipped", "skipped"]),
    ("test_breaks_afterwards", ["failed", "failed"]),
    ("test_gcvit_batch_consistency", ["failed", "failed"]),
])
def test_failures_and_skips_are_problems(
        bad: tuple[int, dict[str, Any]], tool: ModuleType, function: str, expected: list[str],
) -> None:
    assert outcomes(bad[1], function) == dict(zip(MODELS, expected, strict=True))
    problems = tool.judge(*bad, timm.__version__)
    named = [p for p in problems if p.startswith(f"tests/test_models.py::{function}[")]
    assert len(named) == sum(outcome != "passed" for outcome in expected)


def test_reason_of_a_skip_is_told(bad: tuple[int, dict[str, Any]], tool: ModuleType) -> None:
    problems = tool.judge(*bad, timm.__version__)
    case = "tests/test_models.py::test_skips_for_one[gsa_resnet_tiny]"
    assert f"{case}: skipped (Skipped: Fixed input size model > limit.)" in problems


def test_decisions_that_are_missing_or_outdated_are_problems(bad: tuple[int, dict[str, Any]], tool: ModuleType) -> None:
    problems = "\n".join(tool.judge(*bad, timm.__version__))
    assert "test_does_not_reach_every_model: runs for other models, not for san_tiny_pairwise" in problems
    assert "test_unheard_of: new in timm's tests" in problems
    assert "test_swin_family_aimed_at_us: in NOT_OURS" in problems


def test_seed_of_the_run_decides_what_a_test_draws(plugin: ModuleType) -> None:
    def drawn(seed: int, test: str) -> tuple[Any, ...]:
        plugin.Aim(MODELS, seed, Path("unused")).pytest_runtest_setup(Case(test))
        return random.random(), numpy.random.rand(), torch.rand(()).item()

    first = drawn(1, "test_some[a]")
    assert drawn(1, "test_some[a]") == first
    for other in drawn(2, "test_some[a]"), drawn(1, "test_some[b]"):
        assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.slow
def test_what_pytest_arguments_leave_out_did_not_pass(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "MINIMUM_FUNCTIONS", {(1, 0): 1})
    status, report = run(GOOD, "-k", "test_model_forward and not intermediates")
    assert status == 0
    assert outcomes(report, "test_model_forward") == dict.fromkeys(MODELS, "passed")
    assert outcomes(report, "test_head_hidden_size") == dict.fromkeys(MODELS, "not run")
    first = "tests/test_models.py::test_model_default_cfgs[gsa_resnet_tiny"
    idle = sum(c["outcome"] == "not run" for c in report["cases"].values())
    problem, = tool.judge(status, report, "1.0.31")
    assert problem.startswith(f"{idle} applicable cases did not run, the first is {first}")


def test_case_with_an_excuse_is_left_out_and_reported(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    families = [dataclasses.replace(each, excused={"test_some": "no good reason"} if each.name == "san" else {})
                for each in FAMILIES]
    monkeypatch.setattr("timm_gsa.models._families.FAMILIES", families)
    aim = plugin.Aim(MODELS, 0, Path("unused"))
    config, items = Config(), [Case(f"test_some[{m}]", model_name=m) for m in MODELS]
    aim.pytest_collection_modifyitems(config, items)
    assert [i.nodeid for i in items] == ["test_some[gsa_resnet_tiny]"]
    assert [i.nodeid for i in config.dropped] == ["test_some[san_tiny_pairwise]"]
    assert aim.excused == {"test_some[san_tiny_pairwise]": "no good reason"}
    assert aim.missing() == []


@pytest.mark.slow
def test_pytest_that_dies_is_no_pass(tool: ModuleType) -> None:
    source = "import os\nos._exit(0)\n"
    status, report = tool.run_tests({"tests/test_models.py": source.encode()}, MODELS, 0, [])
    assert (status, report) == (0, None)
    assert tool.judge(status, report, "1.0.31") == ["pytest ended with status 0 before it could report"]


@pytest.mark.slow
def test_command_that_is_ended_leaves_nothing_behind(tmp_path: Path) -> None:
    source = "import os, time\nopen(os.environ['STARTED'], 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    file = archive(tmp_path / "timm.tar.gz", timm.__version__, {"tests/test_models.py": source})
    started, temporary = tmp_path / "started", tmp_path / "temporary"
    temporary.mkdir()
    tool = subprocess.Popen(
        [sys.executable, TOOLS / "run_timm_tests.py", MODELS[0], "--archive", file],
        env={**os.environ, "STARTED": str(started), "TMPDIR": str(temporary)}, stdout=subprocess.PIPE, text=True,
    )
    try:
        deadline = time.monotonic() + 600
        while not started.exists() or not started.read_text():
            assert tool.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        assert list(temporary.iterdir())
        tool.terminate()
        assert tool.wait(120) == 128 + signal.SIGTERM
    finally:
        tool.kill()
        tool.communicate()
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_command_succeeds_on_a_full_pass(
        tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tool, "MINIMUM_FUNCTIONS", {(1, 0): 7})
    file = archive(tmp_path / "timm.tar.gz", timm.__version__, {"tests/test_models.py": GOOD})
    assert tool.main([MODELS[0], "--archive", str(file), "--repeat", "2", "--seed", "5"]) == 0
    said = capsys.readouterr().out
    assert f"run 1 of 2: timm {timm.__version__}, --seed 5, {MODELS[0]}" in said
    assert f"run 2 of 2: timm {timm.__version__}, --seed 6, {MODELS[0]}" in said
    assert said.count("3 of timm's 11 test functions left out") == 1
    assert said.endswith("2 of 2 runs good\n")


@pytest.mark.slow
def test_command_fails_without_any_test(
        tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    file = archive(tmp_path / "timm.tar.gz", timm.__version__, {"tests/test_models.py": HEAD})
    assert tool.main([MODELS[0], "--archive", str(file)]) == 1
    said = capsys.readouterr().out
    assert f"run 1 of 1 is not good:\n  no test was collected for {MODELS[0]}" in said
    assert said.endswith("0 of 1 runs good\n")


def test_patterns_choose_models_in_registry_order(tool: ModuleType) -> None:
    registered = ["a_tiny", "b_large", "b_tiny", "c"]
    assert tool.choose_models(["b_*", "*_tiny"], registered) == ["a_tiny", "b_large", "b_tiny"]
    with pytest.raises(ValueError, match=r"matches 'd\*'; there are a_tiny, b_large, b_tiny, c"):
        tool.choose_models(["c", "d*"], registered)


def test_default_models_are_the_tiny_ones_and_the_smallest_of_each_kind(tool: ModuleType) -> None:
    chosen = tool.choose_models(tool.DEFAULT_MODELS, tool.our_models())
    assert {"gsa_resnet_tiny", "gsa_resnet26", "san_tiny_pairwise", "san10_pairwise"} <= set(chosen)
    assert set(chosen) == {name for family in FAMILIES for name in (*family.tiny, *family.smallest)}


@pytest.mark.parametrize(("arguments", "message"), [
    (["--repeat", "0"], "--repeat must be at least 1, got 0"),
    (["--all", "san*"], "--all stands for every model, leave out san*"),
])
def test_wrong_arguments_are_refused(
        tool: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(arguments)
    assert message in capsys.readouterr().err


def test_archive_gives_the_tests_alone(tool: ModuleType, tmp_path: Path) -> None:
    wanted = {"tests/test_models.py": "a", "tests/deep/er.py": "b"}
    unwanted = dict.fromkeys(("tests/data.bin", "setup.py", "timm/layers/tests/e.py"), "c")
    tests = tool.read_tests(archive(tmp_path / "timm.tar.gz", "1.2.3", wanted | unwanted), "1.2.3")
    assert tests == {"tests/test_models.py": b"a", "tests/deep/er.py": b"b"}


@pytest.mark.parametrize(("files", "message"), [
    ({"timm/version.py": "__version__ = '9.9.9'\n"}, "holds timm 9.9.9, the installed one is 1.2.3"),
    ({"timm/version.py": "version = 1\n"}, "no timm/version.py with a version"),
    ({"tests/test_layers.py": ""}, "without tests/test_models.py"),
])
def test_archive_that_is_not_the_release_is_refused(
        tool: ModuleType, tmp_path: Path, files: dict[str, str], message: str,
) -> None:
    file = archive(tmp_path / "timm.tar.gz", "1.2.3", files)
    with pytest.raises(tool.ArchiveError, match=message) as caught:
        tool.read_tests(file, "1.2.3")
    assert str(caught.value).startswith(f"{file}: ")


@pytest.mark.parametrize("content", [b"", b"not an archive", b"\x1f\x8b\x08\x00cut off"])
def test_damaged_archive_is_refused(tool: ModuleType, tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "timm.tar.gz"
    file.write_bytes(content)
    with pytest.raises(tool.ArchiveError, match=str(file)):
        tool.read_tests(file, "1.2.3")


def test_command_refuses_a_wrong_archive_in_one_line(
        tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    assert tool.main(["gsa_resnet_tiny", "--archive", str(tmp_path / "none.tar.gz")]) == 2
    said = capsys.readouterr().err
    assert "none.tar.gz" in said and said.count("\n") == 1


# The build backend of the stand-in: pip asks for metadata even where it shall only download.
BACKEND = """
import os

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = os.path.join(directory, 'timm-1.2.3.dist-info')
    os.mkdir(folder)
    with open(os.path.join(folder, 'METADATA'), 'w') as file:
        file.write('Metadata-Version: 2.1\\nName: timm\\nVersion: 1.2.3\\n')
    with open(os.path.join(folder, 'WHEEL'), 'w') as file:
        file.write('Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')
    return os.path.basename(folder)

def build_wheel(directory, config_settings=None, metadata_directory=None):
    raise RuntimeError('nothing is to be built')
"""
PROJECT = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows of."""
    pytest.importorskip("pip", reason="the tool fetches with pip")
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def test_archive_is_fetched_once_and_kept_whole(
        tool: ModuleType, index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    files = {
        "tests/test_models.py": "", "pyproject.toml": PROJECT, "backend.py": BACKEND,
        "PKG-INFO": "Metadata-Version: 2.1\nName: timm\nVersion: 1.2.3\n",
    }
    source = archive(index / "timm-1.2.3.tar.gz", "1.2.3", files)
    cache = tmp_path / "cache" / "deeper"
    fetched = tool.fetch_archive("1.2.3", cache)
    assert fetched == cache / "timm-1.2.3.tar.gz"
    assert fetched.read_bytes() == source.read_bytes()
    assert [p.name for p in cache.iterdir()] == ["timm-1.2.3.tar.gz"]
    assert "fetching the source archive of timm 1.2.3" in capsys.readouterr().out

    content = source.read_bytes()
    source.unlink()
    assert tool.fetch_archive("1.2.3", cache) == fetched
    assert capsys.readouterr().out == ""

    # what is kept is checked each time, and fetched anew when it is damaged
    fetched.write_bytes(content[:-100])
    source.write_bytes(content)
    assert tool.fetch_archive("1.2.3", cache).read_bytes() == content


def test_archive_that_cannot_be_fetched_is_explained(tool: ModuleType, index: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(tool.FetchError) as caught:
        tool.fetch_archive("1.2.3", cache)
    message = str(caught.value)
    assert "No matching distribution found for timm==1.2.3" in message
    assert "pip download --no-binary timm --no-deps timm==1.2.3" in message
    assert "--archive timm-1.2.3.tar.gz" in message and str(cache) in message
    assert list(cache.iterdir()) == []


def test_command_without_a_network_ends_with_its_own_status(
        tool: ModuleType, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tool.main(["gsa_resnet_tiny"]) == 3
    assert f"pip could not fetch the source archive of timm {timm.__version__}" in capsys.readouterr().err
