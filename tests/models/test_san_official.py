"""SAN networks under the authors' weights: their numbers, their names, their checkpoint files."""
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_gsa.models.san import SAN

from ..san_fixtures import (
    MANIFEST,
    assert_agrees,
    digest,
    every,
    made_input,
    made_weight,
    modes,
    official_names,
    official_shapes,
    official_state,
    tap_digest,
)

NETWORKS = [f"san{depth}_{kind}" for depth in (10, 15, 19) for kind in ("pairwise", "patchwise")]
TINY = {name: case for name, case in MANIFEST["model_cases"].items() if name.startswith("tiny_")}
TAPS = {
    "stem": "conv1.act",
    "stage0": "act1",
    **{f"stage{i}": f"layer{i}" for i in range(1, 5)},
    "pooled": "global_pool",
}


def saved_by_the_authors(state: dict[str, torch.Tensor], path: Path) -> Path:
    """Write a file as their training script does, in the format of the torch of that time."""
    names = [name for name in state if name.endswith(("weight", "bias"))]
    torch.save(
        {
            "epoch": 100,
            "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
            "optimizer": {
                "state": {i: {"momentum_buffer": torch.zeros(4)} for i in range(len(names))},
                "param_groups": [{"lr": 1e-4, "momentum": 0.9, "params": list(range(len(names)))}],
            },
            "scheduler": {"T_max": 100, "eta_min": 0, "last_epoch": 100},
            "top1_val": 0.749,
            "top5_val": 0.921,
        },
        path,
        _use_new_zipfile_serialization=False,
    )
    return path


def by_pretrained_cfg(name: str, path: Path, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(path)}, **kwargs)


def by_load_checkpoint(name: str, path: Path, **kwargs: Any) -> nn.Module:
    model = timm.create_model(name, **kwargs)
    timm.models.load_checkpoint(model, str(path))
    return model


LOADERS = [by_pretrained_cfg, by_load_checkpoint]


def assert_holds(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Every tensor of the authors' state dict is where it belongs, and there is no other."""
    held = official_names(model.state_dict())
    assert set(held) == set(state)
    assert sum(tensor.numel() for tensor in held.values()) == sum(t.numel() for t in model.state_dict().values())
    for name, tensor in state.items():
        assert held[name].dtype == tensor.dtype, name
        assert torch.equal(held[name], tensor), name


@pytest.fixture(scope="module", params=["san10_pairwise", "san10_patchwise"])
def san10(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Name of a network and a file of the authors' making."""
    path = tmp_path_factory.mktemp("san") / "model_best.pth"
    yield request.param, saved_by_the_authors(official_state(request.param), path)
    path.unlink()


@pytest.fixture
def small(tmp_path: Path) -> tuple[str, dict[str, torch.Tensor], Path]:
    """A network quick to load, the authors' names for its random weights, and a path for a file."""
    name = "san_tiny_pairwise"
    return name, official_names(timm.create_model(name).state_dict()), tmp_path / "model_best.pth"


# Numbers


def test_made_weights_are_those_of_the_manifest() -> None:
    for example in MANIFEST["filler_examples"]:
        make, name = (made_weight, example["name"]) if "name" in example else (made_input, example["input"])
        first = make(name, tuple(example["shape"])).flatten()[:3]
        assert torch.equal(first, torch.tensor(example["first3"]))


def run_with_taps(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and, thinned out and as a digest, the features of every stage."""
    got = {}

    def tap(name: str) -> Callable[..., None]:
        def store(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            got[f"tap_{name}"], got[f"tap_{name}_digest"] = every(output, 256).clone(), tap_digest(output)
        return store

    handles = [model.get_submodule(module).register_forward_hook(tap(name)) for name, module in TAPS.items()]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, got


def results(group: str, mode: str, dtype: torch.dtype, change: float = 0.) -> dict[str, torch.Tensor]:
    """What the golden numbers of a reduced network hold, with weights and image off by a share of up to `change`."""
    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * (1 + change * (2 * torch.rand_like(tensor) - 1)) if change else tensor

    case = TINY[group]
    model = SAN(
        layers=tuple(case["layers"]),
        attn_type=case["kind"],
        kernel_sizes=tuple(case["kernels"]),
        num_classes=case["classes"],
    )
    model.load_state_dict(official_state(group))
    model.to(dtype).train(mode == "train")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(shifted(parameter))
    x = shifted(made_input(f"{group}/x", tuple(case["shape"])).to(dtype)).requires_grad_()
    logits, got = run_with_taps(model, x)
    loss = F.cross_entropy(logits, torch.tensor(case["labels"]))
    loss.backward()
    grads = official_names({name: parameter.grad for name, parameter in model.named_parameters()})
    order = [name for name in official_shapes(group) if name in grads]
    assert len(order) == len(grads)
    got |= {
        "logits": logits,
        "loss": loss[None],
        "grad_x": every(x.grad, 4096),
        "grad_x_digest": digest("x", x.grad),
        "grad_params_digest": torch.stack([digest(name, grads[name]) for name in order]),
    }
    if mode == "train":
        state = official_names(model.state_dict())
        stats = [name for name in official_shapes(group) if ".running_" in name]
        got["new_stats_digest"] = torch.stack([digest(name, state[name]) for name in stats])
        assert all(state[name] == 1 for name in state if name.endswith("num_batches_tracked"))
    return got


@pytest.mark.parametrize(("group", "mode"), modes(TINY))
def test_reduced_networks_agree_with_the_authors(group: str, mode: str) -> None:
    assert_agrees(group, mode, results(group, mode, torch.float64), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "mode"), modes(TINY))
def test_reduced_networks_agree_with_the_authors_in_single_precision(group: str, mode: str) -> None:
    """As far as rounding lets them: which of two nearly equal numbers a pool or ReLU passes on differs by machine."""
    torch.manual_seed(0)
    rounded = [results(group, mode, torch.float64, change=1e-6) for _ in range(5)]
    assert_agrees(group, mode, results(group, mode, torch.float32), torch.float32, rounded)


@pytest.mark.parametrize(("dtype", "loader"), [(torch.float64, by_pretrained_cfg), (torch.float32, by_load_checkpoint)])
def test_networks_from_a_file_of_the_authors_agree(
        san10: tuple[str, Path],
        dtype: torch.dtype,
        loader: Callable[..., nn.Module],
) -> None:
    name, path = san10
    model = loader(name, path).to(dtype).eval()
    x = made_input(f"{name}/x", tuple(MANIFEST["model_cases"][name]["shape"])).to(dtype)
    with torch.no_grad():
        logits, got = run_with_taps(model, x)
    assert_agrees(name, "eval", {**got, "logits": logits}, dtype)


# Names


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_of_every_network_map_one_to_one(name: str) -> None:
    state = official_state(name)
    model = timm.create_model(name)
    model.load_state_dict(state)
    assert_holds(model, state)
    parameters = dict(model.named_parameters())
    assert sum(p.numel() for p in parameters.values()) == sum(
        t.numel() for key, t in state.items() if not key.endswith(("_mean", "_var", "_tracked")))


def test_our_own_names_load_as_they_are(small: tuple[str, dict[str, torch.Tensor], Path]) -> None:
    name, _, path = small
    model = timm.create_model(name)
    torch.save(model.state_dict(), path)
    for loader in LOADERS:
        loaded = loader(name, path).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


def test_a_network_inside_another_loads_the_authors_names(small: tuple[str, dict[str, torch.Tensor], Path]) -> None:
    name, official, _ = small
    outer = nn.ModuleDict({"backbone": timm.create_model(name), "neck": nn.Linear(2, 2)})
    state = {f"backbone.{key}": tensor for key, tensor in official.items()}
    outer.load_state_dict({**state, "neck.weight": torch.ones(2, 2), "neck.bias": torch.ones(2)})
    assert_holds(outer["backbone"], official)


# Files


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_of_the_authors_loads_whole(san10: tuple[str, Path], loader: Callable[..., nn.Module]) -> None:
    name, path = san10
    assert not zipfile.is_zipfile(path)  # what torch writes since 1.6
    assert_holds(loader(name, path), official_state(name))


def test_a_file_of_the_authors_loads_for_grey_images(san10: tuple[str, Path]) -> None:
    name, path = san10
    state = official_state(name)
    state["conv_in.weight"] = state["conv_in.weight"].sum(1, keepdim=True)
    assert_holds(by_pretrained_cfg(name, path, in_chans=1), state)


def test_a_file_of_the_authors_loads_for_other_classes(san10: tuple[str, Path]) -> None:
    name, path = san10
    model = by_pretrained_cfg(name, path, num_classes=10)
    assert model.fc.weight.shape == (10, 2048)
    state = official_state(name)
    assert_holds(model, {**state, "fc.weight": model.fc.weight, "fc.bias": model.fc.bias})


def test_a_file_of_the_authors_loads_for_features(small: tuple[str, dict[str, torch.Tensor], Path]) -> None:
    name, official, path = small
    saved_by_the_authors(official, path)
    features = by_pretrained_cfg(name, path, features_only=True).eval()
    x = made_input("x", (1, 3, 64, 64))
    want = by_load_checkpoint(name, path).eval().forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(features(x), want)


def without(state: dict[str, torch.Tensor], key: str) -> None:
    del state[key]


def with_one_more(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = torch.zeros(4)


def with_one_row_more(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = torch.cat([state[key], state[key][:1]])


def with_one_column_more(state: dict[str, torch.Tensor], key: str) -> None:
    state[key] = torch.cat([state[key], state[key][:, :1]], dim=1)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("change", "key", "reported"), [
    (without, "conv_in.weight", "conv1.conv.weight"),
    (without, "bn0.running_var", "bn1.running_var"),
    (without, "bn3.bias", "layer3.norm.bias"),
    (without, "layer0.0.bn2.weight", "conv1.block0.norm2.weight"),
    (without, "layer1.0.sam.conv2.weight", "layer1.block0.attn.qkv.weight"),
    (without, "layer1.0.sam.conv3.bias", "layer1.block0.attn.qkv.bias"),
    (without, "layer2.1.sam.conv_p.bias", "layer2.block1.attn.position.bias"),
    (without, "layer3.0.sam.conv_w.3.running_mean", "layer3.block0.attn.norm2.running_mean"),
    (with_one_more, "conv5.weight", "conv5.weight"),
    (with_one_more, "conv_in.bias", "conv1.conv.bias"),
    (with_one_more, "bn5.weight", "bn5.weight"),
    (with_one_more, "layer5.0.bn1.weight", "layer5.0.bn1.weight"),
    (with_one_more, "layer1.7.bn1.weight", "layer1.block7.norm1.weight"),
    (with_one_more, "layer1.0.sam.conv4.weight", "conv4.weight"),
    (with_one_more, "layer1.0.sam.conv_w.2.bias", "layer1.block0.attn.conv1.bias"),
    (with_one_row_more, "conv2.weight", "layer2.proj.weight"),
    (with_one_row_more, "layer1.0.sam.conv1.weight", "layer1.block0.attn.qkv.weight"),
    (with_one_row_more, "layer1.0.sam.conv3.bias", "layer1.block0.attn.qkv.bias"),
    (with_one_column_more, "layer1.0.sam.conv2.weight", "layer1.block0.attn.qkv.weight"),
    (with_one_column_more, "layer4.0.conv.weight", "layer4.block0.conv.weight"),
])
def test_a_key_that_does_not_fit_is_reported(
        small: tuple[str, dict[str, torch.Tensor], Path],
        change: Callable[..., None],
        key: str,
        reported: str,
        loader: Callable[..., nn.Module],
) -> None:
    name, official, path = small
    change(official, key)
    with pytest.raises(RuntimeError, match=reported):
        loader(name, saved_by_the_authors(official, path))
