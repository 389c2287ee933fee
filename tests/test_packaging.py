"""What is in the wheel and the source archive, what their metadata promises, and the check of the installed timm."""
import ast
import email.message
import email.parser
import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import packaging
import pytest
import timm

import timm_gsa
from timm_gsa import _check
from timm_gsa.models._families import trained_models

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "timm_gsa"
HOOK = "_timm_gsa_autoload.py"


def build(kind: str, project: Path, folder: Path) -> Path:
    """Build a wheel or source archive with the hatchling that is installed here, so without a network."""
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)], cwd=project, check=True,
        capture_output=True, text=True)
    archive, = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(contents: dict[str, bytes]) -> email.message.Message:
    text, = (data for name, data in contents.items() if name.endswith(".dist-info/METADATA"))
    return email.parser.BytesParser().parsebytes(text)


@pytest.fixture(scope="module")
def requirements(metadata: email.message.Message) -> dict[str, list[str]]:
    """Requirements by extra; those of the package itself under ''."""
    by_extra: dict[str, list[str]] = {}
    for line in metadata.get_all("Requires-Dist", []):
        requirement, _, extra = line.partition("; extra == ")
        by_extra.setdefault(extra.strip("'\""), []).append(requirement)
    return by_extra


def test_wheel_holds_the_package_the_hook_and_nothing_else(contents):
    package = {
        path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    dist_info = f"timm_gsa-{timm_gsa.__version__}.dist-info/"
    found = {name for name in contents if not name.startswith(dist_info)}
    assert found == package - {"timm_gsa/_autoload.py"} | {HOOK}
    assert contents[HOOK] == (PACKAGE / "_autoload.py").read_bytes()
    assert {"timm_gsa/py.typed", "timm_gsa/version.py", "timm_gsa/ops/__init__.py"} <= found
    assert contents[dist_info + "licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert contents[dist_info + "entry_points.txt"].split() == [
        b"[console_scripts]", b"timm-gsa", b"=", b"timm_gsa.commands:console",
        b"[torch.backends]", b"timm_gsa", b"=", b"_timm_gsa_autoload:install"]
    assert {f"timm_gsa/photos/{name}.jpg" for name in ("astronaut", "chelsea", "coffee", "rocket")} <= found


def test_wheel_holds_every_weights_file_that_a_pretrained_config_names(contents, wheel):
    named, site = {}, Path(timm_gsa.__file__).parents[1]
    for name in timm.list_pretrained():
        path = timm.get_pretrained_cfg(name).file
        if path is not None and Path(path).is_relative_to(site / "timm_gsa"):
            named[name] = Path(path).relative_to(site).as_posix()
    assert {name.partition(".")[0] for name in named} == set(trained_models())
    assert set(named.values()) <= set(contents)
    assert {name for name in contents if name.endswith(".safetensors")} <= set(named.values())
    assert wheel.stat().st_size < 45e6


def test_files_of_the_wheel_are_readable_by_everyone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert [info.filename for info in archive.infolist() if (info.external_attr >> 16) & 0o444 != 0o444] == []


def test_source_archive_builds_the_same_wheel(contents, tmp_path):
    source = build("sdist", ROOT, tmp_path / "sdist")
    shutil.unpack_archive(source, tmp_path)
    project = tmp_path / f"timm_gsa-{timm_gsa.__version__}"
    folders = {path.name for path in project.iterdir() if path.is_dir()}
    assert {"timm_gsa", "tests", "tools"} <= folders <= {"timm_gsa", "tests", "tools", "hub_configs"}
    with zipfile.ZipFile(build("wheel", project, tmp_path / "wheel")) as again:
        assert {name: again.read(name) for name in again.namelist()} == contents


def test_metadata_tells_version_licence_and_python(metadata):
    assert metadata["Name"] == "timm-gsa"
    assert metadata["Version"] == timm_gsa.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


def test_dependencies_have_tested_lower_bounds_and_no_upper_ones(requirements):
    bounds = dict(requirement.split(">=") for requirement in requirements[""])
    assert set(bounds) == {"torch", "timm", "huggingface-hub", "safetensors", "packaging"}
    assert all(re.fullmatch(r"[\d.]+", bound) for bound in bounds.values())
    lines = (ROOT / "tools" / "checks" / "oldest-constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert {name: pins[name] for name in bounds} == bounds
    assert bounds["timm"] == _check.TIMM_FLOOR


# The check of timm


def test_check_knows_every_name_that_the_package_takes_from_timm():
    taken = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name == "commands":  # imported by a command, when timm is complete; models do not need it
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.partition(".")[0] == "timm":
                taken |= {(node.module, name.name) for name in node.names}
            elif isinstance(node, ast.Import):
                assert not any(name.name.partition(".")[0] == "timm" for name in node.names), "use from timm.x import y"
    assert not any(module == "timm" for module, _ in taken), "while we register, timm itself is half imported"
    assert {(module, name) for module, names in _check._NAMES.items() for name in names} == taken


def test_check_accepts_the_installed_timm():
    _check.require_supported_timm()


@pytest.mark.parametrize("module,name", [(module, name) for module, names in _check._NAMES.items() for name in names])
def test_check_names_what_timm_lacks(monkeypatch, module, name):
    monkeypatch.delattr(importlib.import_module(module), name)
    with pytest.raises(ImportError) as caught:
        _check.require_supported_timm()
    assert f"timm_gsa {timm_gsa.__version__} needs timm >= {_check.TIMM_FLOOR}" in str(caught.value)
    assert f"but timm {timm.__version__} lacks {module}.{name}: " in str(caught.value)


@pytest.mark.parametrize("name", list(_check._KEYWORDS))
def test_check_names_a_keyword_that_timm_lacks(monkeypatch, name):
    import timm.models.resnet as resnet

    class Moved:
        def __init__(self, block, layers, num_classes, in_chans, output_stride, global_pool, channels, stem_type,
                     stem_width, norm_layer, drop_rate, device):
            pass

    class Open:
        def __init__(self, *args, **kwargs):
            pass

    monkeypatch.setattr(resnet, name, Moved)
    with pytest.raises(ImportError, match=re.escape(f"timm {timm.__version__} lacks {name}(dtype=): ")):
        _check.require_supported_timm()
    monkeypatch.setattr(resnet, name, Open)
    _check.require_supported_timm()


def import_against(timm_files: dict[str, str], folder: Path, hooked: bool = False) -> subprocess.CompletedProcess:
    """Import the package in an interpreter that has it, packaging, the timm of `timm_files` and nothing else."""
    for name, text in timm_files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "timm_gsa").symlink_to(PACKAGE)
    (folder / "packaging").symlink_to(Path(packaging.__file__).parent)
    (folder / HOOK).symlink_to(PACKAGE / "_autoload.py")
    code = "import _timm_gsa_autoload as hook; hook.install(); import timm.models" if hooked else "import timm_gsa"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TIMM_"))}
    env.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1")
    line = [sys.executable, "-S", "-W", "error", "-c", code]
    return subprocess.run(line, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


NEED = f"timm_gsa {timm_gsa.__version__} needs timm >= {_check.TIMM_FLOOR}"
LACKING = {"timm/__init__.py": "__version__ = '9.0.1'\nfrom . import models\n", "timm/models/__init__.py": ""}
UNSUPPORTED = {
    "missing": ({}, f"{NEED}, which is not installed: pip install timm"),
    "old": (
        {"timm/__init__.py": "__version__ = '1.0.20'\nfrom . import models\n", "timm/models/__init__.py": ""},
        f"{NEED}, found timm 1.0.20: pip install --upgrade timm"),
    "old and broken": (
        {"timm/__init__.py": "import _six_of_torch", "timm-0.4.12.dist-info/METADATA": "Name: timm\nVersion: 0.4.12\n"},
        f"{NEED}, found timm 0.4.12 (which fails with ModuleNotFoundError: No module named '_six_of_torch'): "
        "pip install --upgrade timm"),
    "moved": (
        LACKING,
        f"{NEED} with the internals of that time, but timm 9.0.1 lacks timm.data, timm.layers, "
        "timm.models.build_model_with_cfg"),
    "moved and nameless": ({"timm.py": ""}, "but timm of unknown version lacks timm.data, timm.layers, timm.models, "),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_timm_gives_one_error_with_both_versions(tmp_path, case):
    files, message = UNSUPPORTED[case]
    done = import_against(files, tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.splitlines()[-1].startswith("ImportError: ") and message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("case", ["old", "moved"])
def test_unsupported_timm_gives_one_warning_when_it_is_imported(tmp_path, case):
    files, message = UNSUPPORTED[case]
    done = import_against(files, tmp_path, hooked=True)
    assert done.returncode == 0
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_error_inside_a_timm_that_is_not_old_is_shown_as_it_is(tmp_path):
    done = import_against({
        "timm/__init__.py": "raise OSError('no space left on device')",
        "timm-1.0.31.dist-info/METADATA": "Name: timm\nVersion: 1.0.31\n",
    }, tmp_path)
    assert done.stderr.splitlines()[-1] == "OSError: no space left on device"


@pytest.mark.parametrize("version,old", [
    ("0.9.16", True), ("1.0.20", True), ("1.0.20.dev0", True), ("1.0.21.dev0", False), ("1.0.21", False),
    ("1.0.21+local", False), ("1.0.100", False), ("1.1", False), ("2", False), ("unknown", False),
])
def test_versions_compare_by_number(version, old):
    assert _check._too_old(version) is old
