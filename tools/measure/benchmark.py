"""Time operations and models of this package, their textbook forms and timm's models.

    python tools/measure/benchmark.py operations
    python tools/measure/benchmark.py inference --compile --json inference.json --plot inference.png
    python tools/measure/benchmark.py training --models gsa_resnet50 priorattn_resnet50 --batch-size 4
    python tools/measure/benchmark.py scaling --img-sizes 128 224 448
    python tools/measure/benchmark.py layers

The rows of a group run in turn, round after round, in one process, so that other load affects all of them. Compare
ratios, not times, unless nothing else uses the GPU. Weights are random, because speed does not depend on them.

On a CUDA device the aggregation is also compared with the form of the paper's own kernels (_global_loop.py), and so are
SAN models. There the time of our kernels is also given relative to a copy of the bytes that have to be moved. `profile`
lists the kernels of a training step by time. `layers` compares the attention layers of gsa_resnet50 with the 3 x 3
convolutions that they replace and, on a CPU, with their matrix products alone, a lower bound of their time.
"""
from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler, which counts memory, writes to the terminal

import timm
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import timm_gsa
from timm_gsa import layers, ops
from timm_gsa.commands._files import written_whole
from timm_gsa.commands._inputs import positive
from timm_gsa.layers import _pool, san_attention
from timm_gsa.models._families import FAMILIES
from timm_gsa.ops import pooling
from timm_gsa.ops.gsa import reference as gsa_reference
from timm_gsa.ops.san import reference as san_reference

OURS = tuple(name for family in FAMILIES for name in family.usual)
PEERS = ('halonet26t', 'botnet26t_256', 'lambda_resnet26t')
BASE = 'resnet50'
DTYPES = {name: getattr(torch, name) for name in ('float32', 'bfloat16', 'float16', 'float64')}

# Stages of SAN at 224 px: channels of the values, side of the map, places a side.
STAGES = ((16, 112, 3), (64, 56, 7), (128, 28, 7), (256, 14, 7), (512, 7, 7))


@dataclass
class Row:
    """One line of the table.

    Attributes:
        group: Name of the comparison; the first row of a group is the base of `ratio`.
        name: Name of the form or model.
        seconds: Time of each round.
        peak: Most bytes allocated beyond those before the call.
        ratio: Median time of the group's first row over that of this row; above 1 is faster.
        bound: Time of the kernels on a GPU over the time of a copy of the bytes that have to be moved, if known.
    """

    group: str
    name: str
    seconds: list[float] = field(default_factory=list)
    peak: int = 0
    ratio: float = 1.
    bound: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median."""
        if len(self.seconds) < 2:
            return 0.
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


@dataclass(frozen=True)
class Setting:
    """Device, dtype, layout and mode of a run."""

    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    compiled: bool
    rounds: int
    fused: bool = False

    def images(self, batch: int, size: int) -> torch.Tensor:
        return self.laid_out(torch.randn(batch, 3, size, size, device=self.device, dtype=self.dtype))

    def laid_out(self, x: torch.Tensor) -> torch.Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def model(self, name: str, size: int) -> Any:
        """A model, built for images of this size if it takes `img_size`."""
        torch.manual_seed(0)
        sized = ('botnet', 'lambda', *(family.prefix for family in FAMILIES if family.sized))
        tied = {'img_size': size} if name.startswith(sized) else {}
        model = timm.create_model(name, **tied).to(self.device, self.dtype)
        if self.fused:
            model = timm_gsa.fuse(model.eval())
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def code(self, function: Callable[..., Any]) -> Callable[..., Any]:
        # dynamic=False: torch would compile one graph for all sizes after it has seen the second.
        return torch.compile(function, dynamic=False) if self.compiled else function


def takes(name: str, size: int) -> bool:
    """True if a model takes images of this size: halonet needs maps of stride 32 divisible by 8."""
    return not name.startswith('halonet') or size % 256 == 0


@dataclass(frozen=True)
class Moving:
    """A call and the bytes that it has to move at least."""

    run: Callable[[], Any]
    least: int

    def __call__(self) -> Any:
        return self.run()


def least_bytes(batch: int, channels: int, side: int, kernel_size: int, itemsize: int) -> dict[str, int]:
    """Bytes of all inputs and outputs of an aggregation in which 8 channels share a weight."""
    value, weight = channels, channels // 8 * kernel_size ** 2
    forward, backward = 2 * value + weight, 3 * value + 2 * weight
    pixel = batch * side ** 2 * itemsize
    return {'forward': forward * pixel, 'backward': backward * pixel, 'training': (forward + backward) * pixel}


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Context in which our layers use the textbook forms: unfold, one-hot products, dense maps."""
    with timm_gsa.use_backend('reference'):
        yield


@contextlib.contextmanager
def replaced(*functions: tuple[Any, str, Any]) -> Iterator[None]:
    """Context in which attributes of modules or types are replaced."""
    before = [getattr(module, name) for module, name, _ in functions]
    for module, name, function in functions:
        setattr(module, name, function)
    try:
        yield
    finally:
        for (module, name, _), function in zip(functions, before, strict=True):
            setattr(module, name, function)


def plainly(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with textbook forms, never compiled."""
    def inside() -> Any:
        with plain():
            return run()
    return inside


def global_loop() -> Any:
    """Aggregation in the form of the paper's own kernels; needs Triton."""
    import _global_loop

    return _global_loop.aggregation


def with_global_loop(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same call with aggregations by `global_loop`."""
    def inside() -> Any:
        with replaced((san_attention, 'aggregation', global_loop())):
            return run()
    return inside


def has_global_loop(device: torch.device) -> bool:
    return device.type == 'cuda' and importlib.util.find_spec('triton') is not None


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak of allocated bytes during a call, beyond those before it."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    held = most = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == '[memory]']
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Duration of one call, on a GPU until it is done there."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def kernels_seconds(run: Callable[[], Any]) -> float:
    """Time of the kernels of one call on a GPU, without gaps between them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


@functools.cache
def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy on a GPU reads and writes."""
    source = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 2 ** 30 / min(kernels_seconds(lambda: target.copy_(source)) for _ in range(5))


def measure(
        group: str,
        runs: dict[str, Callable[[], Any]],
        setting: Setting,
        progress: Any,
        deadline: float = float('inf'),
) -> list[Row]:
    """Rows of a group: peak memory once, then the time of each in turn, round after round.

    Rows that run out of GPU memory or would start after the deadline are left out.
    """
    rows: dict[str, Row] = {}
    for name, run in runs.items():
        if rows and time.monotonic() > deadline:
            tqdm.write(f'{group}: no time left for {name}', file=sys.stderr)
            continue
        row = Row(group, name)
        try:
            run()  # compiles, and chooses algorithms
            row.peak = peak_bytes(run, setting.device)
        except torch.OutOfMemoryError:
            tqdm.write(f'{group}: out of memory in {name}', file=sys.stderr)
            continue
        finally:
            progress.update()
        if isinstance(run, Moving) and setting.device.type == 'cuda':
            row.bound = statistics.median(kernels_seconds(run) for _ in range(5)) / (
                run.least / bandwidth(setting.device))
        rows[name] = row
    for turn in range(setting.rounds):
        if turn and time.monotonic() > deadline:
            break
        for name in rows:
            rows[name].seconds.append(seconds(runs[name], setting.device))
        progress.update()
    for row in rows.values():
        row.ratio = next(iter(rows.values())).median / row.median
    return list(rows.values())


Groups = dict[str, Callable[[], dict[str, Callable[[], Any]]]]


def stepped(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Forward and backward pass of an operation or layer."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    grad: torch.Tensor | None = None  # of the output, and laid out as it: that of a sum would be one number, expanded

    def run() -> Any:
        nonlocal grad
        out = function(*inputs)
        if grad is None:
            grad = torch.randn_like(out)
        return torch.autograd.grad(out, [*inputs, *parameters], grad)

    return run


def backward(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Backward pass of an operation alone."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def inferred(function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> Callable[[], Any]:
    """Forward pass without gradients."""
    def run() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


LABELS: dict[Any, str] = {inferred: 'forward', backward: 'backward', stepped: 'training'}


def operation_groups(setting: Setting, batch: int) -> Groups:
    """Each operation beside its plain formulation, the Gaussian beside a 3 x 3 convolution; forward and training."""
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=setting.device, dtype=setting.dtype)

    def aggregation(channels: int, side: int, kernel_size: int, way: Any) -> dict[str, Callable[[], Any]]:
        value = setting.laid_out(random(batch, channels, side, side))
        weight = random(batch, channels // 8, kernel_size ** 2, side, side)
        least = least_bytes(batch, channels, side, kernel_size, value.element_size())[LABELS[way]]
        # A compiled graph is freed by its backward pass, of which the kernels are the same.
        code = setting.code if way is not backward else lambda function: function

        def ours(weight: torch.Tensor) -> Moving:
            return Moving(way(code(lambda v, w: ops.aggregation(v, w, kernel_size)), (value, weight)), least)

        runs = {'unfold, einsum': way(lambda v, w: san_reference.aggregation(v, w, kernel_size), (value, weight))}
        if has_global_loop(setting.device):
            single = value.float().contiguous(), weight.float()
            runs['global-memory loop, float32'] = way(lambda v, w: global_loop()(v, w, kernel_size), single)
        if setting.channels_last:
            innermost = weight.permute(0, 3, 4, 2, 1).contiguous().permute(0, 4, 3, 1, 2)
            if setting.device.type == 'cuda':  # what a 1 x 1 convolution gives whose output is not put in order
                places = weight.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
                runs['ours, places innermost'] = ours(places)
            weight = innermost
        runs['ours'] = ours(weight)
        return runs

    def position(side: int, channels: int, way: Any) -> dict[str, Callable[[], Any]]:
        query, value = (random(batch, 8, channels // 8, side, side) for _ in range(2))
        table = random(2 * side - 1, channels // 8)

        def both(column: Any, row: Any) -> Callable[..., torch.Tensor]:
            return lambda q, v, t: row(q, column(q, v, t), t)

        def row_reference(q: torch.Tensor, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return gsa_reference.column_attention(q.transpose(-1, -2), v.transpose(-1, -2), t).transpose(-1, -2)

        inputs = (query, value, table)
        return {
            'one-hot einsum': way(both(gsa_reference.column_attention, row_reference), inputs),
            'ours': way(setting.code(both(ops.column_attention, ops.row_attention)), inputs),
        }

    def module(kind: Callable[..., nn.Module], dim: int, side: int, way: Any) -> dict[str, Callable[[], Any]]:
        layer = kind(dim).to(setting.device, setting.dtype).train(way is stepped)
        inputs = (setting.laid_out(random(batch, dim, side, side)),)
        return {'plain': plainly(way(layer, inputs)), 'ours': way(setting.code(layer), inputs)}

    def gaussian(channels: int, side: int, way: Any) -> dict[str, Callable[[], Any]]:
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False).to(setting.device, setting.dtype)
        inputs = (setting.laid_out(random(batch, channels, side, side)),)
        radius = torch.ones((), device=setting.device, dtype=setting.dtype, requires_grad=True)
        return {
            '3 x 3 convolution': way(conv, inputs),
            'dense map': way(lambda x: ops.gaussian_attention_reference(x, radius), inputs),
            'ours': way(setting.code(lambda x: ops.gaussian_attention(x, radius)), inputs),
        }

    def pool(torchs: Any, ours: Any, channels: int, side: int) -> dict[str, Callable[[], Any]]:
        inputs = (setting.laid_out(random(batch, channels, side, side)),)
        return {"torch's": inferred(torchs, inputs), 'ours': inferred(setting.code(ours), inputs)}

    groups: Groups = {}
    for way, label in LABELS.items():
        if way is backward and setting.device.type != 'cuda':
            continue
        for channels, side, kernel_size in STAGES:
            groups[f'aggregation {side} x {side}, {channels} channels, {label}'] = partial(
                aggregation, channels, side, kernel_size, way)
    for way, label in LABELS.items():
        if way is backward:
            continue
        for kind in (layers.PatchwiseAttention, layers.PairwiseAttention):
            for channels, side, kernel_size in STAGES[1:]:
                groups[f'{kind.__name__} {side} x {side}, {4 * channels} channels, {label}'] = partial(
                    module, partial(kind, kernel_size=kernel_size), 4 * channels, side, way)
        for channels, side in ((64, 56), (128, 28), (256, 14), (512, 7)):
            groups[f'GlobalSelfAttention {side} x {side}, {channels} channels, {label}'] = partial(
                module, partial(layers.GlobalSelfAttention, feat_size=side), channels, side, way)
            groups[f'GSA position {side} x {side}, {channels} channels, {label}'] = partial(
                position, side, channels, way)
        for channels, side in ((80, 56), (160, 28), (320, 14), (640, 7)):
            groups[f'SparseMLP {side} x {side}, {channels} channels, {label}'] = partial(
                module, partial(layers.SparseMLP, feat_size=side), channels, side, way)
        for channels, side in ((128, 28), (256, 14), (512, 7)):
            groups[f'Gaussian {side} x {side}, {channels} channels, {label}'] = partial(gaussian, channels, side, way)
    if setting.device.type == 'cpu':  # elsewhere they are torch's
        average = nn.AvgPool2d(3, 2, padding=1, count_include_pad=False)
        for window, what, torchs, ours, channels, side in (
            (3, 'max', nn.MaxPool2d(3, 2, 1), _pool.OverlappingMaxPool(), 64, 112),
            (2, 'max', nn.MaxPool2d(2), _pool.HalvingMaxPool(), 64, 112),
            (3, 'average', average, pooling.overlapping_average_pool, 128, 56),
        ):
            groups[f'{what} pool of {window} x {window}, {side} x {side}, {channels} channels, forward'] = partial(
                pool, torchs, ours, channels, side)
    return groups


def model_groups(
        setting: Setting,
        batch: int,
        size: int,
        names: Sequence[str],
        training: bool,
        references: bool = True,
) -> Groups:
    """Models beside the first, which never runs compiled; ours also in plain formulations, which are `references`."""
    def runs() -> dict[str, Callable[[], Any]]:
        result: dict[str, Callable[[], Any]] = {}
        contiguous = Setting(setting.device, setting.dtype, False, False, setting.rounds)
        base = names[0]
        result[f'{base} eager'] = model_run(contiguous, contiguous.model(base, size), batch, size, training)
        compared: dict[str, Callable[[], Any]] = {}
        for name in names:
            model = setting.model(name, size)
            if name != base or setting.compiled or setting.channels_last or setting.fused:
                result[name] = model_run(setting, model, batch, size, training)
            if not references:
                continue
            if any(type(module).__module__.startswith('timm_gsa.layers') for module in model.modules()):
                run = model_run(contiguous, contiguous.model(name, size), batch, size, training)
                compared[f'{name} plain'] = plainly(run)
            if name.startswith('san') and has_global_loop(setting.device):
                single = Setting(setting.device, torch.float32, False, False, setting.rounds)
                run = model_run(single, single.model(name, size), batch, size, training)
                compared[f'{name} with the global-memory loop, float32'] = with_global_loop(run)
        result |= compared  # last, as they may take the time or memory that there is
        return result

    return {f'{"training step" if training else "inference"}, {size} px, batch {batch}': runs}


def model_run(setting: Setting, model: Any, batch: int, size: int, training: bool) -> Callable[[], Any]:
    images = setting.images(batch, size)
    code = setting.code(model.train(training))
    if not training:
        return inferred(code, (images,))
    target = torch.randint(model.num_classes, (batch,), device=setting.device)

    def step() -> None:
        F.cross_entropy(code(images).float(), target).backward()
        model.zero_grad(set_to_none=True)

    return step


def scaling_groups(
        setting: Setting,
        batch: int,
        batches: Sequence[int],
        size: int,
        sizes: Sequence[int],
        names: Sequence[str],
) -> Groups:
    """Inference over the size of the images and over their number; models that are tied to a size are built for it."""
    def runs(batch: int, size: int) -> dict[str, Callable[[], Any]]:
        return {
            name: model_run(setting, setting.model(name, size), batch, size, False)
            for name in names if takes(name, size)}

    settings = [(batch, size) for size in sizes] + [(batch, size) for batch in batches]
    return {
        f'inference, {size} px, batch {batch}': partial(runs, batch, size) for batch, size in dict.fromkeys(settings)}


def layer_groups(setting: Setting, batch: int, size: int) -> Groups:
    """Each kind of attention layer in gsa_resnet50, so many of it as its name begins with."""
    counts: Counter[tuple[int, int, int]] = Counter()
    model = setting.model('gsa_resnet50', size)
    for module in model.modules():
        if isinstance(module, layers.GlobalSelfAttention):
            module.register_forward_pre_hook(
                lambda layer, inputs: counts.update([(layer.dim, inputs[0].shape[-1], layer.stride)]))
    inferred(model.eval(), (setting.images(1, size),))()

    def layer(channels: int, side: int, stride: int, way: Any) -> dict[str, Callable[[], Any]]:
        x = setting.laid_out(torch.randn(batch, channels, side, side, device=setting.device, dtype=setting.dtype))
        convolution = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        attention = layers.GlobalSelfAttention(channels, side, stride=stride)
        code, ours = (
            module.to(setting.device, setting.dtype).train(way is stepped) for module in (convolution, attention))
        if setting.channels_last:
            code, ours = (module.to(memory_format=torch.channels_last) for module in (code, ours))
        runs = {'3 x 3 convolution': way(code, (x,)), 'ours': way(setting.code(ours), (x,))}
        if setting.device.type == 'cpu':
            count, products = products_of(way(ours, (x,)))
            if way is stepped:
                count += 9 * channels * x.numel()
                products = both(products, projection(attention, x))
            runs[f'its matrix products alone, {count / 1e9:.2f} G multiply-adds'] = products
        return runs

    def projection(attention: layers.GlobalSelfAttention, x: torch.Tensor) -> Callable[[], Any]:
        """Of a training step, which computes it by convolutions."""
        x = x.detach().requires_grad_()
        grads = [torch.randn_like(part) for part in attention.project(x)]
        return lambda: torch.autograd.grad(attention.project(x), (x, *attention.qkv.parameters()), grads)

    def both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: (first(), second())

    return {
        f'{count} at {side} x {side}, {channels} channels, stride {stride}, {LABELS[way]}':
        partial(layer, channels, side, stride, way)
        for way in (inferred, stepped) for (channels, side, stride), count in counts.items()
    }


def products_of(run: Callable[[], Any]) -> tuple[int, Callable[[], None]]:
    """Multiply-adds in the matrix products of a call, and these products alone, into the memory that they were in.

    Products that torch's own gradients are made of do not show, as those of a training step on small maps.
    """
    calls: list[partial[torch.Tensor]] = []
    count = 0

    def recorded(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def product(*factors: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
            nonlocal count
            count += factors[-2].numel() * factors[-1].shape[-1]
            if len(factors) == 3:  # which it is added to
                calls.append(partial(function, *factors))
                return function(*factors)
            out = function(*factors, out=out)
            calls.append(partial(function, *factors, out=out))
            return out

        return product

    with replaced(
        (torch, 'mm', recorded(torch.mm)),
        (torch, 'bmm', recorded(torch.bmm)),
        (torch.Tensor, 'baddbmm_', recorded(torch.Tensor.baddbmm_)),
    ):
        run()

    def products() -> None:
        with torch.no_grad():
            for call in calls:
                call()

    return count, products


def totals(rows: Sequence[Row]) -> list[Row]:
    """All layers of a kind of run together, from `layer_groups`, which name their number first."""
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    for row in rows:
        label = row.group.rpartition(', ')[2]
        sums[label, row.name.partition(',')[0]] += int(row.group.partition(' ')[0]) * row.median
    found = [Row(f'all, {label}', name, [total]) for (label, name), total in sums.items()]
    for row in found:
        row.ratio = next(other for other in found if other.group == row.group).median / row.median
    return found


def profiled(setting: Setting, name: str, batch: int, size: int) -> str:
    """Which kernels, or operators of the CPU, a training step of a model spends most of its time in."""
    step = model_run(setting, setting.model(name, size), batch, size, True)
    for _ in range(3):
        step()
    gpu = setting.device.type == 'cuda'
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        step()
        if gpu:
            torch.cuda.synchronize()
    key = 'self_device_time_total' if gpu else 'self_cpu_time_total'
    return profile.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=70)


def small_step_seconds() -> float:
    """What the threads of a CPU need for a small step together: more if their cores share no cache."""
    numbers = torch.zeros(2 ** 16)
    step = partial(torch.add, numbers, 1, out=torch.empty_like(numbers))
    return statistics.median(seconds(step, numbers.device) for _ in range(300))


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    related = any(row.bound is not None for row in rows)
    more = (' kernels over least bytes |', ' ---: |') if related else ('', '')
    lines = [
        '| what | | ms (median, half the distance of the quartiles) | faster by | peak MB | of the first |' + more[0],
        '| --- | --- | ---: | ---: | ---: | ---: |' + more[1],
    ]
    first = rows[0]
    for row in rows:
        if row.group != first.group:
            first = row
        lines.append(
            f'| {row.group if row is first else ""} | {row.name} | {1e3 * row.median:.1f} ± {100 * row.spread:.0f} % '
            f'| {row.ratio:.2f} | {row.peak / 1e6:.1f} | {row.peak / max(first.peak, 1):.2f} |'
            + ('' if not related else ' |' if row.bound is None else f' {row.bound:.2f} |'))
    return '\n'.join(lines)


def machine(setting: Setting) -> dict[str, Any]:
    """What the figures were measured on and with."""
    name = torch.cuda.get_device_name(setting.device) if setting.device.type == 'cuda' else platform.processor()
    return dict(
        device=name or platform.machine(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
        timm_gsa=timm_gsa.__version__,
        dtype=str(setting.dtype).removeprefix('torch.'),
        channels_last=setting.channels_last,
        compiled=setting.compiled,
        fused=setting.fused,
        rounds=setting.rounds,
        **(
            {'copied_GB_per_s': round(bandwidth(setting.device) / 1e9)} if setting.device.type == 'cuda'
            else {'small_step_us': round(1e6 * small_step_seconds(), 1)}
        ),
        command=' '.join(['python', 'tools/measure/benchmark.py', *sys.argv[1:]]),
    )


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each row: how much faster than the first of its group, on a logarithmic axis."""
    from matplotlib.figure import Figure

    labels = [f'{row.group}: {row.name}' for row in rows]
    figure = Figure(figsize=(10, 0.28 * len(rows) + 1), layout='constrained')
    axes = figure.add_subplot()
    axes.barh(range(len(rows)), [row.ratio for row in rows], color=['grey' if row.ratio == 1 else 'C0' for row in rows])
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale('log')
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xlabel('faster than the first of its group by')
    for i, row in enumerate(rows):
        axes.annotate(f' {row.ratio:.2f}', (row.ratio, i), fontsize=7, va='center')
    with written_whole(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)


def draw_growth(rows: Sequence[Row], path: Path) -> None:
    """Time and memory of every model over the side of the images, and over the batch, on logarithmic axes."""
    from matplotlib.figure import Figure

    points: list[tuple[int, int, Row]] = []
    for row in rows:
        side, batch = map(int, re.findall(r'\d+', row.group))
        points.append((side, batch, row))
    [(usual_side, _)] = Counter(side for side, _, _ in points).most_common(1)
    [(usual_batch, _)] = Counter(batch for _, batch, _ in points).most_common(1)
    over_side = [(side, row) for side, batch, row in points if batch == usual_batch]
    over_batch = [(batch, row) for side, batch, row in points if side == usual_side]
    colours = {name: f'C{number}' for number, name in enumerate(dict.fromkeys(row.name for row in rows))}
    figure = Figure(figsize=(9, 6.5), layout='constrained')
    quantities: dict[str, Callable[[Row], float]] = {
        'seconds': lambda row: row.median, 'peak memory, MB': lambda row: row.peak / 1e6}
    for line, (what, of) in enumerate(quantities.items()):
        for column, (label, among) in enumerate((('side of the image, px', over_side), ('batch', over_batch))):
            axes = figure.add_subplot(2, 2, 2 * line + column + 1)
            for name in dict.fromkeys(row.name for _, row in among):
                curve = sorted((x, of(row)) for x, row in among if row.name == name)
                axes.plot(*zip(*curve, strict=True), marker='o', markersize=4, color=colours[name], label=name)
            sizes = sorted({x for x, _ in among})
            low, high = sizes[0], sizes[-1]
            start = min(of(row) for x, row in among if x == low)
            for power, style in ((2, ':'), (3, '--'), (4, '-.')) if column == 0 else ((1, ':'),):
                line_style: dict[str, Any] = dict(linestyle=style, color='grey', linewidth=0.8, label=f'slope {power}')
                axes.plot([low, high], [start, start * (high / low) ** power], **line_style)
            axes.set_xscale('log')
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.set_yscale('log')
            axes.set_xlabel(label)
            axes.set_ylabel(what)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside right upper', fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what a command line asks for, print the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or '').partition('\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('what', choices=('operations', 'inference', 'training', 'scaling', 'layers', 'profile'))
    parser.add_argument('--models', nargs='+', default=list(OURS + PEERS), help='of ours and others')
    parser.add_argument('--base', default=BASE, help='model that the others are related to')
    parser.add_argument('--only', metavar='TEXT', default='', help='groups with this text in their name')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--dtype', choices=DTYPES, default='float32')
    parser.add_argument('--channels-last', action='store_true', help='for all but the first of a group and plain forms')
    parser.add_argument('--compile', action='store_true', help='for all but the first of a group and plain forms')
    parser.add_argument('--fuse', action='store_true', help='fold norms, in the same ones, for inference')
    parser.add_argument('--no-references', action='store_true', help='no models in plain formulations')
    parser.add_argument('--batch-size', type=positive, default=8)
    parser.add_argument('--img-size', type=positive, default=224)
    parser.add_argument('--img-sizes', type=positive, nargs='+', default=[128, 224, 448, 1024], help='of scaling')
    parser.add_argument('--batch-sizes', type=positive, nargs='+', default=[1, 2, 4, 8, 16], help='of scaling')
    parser.add_argument('--rounds', type=positive, default=7)
    parser.add_argument('--seconds', type=positive, help='start nothing new after so long')
    parser.add_argument('--threads', type=positive, help='of the CPU; what torch chooses if not given')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw ratios, or growth, there (needs matplotlib)')
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # every block is a graph of its own
    if args.fuse and args.what not in ('inference', 'scaling'):
        parser.error(f'argument --fuse: for inference and scaling, not {args.what}')
    setting = Setting(
        torch.device(args.device), DTYPES[args.dtype], args.channels_last, args.compile, args.rounds, args.fuse)
    deadline = time.monotonic() + (args.seconds or float('inf'))
    models = [
        name for name in args.models if args.what in ('operations', 'scaling', 'layers') or takes(name, args.img_size)]
    for name in sorted(set(args.models).difference(models)):
        tqdm.write(f'{name} is left out: it takes no images of {args.img_size} px', file=sys.stderr)
    if args.what == 'profile':
        for name in models:
            if time.monotonic() <= deadline:
                print(f'{name}\n{profiled(setting, name, args.batch_size, args.img_size)}\n', flush=True)
        return 0
    if args.what == 'operations':
        groups = operation_groups(setting, args.batch_size)
    elif args.what == 'layers':
        groups = layer_groups(setting, args.batch_size, args.img_size)
    elif args.what == 'scaling':
        groups = scaling_groups(
            setting, args.batch_size, args.batch_sizes, args.img_size, args.img_sizes, (args.base, *models))
    else:
        groups = model_groups(
            setting, args.batch_size, args.img_size, (args.base, *models), args.what == 'training',
            not args.no_references)
    groups = {name: group for name, group in groups.items() if args.only in name}
    if not groups:
        parser.error(f'argument --only: no group has {args.only!r} in its name')

    rows: list[Row] = []
    with tqdm(desc=args.what, unit='run', disable=None) as progress:
        for name, group in groups.items():
            if rows and time.monotonic() > deadline:
                break
            progress.set_postfix_str(name)
            rows += measure(name, group(), setting, progress, deadline)
            gc.collect()
            if args.json:  # after every group, as whoever waits for figures may not wait for all
                report = dict(machine=machine(setting), rows=[
                    {**asdict(row), 'median': row.median, 'spread': row.spread} for row in rows])
                with written_whole(args.json) as temporary:
                    temporary.write_text(json.dumps(report, indent=1) + '\n')
    if args.what == 'layers':
        rows += totals(rows)
    print(table(rows))
    print('\n' + ', '.join(f'{key} {value}' for key, value in machine(setting).items()))
    if args.plot:
        (draw_growth if args.what == 'scaling' else draw)(rows, args.plot)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
