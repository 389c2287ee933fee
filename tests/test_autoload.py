"""`import timm` alone knows our models once the package is installed, and nothing that goes wrong in it breaks torch.

The hook is tried alone, against small stand-ins for timm and for the package, and as pip installs it, against the real
torch and timm, always in fresh interpreters.
"""
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOK = ROOT / "timm_gsa" / "_autoload.py"
WARNING = "timm_gsa could not register its models with timm."


def run(*command: object, cwd: Path, **environ: object) -> subprocess.CompletedProcess:
    """Run a command that must succeed, away from the checkout and from settings of whoever runs the tests."""
    ours = ("PYTHON", "TIMM_", "TORCH_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    env.update({"OMP_NUM_THREADS": "1"}, **{name: str(value) for name, value in environ.items()})
    line = [str(part) for part in command]
    done = subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{line} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


# The hook against stand-ins


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A folder with the hook, a timm whose registry is a list, and a timm_gsa that adds itself to it."""
    shutil.copy(HOOK, tmp_path / "_timm_gsa_autoload.py")
    write(tmp_path, {
        "timm/__init__.py": "import timm.models\n",
        "timm/models/__init__.py": "registry = []\nimport timm.models.resnet\nwhole = True\n",
        "timm/models/resnet.py": "",
        "timm_gsa/__init__.py": "from timm.models import registry, whole\nregistry.append('timm_gsa')\n",
    })
    return tmp_path


@pytest.fixture
def hooked(stand_in: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Runs code after `install` in an interpreter that has the stand-ins and no installed packages."""
    def call(code: str, before: str = "", path: str | None = None, **environ: str) -> subprocess.CompletedProcess:
        install = "import sys, _timm_gsa_autoload as hook\nclean = list(sys.meta_path)\nhook.install()"
        whole = "\n".join([before, install, code])
        path = path or str(stand_in)
        return run(sys.executable, "-S", "-W", "error", "-c", whole, cwd=stand_in, PYTHONPATH=path, **environ)
    return call


def test_hook_registers_once_timm_models_is_whole_and_leaves_no_trace(hooked):
    done = hooked("""
assert len(sys.meta_path) == len(clean) + 1 and not {"timm", "timm_gsa"} & set(sys.modules)
import timm
assert timm.models.registry == ["timm_gsa"], timm.models.registry
assert sys.meta_path == clean
assert type(timm.models.__loader__).__module__ == "_frozen_importlib_external"
assert timm.models.__spec__.loader is timm.models.__loader__
""")
    assert done.stderr == ""


def test_hook_works_in_optimised_mode(stand_in):
    code = "import _timm_gsa_autoload as hook; hook.install(); import timm; print(timm.models.registry)"
    done = run(sys.executable, "-S", "-O", "-B", "-c", code, cwd=stand_in, PYTHONPATH=stand_in)
    assert done.stdout == "['timm_gsa']\n"


def test_hook_uses_the_standard_library_only(hooked):
    hooked("""
loaded = {name.partition(".")[0] for name in sys.modules}
assert loaded <= sys.stdlib_module_names | {"__main__", "_timm_gsa_autoload"}, loaded - sys.stdlib_module_names
""")


def test_hook_installed_twice_registers_once(hooked):
    hooked("""
hook.install()
assert len(sys.meta_path) == len(clean) + 1
import timm
assert timm.models.registry == ["timm_gsa"]
hook.install()
assert timm.models.registry == ["timm_gsa"] and sys.meta_path == clean
""")


def test_hook_installed_after_timm_registers_at_once(hooked):
    hooked("assert timm.models.registry == ['timm_gsa'] and sys.meta_path == clean", before="import timm")


@pytest.mark.parametrize("first", ["timm_gsa", "timm.models.resnet"])
def test_hook_registers_whatever_is_imported_first(hooked, first):
    assert hooked(f"import {first}, timm\nassert timm.models.registry == ['timm_gsa']").stderr == ""


def test_hook_is_inert_when_the_package_is_imported_first(hooked, stand_in):
    write(stand_in, {"timm/__init__.py": """
import sys, _timm_gsa_autoload
_timm_gsa_autoload.install()  # as `import torch` does
finders = list(sys.meta_path)
import timm.models
"""})
    hooked("assert timm.finders == clean and timm.models.registry == ['timm_gsa']", before="import timm_gsa, timm")


def test_hook_leaves_the_error_of_an_explicit_import_to_it(hooked, stand_in):
    write(stand_in, {"timm_gsa/__init__.py": "import timm\nraise OSError('disk')"})
    done = hooked("""
try:
    import timm_gsa
except OSError:
    print("caught")
""")
    assert done.stdout == "caught\n" and done.stderr == ""


def test_hook_is_inert_when_switched_off(hooked):
    hooked("import timm\nassert timm.models.registry == [] and sys.meta_path == clean", TIMM_GSA_AUTOLOAD="0")


def test_hook_registers_after_an_import_of_timm_that_failed_and_was_repeated(hooked, stand_in):
    write(stand_in, {"timm/models/resnet.py": "import sys\nif not hasattr(sys, 'again'): raise OSError('disk')\n"})
    hooked("""
try:
    import timm
except OSError:
    sys.again = True
else:
    raise AssertionError("timm was to fail")
import timm
assert timm.models.registry == ["timm_gsa"] and sys.meta_path == clean
""")


def test_hook_registers_when_timm_is_in_a_zip_file(hooked, stand_in):
    with zipfile.ZipFile(stand_in / "timm.zip", "w") as archive:
        for file in (stand_in / "timm").rglob("*.py"):
            archive.write(file, file.relative_to(stand_in))
    shutil.rmtree(stand_in / "timm")
    hooked("""
import timm
assert ".zip" in timm.__file__ and timm.models.registry == ["timm_gsa"] and sys.meta_path == clean
""", path=os.pathsep.join([str(stand_in), str(stand_in / "timm.zip")]))


@pytest.mark.parametrize("first,second", [("hook", "other"), ("other", "hook")])
def test_hook_shares_timm_with_another_plugin_of_its_kind(hooked, stand_in, first, second):
    ours, theirs = (stand_in / "timm_gsa" / "__init__.py").read_text(), HOOK.read_text()
    write(stand_in, {
        "other_zoo/__init__.py": ours.replace("timm_gsa", "other_zoo"),
        "other.py": theirs.replace("timm_gsa", "other_zoo"),
    })
    hooked(f"""
sys.meta_path[:] = clean
import other
{first}.install()
{second}.install()
import timm
assert sorted(timm.models.registry) == ["other_zoo", "timm_gsa"] and sys.meta_path == clean
assert type(timm.models.__loader__).__module__ == "_frozen_importlib_external"
""")


def test_hook_bears_finders_that_take_themselves_off_the_path(hooked):
    hooked("""
class Leaving:
    def find_spec(self, name, path=None, target=None):
        if name == "timm.models":
            sys.meta_path.remove(self)
sys.meta_path.insert(-1, Leaving())
import timm
assert timm.models.registry == ["timm_gsa"] and sys.meta_path == clean
""")


def test_hook_answers_questions_that_no_load_follows(hooked):
    hooked("""
import importlib.machinery
finder = sys.meta_path[0]
path = importlib.machinery.PathFinder.find_spec("timm").submodule_search_locations
assert finder.find_spec("timm.models", path).loader is not None  # as a packager or debugger asks
sys.meta_path.remove(finder)
assert finder.find_spec("timm.models", path) is None  # as a tool that wraps finders asks
sys.meta_path.insert(0, finder)
import timm
assert timm.models.registry == ["timm_gsa"] and sys.meta_path == clean
""")


@pytest.mark.parametrize("package,cause", [
    ("raise RuntimeError('broken on purpose')", "RuntimeError: broken on purpose"),
    ("from timm.models import gone", "ImportError: cannot import name 'gone'"),
    ("def f(:", "SyntaxError: "),
    ("class E(Exception):\n    def __str__(self): raise ValueError('no text')\nraise E", "no text"),
    (None, "ModuleNotFoundError: No module named 'timm_gsa'"),
])
@pytest.mark.parametrize("before", ["", "import timm"])
def test_hook_warns_of_a_package_that_does_not_import(hooked, stand_in, package, cause, before):
    if package is None:
        shutil.rmtree(stand_in / "timm_gsa")
    else:
        write(stand_in, {"timm_gsa/__init__.py": package})
    done = hooked("import timm\nassert timm.models.whole and sys.meta_path == clean", before=before)
    assert cause in done.stderr
    if cause != "no text":  # logging itself reports an exception that has none
        assert done.stderr.startswith(WARNING) and done.stderr.count("\n") == 1


def test_hook_warns_of_a_timm_that_imports_torch_too_late_for_it(hooked, stand_in):
    write(stand_in, {
        "timm/models/__init__.py": "registry = []\nimport _timm_gsa_autoload\n_timm_gsa_autoload.install()\n"})
    done = hooked("import timm\nassert timm.models.registry == []", before="sys = __import__('sys')\nimport timm")
    assert WARNING in done.stderr and "too late" in done.stderr


# The installed package, with the real torch and timm


def make_env(folder: Path) -> Path:
    """A virtual environment that shares every package of this one except ours, however that is installed here.

    Returns:
        Its Python.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    for shared in (Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")):
        for entry in shared.iterdir():
            if "timm_gsa" not in entry.name and entry.name != "__pycache__" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def pip_install(python: Path, *args: object) -> None:
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")
    run(python, "-m", "pip", "install", *offline, *args, cwd=python.parent)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment without the package."""
    return make_env(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the package installed the normal way."""
    python = make_env(tmp_path_factory.mktemp("installed"))
    pip_install(python, ROOT)
    return python


@pytest.fixture(scope="module")
def target(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that pip installed the package into, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("target")
    pip_install(bare, "--target", folder, ROOT)
    return folder


STRICT = ("-W", "error", "-W", "ignore::ResourceWarning")  # torch 2.5 leaves a temporary folder behind at exit
KNOWN = """
import sys, timm
missing = [n for n in ("gsa_resnet50", "san10_pairwise", "priorattn_resnet18") if not timm.is_model(n)]
if missing or "timm_gsa" not in sys.modules:
    raise SystemExit(f"not registered: {missing}")
if any("timm_gsa" in type(finder).__module__ for finder in sys.meta_path):
    raise SystemExit(f"left on the meta path: {sys.meta_path}")
"""
UNKNOWN = """
import sys, timm
if "timm_gsa" in sys.modules or timm.is_model("gsa_resnet50") or not timm.is_model("resnet50"):
    raise SystemExit("registered")
"""


@pytest.mark.parametrize("first,flags", [
    ("import timm", STRICT),
    pytest.param("import timm.models.resnet", ["-I"], marks=pytest.mark.slow),
    pytest.param("from timm_gsa.layers import GlobalSelfAttention", STRICT, marks=pytest.mark.slow),
])
def test_models_are_known_whatever_is_imported_first(installed, tmp_path, first, flags):
    done = run(installed, *flags, "-c", first + KNOWN, cwd=tmp_path)
    assert done.stderr == ""


def test_importing_torch_imports_neither_timm_nor_the_package(installed, tmp_path):
    done = run(installed, *STRICT, "-c", f"""
import sys, torch
loaded = {{name.partition(".")[0] for name in sys.modules}} & {{"timm", "timm_gsa", "torchvision"}}
if loaded:
    raise SystemExit(f"import torch imported {{loaded}}")
{KNOWN}
import inspect
assert "register_model" in inspect.getsource(timm.models)
""", cwd=tmp_path)
    assert done.stderr == ""


@pytest.mark.slow
def test_switched_off_only_an_explicit_import_registers(installed, tmp_path):
    run(installed, "-c", f"import torch{UNKNOWN}import timm_gsa{KNOWN}", cwd=tmp_path, TIMM_GSA_AUTOLOAD=0)


@pytest.mark.slow
def test_models_are_known_from_a_target_folder_without_site(bare, target, tmp_path):
    site = next(bare.parents[1].glob("lib/python*/site-packages"))
    run(bare, "-S", "-c", KNOWN, cwd=tmp_path, PYTHONPATH=os.pathsep.join([str(target), str(site)]))


@pytest.mark.slow
def test_torch_and_timm_import_when_the_package_does_not(bare, target, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(target, broken)
    write(broken, {"timm_gsa/__init__.py": "raise RuntimeError('broken on purpose')"})
    done = run(bare, *STRICT, "-c", f"import torch{UNKNOWN}", cwd=tmp_path, PYTHONPATH=broken)
    assert done.stderr.startswith(WARNING) and done.stderr.count("\n") == 1
    assert "RuntimeError: broken on purpose" in done.stderr


@pytest.mark.slow
def test_editable_install_knows_the_models_and_survives_the_loss_of_its_checkout(tmp_path):
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "timm_gsa", checkout / "timm_gsa")
    python = make_env(tmp_path / "env")
    pip_install(python, "--editable", checkout)
    where = f"import timm{KNOWN}import timm_gsa; print(timm_gsa.__file__)"
    assert run(python, "-c", where, cwd=tmp_path).stdout.strip() == str(checkout / "timm_gsa" / "__init__.py")
    shutil.rmtree(checkout)
    done = run(python, "-c", f"import torch{UNKNOWN}", cwd=tmp_path)
    assert done.stderr.startswith(WARNING) and "No module named 'timm_gsa'" in done.stderr


@pytest.mark.slow
def test_models_are_known_in_spawned_data_loader_workers(installed, tmp_path):
    write(tmp_path, {
        "data.py": """
import torch
class Known(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        import timm
        return timm.is_model("gsa_resnet50")
""",
        "main.py": """
from torch.utils.data import DataLoader
from data import Known
if __name__ == "__main__":
    known, = DataLoader(Known(), num_workers=1, multiprocessing_context="spawn")
    assert known.all()
""",
    })
    run(installed, "main.py", cwd=tmp_path)


@pytest.mark.slow
def test_models_are_known_to_both_ranks_of_torchrun(installed, tmp_path):
    write(tmp_path, {"main.py": """
import timm, torch, torch.distributed as dist

def main():
    torch.manual_seed(dist.get_rank())
    model = timm.create_model("gsa_resnet_tiny")
    model = torch.nn.parallel.DistributedDataParallel(model)
    total = torch.cat([p.detach().flatten() for p in model.parameters()]).double().sum()
    totals = [torch.zeros_like(total) for _ in range(2)]
    dist.all_gather(totals, total)
    assert totals[0] == totals[1] == total
    with open(f"rank{dist.get_rank()}", "w") as file:
        file.write(type(model.module).__name__)

dist.init_process_group("gloo")
main()  # leaves no model behind: it would keep gloo's threads alive into the interpreter's end, which may abort
dist.destroy_process_group()
"""})
    launch = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2")
    run(installed, *launch, "main.py", cwd=tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["GSAResNet", "GSAResNet"]


@pytest.mark.slow
def test_models_are_known_under_pytest(installed, tmp_path):
    write(tmp_path, {"test_it.py": "def test_it():\n    import timm\n    assert timm.is_model('gsa_resnet50')\n"})
    done = run(installed, "-m", "pytest", "-p", "no:cacheprovider", "-q", "test_it.py", cwd=tmp_path)
    assert "1 passed" in done.stdout
