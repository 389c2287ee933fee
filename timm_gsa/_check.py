"""Checks that the installed timm is supported."""
import importlib.metadata
import inspect
import sys
from importlib import import_module

from packaging.version import InvalidVersion, Version

from .version import __version__

__all__ = ["TIMM_FLOOR", "require_supported_timm"]

TIMM_FLOOR = "1.0.21"

# Everything that the package imports from timm, some of it private, and the keyword arguments that it passes.
_NAMES = {
    "timm.data": ("IMAGENET_DEFAULT_MEAN", "IMAGENET_DEFAULT_STD"),
    "timm.layers": (
        "BatchNormAct2d", "DropPath", "LayerType", "Mlp", "SyncBatchNormAct", "create_classifier", "get_act_layer",
        "get_norm_layer", "register_notrace_function", "register_notrace_module", "to_2tuple"),
    "timm.models": ("build_model_with_cfg", "generate_default_cfgs", "is_model_pretrained", "register_model"),
    "timm.models._builder": ("_resolve_pretrained_source", "resolve_pretrained_cfg"),
    "timm.models._features": ("feature_take_indices",),
    "timm.models._manipulate": ("checkpoint", "checkpoint_seq"),
    "timm.models.resnet": ("BasicBlock", "Bottleneck", "ResNet", "downsample_conv"),
}
_KEYWORDS = {
    "BasicBlock": ("device", "dtype"),
    "Bottleneck": ("device", "dtype"),
    "ResNet": (
        "block", "layers", "num_classes", "in_chans", "output_stride", "global_pool", "channels", "stem_type",
        "stem_width", "norm_layer", "drop_rate", "device", "dtype"),
}


def _timm_version() -> str:
    version = getattr(sys.modules.get("timm"), "__version__", None)  # a source checkout has no metadata
    if version is None:
        try:
            version = importlib.metadata.version("timm")
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
    return version


def _too_old(version: str) -> bool:
    try:
        found = Version(version)
    except InvalidVersion:
        return False
    return found.release < Version(TIMM_FLOOR).release  # a development version counts as the release it leads to


def _missing() -> list[str]:
    missing = []
    for path, names in _NAMES.items():
        try:
            module = import_module(path)
        except ModuleNotFoundError as error:
            if not f"{path}.".startswith(f"{error.name}."):
                raise
            missing.append(path)
        else:
            missing += [f"{path}.{name}" for name in names if not hasattr(module, name)]
    if not missing:
        resnet = import_module("timm.models.resnet")
        for name, keywords in _KEYWORDS.items():
            parameters = inspect.signature(getattr(resnet, name)).parameters.values()
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
                taken = [parameter.name for parameter in parameters]
                missing += [f"{name}({keyword}=)" for keyword in keywords if keyword not in taken]
    return missing


def require_supported_timm() -> None:
    """Check that timm is installed, not older than `TIMM_FLOOR`, and has the names that this package imports.

    Raises:
        ImportError: It is not; the message names both versions and what is missing.
    """
    need = f"timm_gsa {__version__} needs timm >= {TIMM_FLOOR}"
    try:
        import_module("timm")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "timm":
            raise ImportError(f"{need}, which is not installed: pip install timm") from None
        version = _timm_version()
        if _too_old(version):
            raise ImportError(
                f"{need}, found timm {version} (which fails with {type(error).__name__}: {error}): "
                "pip install --upgrade timm"
            ) from None
        raise
    version = _timm_version()
    if _too_old(version):
        raise ImportError(f"{need}, found timm {version}: pip install --upgrade timm")
    missing = _missing()
    if missing:
        raise ImportError(
            f"{need} with the internals of that time, but timm {version} lacks {', '.join(missing)}: "
            "pip install --upgrade timm-gsa, or install an earlier timm"
        )
