"""Registers our models when timm is imported, so that `import timm` is enough.

Installed as the top-level module `_timm_gsa_autoload`. PyTorch calls its entry point `install` at the end of `import
torch`. Inside the package `timm_gsa` it would import timm at that point. It uses the standard library only and catches
all exceptions of ours, because an exception would make `import torch` or `import timm` fail.

`TIMM_GSA_AUTOLOAD=0` in the environment, before torch is imported, switches it off.
"""
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PACKAGE = "timm_gsa"
_TARGET = "timm.models"


def _warn(error: Exception) -> None:
    import logging

    logging.getLogger(_PACKAGE).warning(
        "timm_gsa could not register its models with timm. %s: %s (`import timm_gsa` shows where; "
        "TIMM_GSA_AUTOLOAD=0 in the environment prevents the attempt)",
        type(error).__name__,
        error,
    )


def _register() -> None:
    try:
        __import__(_PACKAGE)  # no effect if it is imported already, or is itself importing timm
    except Exception as error:
        _warn(error)


class _Loader:
    """Wraps the loader of timm.models for one load, then registers our models."""

    def __init__(self, loader: Any, finder: "_Finder") -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # inspect and pkgutil need the real loader
        self.loader.exec_module(module)
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self.finder]
        _register()


class _Finder:
    """Finds timm.models by the finders after it; removed once timm.models is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        behind = iter(list(sys.meta_path))  # a copy, because finders may remove themselves
        any(finder is self for finder in behind)  # advances past this one: two such finders must not call each other
        for finder in behind:
            spec: Any = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


def install() -> None:
    """Register the models once timm.models is loaded: now, if it is. PyTorch calls this through the entry point."""
    try:
        if os.environ.get("TIMM_GSA_AUTOLOAD", "1") == "0" or _PACKAGE in sys.modules:
            return
        timm_models = sys.modules.get(_TARGET)
        if timm_models is None:
            if not any(type(finder) is _Finder for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder())
        elif getattr(timm_models.__spec__, "_initializing", False):
            raise ImportError("this timm imports torch from within timm.models, too late to wait for it")
        else:
            _register()
    except Exception as error:
        _warn(error)
