"""Tables and the chart of BENCHMARKS.md, from the results of tools/measure/benchmark.py in tools/measure/results/."""
from __future__ import annotations

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _sections import ROOT

from timm_gsa.commands._files import written_whole
from timm_gsa.models._families import FAMILIES

RESULTS = ROOT / 'tools' / 'measure' / 'results'
BASE = 'resnet50'
TEXTBOOK = ('unfold, einsum', 'plain', 'one-hot einsum', 'dense map', "torch's")  # names of textbook forms


@dataclass(frozen=True)
class Result:
    """One run of the benchmark."""

    machine: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, name: str) -> Result:
        return cls(**json.loads((RESULTS / f'{name}.json').read_text(encoding='utf-8')))

    def groups(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Rows by group and name, in their order."""
        groups: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            groups.setdefault(row['group'], {})[row['name']] = row
        return groups


def _times(ratio: float | None) -> str:
    return '' if ratio is None else f'{ratio:.2f}' if ratio < 10 else f'{ratio:.0f}'


def _rows_of(name: str) -> dict[str, dict[str, Any]]:
    """Rows of the models of a run by name, with speed over the textbook form and memory over the first row."""
    found: dict[str, dict[str, Any]] = {}
    for rows in Result.read(name).groups().values():
        first = next(iter(rows.values()))
        for key, row in rows.items():
            plain = rows.get(f'{key} plain')
            found.setdefault(key, {
                **row, 'memory': row['peak'] / first['peak'],
                'textbook': plain and plain['median'] / row['median'],
            })
    return found


def _models(found: dict[str, dict[str, Any]]) -> list[str]:
    prefixes = tuple(family.prefix for family in FAMILIES)
    return [name for name in found if name.startswith(prefixes) and not name.endswith(' plain')]


def cpu_models() -> str:
    """Inference and training on a CPU."""
    eager, others = _rows_of('cpu/inference'), [
        _rows_of(f'cpu/{name}') for name in ('inference_compiled', 'training', 'training_compiled')]
    lines = [
        '| model | ms | ours / textbook form | ours / timm resnet50 | compiled | training | training, compiled '
        '| peak memory / resnet50 |',
        '| --- ' + '| ---: ' * 7 + '|',
    ]
    for name in [*_models(eager), BASE]:
        row = eager[name if name != BASE else f'{BASE} eager']
        cells = [_times(each[name]['ratio'] if name in each else None) for each in others]
        lines.append(
            f'| `{name}` | {1e3 * row["median"]:.0f} | {_times(row["textbook"])} | {_times(row["ratio"])} | '
            + ' | '.join(cells) + f' | {row["memory"]:.2f} |')
    return '\n'.join(lines)


def gpu_models() -> str:
    """Inference on a GPU."""
    eager, compiled = _rows_of('h100/inference'), _rows_of('h100/inference_compiled')
    lines = [
        '| model | eager, ms | compiled, ms | eager, ours / timm resnet50 | compiled, ours / timm resnet50 |',
        '| --- | ---: | ---: | ---: | ---: |',
    ]
    for name in [*_models(eager), BASE]:
        cells = [f'{1e3 * each[name]["median"]:.1f}' if name in each else '' for each in (eager, compiled)]
        cells += [_times(each[BASE]['median'] / each[name]['median']) if name in each else ''
                  for each in (eager, compiled)]
        lines.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _over_textbook(result: Result) -> dict[tuple[str, str], dict[str, float]]:
    """Speed and memory of our operations over their textbook form, by operation and pass."""
    found = {}
    for group, rows in result.groups().items():
        plain = next((rows[name] for name in TEXTBOOK if name in rows), None)
        operation, _, what = group.rpartition(', ')
        if plain and 'ours' in rows:
            ours = rows['ours']
            found[operation, what] = {
                'ms': 1e3 * ours['median'],
                'speed': plain['median'] / ours['median'],
                'memory': ours['peak'] / plain['peak'],
            }
    return found


def operations() -> str:
    """One line for each operation on a CPU."""
    found = _over_textbook(Result.read('cpu/operations'))
    lines = [
        '| operation | forward, ms | forward | training step, ms | training step | peak memory, training step |',
        '| --- ' + '| ---: ' * 5 + '|',
    ]
    for operation in dict.fromkeys(operation for operation, _ in found):
        cells = []
        for what in ('forward', 'training'):
            each = found.get((operation, what))
            cells += [f'{each["ms"]:.1f}', _times(each['speed'])] if each else ['', '']
        training = found.get((operation, 'training'))
        cells.append(f'{training["memory"]:.2f}' if training else '')
        lines.append(f'| {operation} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def gpu_operations() -> str:
    """One line for each size of the aggregation on a GPU."""
    groups = Result.read('h100/operations').groups()
    lines = [
        '| aggregation | forward, ms | over unfold | over a global-memory loop | backward, ms | over unfold '
        '| over a global-memory loop |',
        '| --- ' + '| ---: ' * 6 + '|',
    ]
    for operation in dict.fromkeys(group.rpartition(', ')[0] for group in groups):
        cells = []
        for what in ('forward', 'backward'):
            rows = groups[f'{operation}, {what}']
            ours = rows['ours']['median']
            cells += [f'{1e3 * ours:.2f}', *(
                _times(rows[name]['median'] / ours) for name in ('unfold, einsum', 'global-memory loop, float32'))]
        lines.append(f'| {operation.removeprefix("aggregation ")} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def runs() -> str:
    """Commands of all runs."""
    lines = ['| file | command |', '| --- | --- |']
    for path in sorted(RESULTS.rglob('*.json')):
        name = path.relative_to(RESULTS).with_suffix('').as_posix()
        command = re.sub(r'^python tools/measure/| --json \S+', '', Result.read(name).machine['command'])
        lines.append(f'| {name} | `{command}` |')
    return '\n'.join(lines)


def draw_operations(path: Path) -> None:
    """Grouped chart: speed of each kind of operation over its textbook form, geometric mean of all sizes."""
    from matplotlib.figure import Figure

    bars: dict[tuple[str, str], list[float]] = {}
    for (operation, what), found in _over_textbook(Result.read('cpu/operations')).items():
        kind = re.sub(r',? \d+ x \d+.*', '', re.sub(r' of \d+ x \d+', '', operation))
        bars.setdefault((kind, what), []).append(found['speed'])
    kinds = list(dict.fromkeys(kind for kind, _ in bars))
    figure = Figure(figsize=(8, 3.4), layout='constrained')
    axes = figure.add_subplot()
    for number, what in enumerate(('forward', 'training')):
        places = [i + (number - 0.5) * 0.36 for i, kind in enumerate(kinds) if (kind, what) in bars]
        speeds = [statistics.geometric_mean(bars[kind, what]) for kind in kinds if (kind, what) in bars]
        axes.bar(places, speeds, 0.36, label={'forward': 'forward', 'training': 'training step'}[what])
    axes.set_yscale('log')
    axes.set_yticks([1, 2, 5, 10, 20, 50], ['1', '2', '5', '10', '20', '50'])
    axes.axhline(1, color='black', linewidth=0.8)
    axes.set_xticks(range(len(kinds)), [re.sub('(?<=[a-z])(?=[A-Z])', '\n', kind) for kind in kinds], fontsize=8)
    axes.set_ylabel('times faster than the textbook form')
    axes.grid(axis='y', alpha=0.3)
    axes.legend(fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format='png', dpi=100)


def speed() -> str:
    """The usual models over timm's ResNet-50, for the README."""
    eager, compiled = _rows_of('cpu/inference'), _rows_of('cpu/inference_compiled')
    gpu = {'eager': _rows_of('h100/inference'), 'compiled': _rows_of('h100/inference_compiled')}
    lines = ['| model | CPU | CPU, compiled | H100 | H100, compiled |', '| --- | ---: | ---: | ---: | ---: |']
    for name in (name for family in FAMILIES for name in family.usual if name in eager):
        cells = [_times(eager[name]['ratio']), _times(compiled[name]['ratio'])]
        cells += [_times(each[BASE]['median'] / each[name]['median']) if name in each else '' for each in gpu.values()]
        lines.append(f'| `{name}` | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)
