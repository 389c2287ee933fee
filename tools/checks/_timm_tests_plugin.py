"""pytest plugin that runs timm's own tests/test_models.py on the models of this package.

Loaded by `run_timm_tests.py`, which copies it beside timm's tests. Those are parametrized over the model registry or
over a few named timm models. Before they are collected, this plugin

* limits `timm.list_models` and `timm.list_pretrained` to our models; a `module=` filter that includes timm's `resnet`
  includes ours, because such a filter selects models with features that all of ours have;
* replaces the models of general tests that name a few timm models by ours (`AIMED`, `BODY`);
* deselects tests that do not apply to our models, each with its reason (`NOT_OURS`, and `excused` of a
  family's record);
* seeds every test from its name and the seed of the run, so that a failure can be repeated;
* writes the outcome of every case, and missing decisions, to a report for `run_timm_tests.py`.

Only the four tables below and the records of families change or leave out a test of timm.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "timm_gsa"

# General tests that timm parametrizes with named models of its own: the names are replaced by ours. The value gives the
# other arguments that are parametrized together with the name.
AIMED: dict[str, dict[str, Any]] = {
    "test_features_only_feature_cls_class": {},
    "test_features_only_grad_checkpointing_backward": {},
    "test_forward_after_prune_intermediate_layers": {},
    "test_forward_intermediates_stop_early_final_norm": {"model_kwargs": {}},
    "test_head_hidden_size": {"model_kwargs": {}},
    "test_headless_checkpoint_reload": {"kwargs": {}},
    "test_model_features_output_stride": {},
    "test_model_forward_torchscript_with_features_fx": {},
    "test_model_init_weights_after_to_empty": {"kwargs": {}},
    "test_prune_intermediate_layers_last_feature": {"stop_early_final": True},
    "test_prune_intermediate_layers_params_used": {},
    "test_prune_to_stem_feature": {},
    "test_reset_classifier_keeps_pool": {},
    "test_resnetv2_stem_feature_odd_size": {"model_kwargs": {}},
}

# General tests that create one named timm model in their body: `create_model` gives them ours in its place.
BODY: dict[str, str] = {
    "test_convit_dtype_change_after_forward": "convit_tiny",
    "test_feature_hook_net_grad_checkpointing_order": "xception41",
    "test_gcvit_batch_consistency": "gcvit_xxtiny",
    "test_resnet_pruned_grad_checkpointing": "test_resnet",
}

# Tests that apply only to models with published weights.
NEEDS_WEIGHTS = frozenset({"test_model_features_pretrained", "test_model_load_pretrained"})

# Tests (by name or pattern) that do not apply to our models, and why.
NOT_OURS: dict[str, str] = {
    "test_attention_bias_cache_*": "a cache of timm's EfficientFormer attention; nothing of ours is cached",
    "test_catavgmax_unsupported": "for models that refuse concatenated pooling; ours take it (test_head_hidden_size)",
    "test_efficientvim_*": "branches of EfficientViM",
    "test_eva_*": "the attention pooling of EVA",
    "test_eval_*attention*": "caches of attention biases in timm's transformers; nothing of ours is cached",
    "test_feature_getter_stage_ends_torchscript":
        "timm's own ResNet fails it: TorchScript cannot compile its forward_intermediates",
    "test_gemma4_*": "the dictionary output of Gemma 4's encoder",
    "test_hybrid_vit_*": "the patch embedding of hybrid ViTs",
    "test_inception_v3_*": "the auxiliary classifier of Inception v3",
    "test_mobile_model_fusion_features": "for models that fuse their batch norms by reparameterization; ours do not",
    "test_mobilenetv5_*": "the multi-scale fusion of MobileNetV5",
    "test_model_default_cfgs_non_std":
        "for timm's list of models without the usual spatial features; ours take the stricter test_model_default_cfgs",
    "test_model_features_space2depth_reduction": "the space-to-depth stem of EfficientNet-H/X",
    "test_model_inference": "compares with reference tensors in Hub repositories of timm's own organization",
    "test_naflexvit_*": "the patch sequences of NaFlexViT",
    "test_nfnet_*": "the stems of NFNet",
    "test_prune_class_token_*": "for models with a class token",
    "test_prune_extra_blocks_*": "the extra_blocks= argument of EfficientNet and MobileNetV3",
    "test_pruned_efficientnet_*": "the channel-pruned EfficientNets",
    "test_pruned_features_torchscript":
        "timm's own ResNet fails it: no img_size=, and TorchScript cannot compile its forward_intermediates",
    "test_radio_*": "the checkpoints of RADIO",
    "test_relpos_*": "set_input_size() of models with a fixed input size; ours take any size without it",
    "test_samvit_*": "the neck of SAM's ViT",
    "test_swin_family_*": "the windows of Swin",
    "test_vit_*": "the encoders of timm's vision transformers",
}


def our_models() -> list[str]:
    """Return the registered names whose entry point lives in our package."""
    importlib.import_module(PACKAGE)  # registers them, where autoloading is off
    from timm.models import list_models, model_entrypoint

    return [n for n in list_models() if model_entrypoint(n).__module__.partition(".")[0] == PACKAGE]


def reason_not_ours(function: str) -> str | None:
    """The reason of `NOT_OURS` for a test function, or None."""
    return next((reason for pattern, reason in NOT_OURS.items() if fnmatch.fnmatchcase(function, pattern)), None)


def reason_excused(function: str, model: str) -> str | None:
    """Why a model does not pass a test function, by the record of its family, or None."""
    from timm_gsa.models._families import family_of

    return family_of(model).excused.get(function)


def _narrowed(listing: Callable[..., list[str]], models: Sequence[str]) -> Callable[..., list[str]]:
    def narrowed(filter: str | list[str] = "", module: str | list[str] = "", *args: Any, **kwargs: Any) -> list[str]:
        if "resnet" in ([module] if isinstance(module, str) else module):
            module = ""
        return [n for n in listing(filter, module, *args, **kwargs) if n.partition(".")[0] in models]

    return narrowed


def _argnames(mark: pytest.Mark) -> list[str]:
    names = mark.args[0] if mark.args else mark.kwargs["argnames"]
    return [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)


class Aim:
    """The plugin: `models` are the registered names to test, `report` is the file to write."""

    def __init__(self, models: Sequence[str], seed: int, report: Path):
        self.models = list(models)
        self.seed = seed
        self.report = report
        self.functions: set[str] = set()
        self.cases: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self.excused: dict[str, str] = {}
        self.undecided: set[str] = set()
        self.contradictions: set[str] = set()
        self.with_weights: list[str] = []

    def pytest_configure(self, config: pytest.Config) -> None:
        import timm

        with_weights = timm.list_models(pretrained=True)
        self.with_weights = sorted({n.partition(".")[0] for n in with_weights} & set(self.models))
        timm.list_models = timm.models.list_models = _narrowed(timm.list_models, self.models)
        # not the same signature: list_pretrained(filter, exclude_filters)
        pretrained = timm.list_pretrained
        timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kwargs: [
            n for n in pretrained(*args, **kwargs) if n.partition(".")[0] in self.models]

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self, name: str, obj: Any) -> None:
        """Replace the models of a function before pytest expands its parameters."""
        if name in AIMED:
            marks = []
            for mark in obj.pytestmark:
                if mark.name == "parametrize" and "model_name" in (names := _argnames(mark)):
                    values = [pytest.param(*({**AIMED[name], "model_name": m}[n] for n in names)) for m in self.models]
                    mark = pytest.mark.parametrize(names, values).mark
                marks.append(mark)
            obj.pytestmark = marks
        elif name in BODY:
            pytest.mark.parametrize("model_in_body", self.models, indirect=True)(obj)
            pytest.mark.usefixtures("model_in_body")(obj)

    @pytest.fixture
    def model_in_body(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Makes `create_model` return the requested model for the name in the test's body."""
        named, create_model, replaced = BODY[request.function.__name__], request.module.create_model, []

        def create(model_name: str, *args: Any, **kwargs: Any) -> Any:
            if model_name == named:
                replaced.append(model_name)
                model_name = request.param
            return create_model(model_name, *args, **kwargs)

        monkeypatch.setattr(request.module, "create_model", create)
        yield
        # otherwise the test would run on timm's model
        assert replaced, f"{request.function.__name__} no longer creates {named!r}: its entry in BODY must follow"

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep what applies to our models and record why the rest does not, before -k is applied."""
        kept, dropped = [], []
        for item in items:
            function = getattr(item, "originalname", item.name)
            params = item.callspec.params if hasattr(item, "callspec") else {}
            # an empty list of models leaves a placeholder that is no string
            name = params.get("model_name", params.get("model_in_body"))
            model = next((m for m in self.models if isinstance(name, str) and name.partition(".")[0] == m), None)
            self.functions.add(function)
            if reason := reason_not_ours(function):
                self.left_out[function] = reason
                if model is not None:
                    self.contradictions.add(function)
            elif model is not None and (reason := reason_excused(function, model)):
                self.excused[item.nodeid] = reason
            elif model is not None:
                self.cases[item.nodeid] = dict(function=function, model=model, outcome="not run", seconds=0.0)
                kept.append(item)
                continue
            elif function not in NEEDS_WEIGHTS:
                self.undecided.add(function)
            dropped.append(item)
        items[:] = kept
        if dropped:
            config.hook.pytest_deselected(items=dropped)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        import numpy
        import torch

        seed = (self.seed + zlib.crc32(item.nodeid.encode())) % 2**32
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        case = self.cases[report.nodeid]
        case["seconds"] += report.duration
        if report.when == "call" or report.outcome != "passed":
            # setup and teardown count only if they fail; a failure is never overwritten
            case["outcome"] = "failed" if "failed" in (case["outcome"], report.outcome) else report.outcome
            if report.outcome == "skipped":
                case["message"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)

    def missing(self) -> list[tuple[str, str]]:
        """Pairs of a function that runs for some of our models and a model that it does not run for."""
        reached = {(c["function"], c["model"]) for c in self.cases.values()}
        pairs = []
        for function in sorted({f for f, _ in reached}):
            models = self.with_weights if function in NEEDS_WEIGHTS else self.models
            pairs += [(function, m) for m in models
                      if (function, m) not in reached and reason_excused(function, m) is None]
        return pairs

    def pytest_sessionfinish(self) -> None:
        result = dict(
            models=self.models,
            functions=sorted(self.functions),
            cases=self.cases,
            left_out=self.left_out,
            excused=self.excused,
            undecided=sorted(self.undecided),
            contradictions=sorted(self.contradictions),
            missing=self.missing(),
            needs_weights=sorted(NEEDS_WEIGHTS),
            with_weights=self.with_weights,
        )
        half = self.report.with_suffix(".part")
        half.write_text(json.dumps(result), encoding="utf-8")
        os.replace(half, self.report)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("timm's tests")
    group.addoption("--our-models", required=True, help="registered names, separated by commas")
    group.addoption("--our-seed", required=True, type=int, help="seed of this run")
    group.addoption("--our-report", required=True, type=Path, help="file to write the report to")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    importlib.import_module(PACKAGE)
    models = config.getoption("--our-models").split(",")
    config.pluginmanager.register(Aim(models, config.getoption("--our-seed"), config.getoption("--our-report")), "aim")
