"""Compare runs of timm's train.py: a table with mean and spread over seeds, and the curves as a picture.

    python tools/measure/compare_runs.py output/comparison/* --plot curves.png --json figures.json

Runs of the same model with the same arguments and different seeds form one row. Its name is NAME if their folders are
NAME-seed0, NAME-seed1 and so on. The last epoch is compared, because the best epoch would be chosen on the test images.
Notes below the table list other settings in which the runs differ. Images per second of training are read from
train.log in a run's folder, which tools/measure/run_comparison.py writes.
"""
from __future__ import annotations

import argparse
import csv
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _runs import Run, network_of

import timm_gsa  # noqa: F401  registers the models where autoload is switched off
from timm_gsa.commands._cost import parameters_and_multiply_adds
from timm_gsa.commands._files import written_whole
from timm_gsa.commands.models import amount

# Arguments of train.py that do not change what is trained.
PLACE = {
    'data', 'data_dir', 'output', 'experiment', 'resume', 'seed', 'model', 'model_kwargs', 'device', 'device_modules',
    'workers', 'pin_mem', 'use_multi_epochs_loader', 'validation_batch_size', 'val_interval', 'log_interval',
    'checkpoint_hist', 'recovery_interval', 'torchcompile', 'torchcompile_mode', 'local_rank',
}


@dataclass
class Group:
    """Runs that differ only in their seeds.

    Attributes:
        name: Name of the row.
        runs: The runs.
        curves: Accuracy in percent after each epoch, for each run.
        parameters: Parameters of the network.
        multiply_adds: For one image.
        rates: Training images per second, of runs with a log.
    """

    name: str
    runs: list[Run]
    curves: list[dict[int, float]]
    parameters: int
    multiply_adds: int
    rates: list[float] = field(default_factory=list)

    @property
    def last(self) -> list[float]:
        """Accuracy of each run after its last epoch."""
        return [curve[max(curve)] for curve in self.curves]

    @property
    def epochs(self) -> list[int]:
        """Epochs of each run."""
        return [max(curve) + 1 for curve in self.curves]

    @property
    def mean(self) -> float:
        return statistics.mean(self.last)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of a run; None for a single run."""
        return statistics.stdev(self.last) if len(self.last) > 1 else None


def curve_of(run: Run, column: str = 'eval_top1') -> dict[int, float]:
    """A column of a run's summary.csv by epoch; the later value if an epoch was repeated.

    Raises:
        ValueError: There is no summary.csv, or it holds no epoch or no such column.
    """
    path = run.folder / 'summary.csv'
    if not path.is_file():
        raise ValueError(f'{run.folder} holds no summary.csv: no epoch was finished')
    curve: dict[int, float] = {}
    header: list[str] = []
    with path.open(encoding='utf-8', newline='') as file:
        for row in csv.reader(file):
            if row and row[0] == 'epoch':  # a resumed run may write the header again
                header = row
            elif len(row) == len(header) and column in header:
                curve[int(float(row[0]))] = float(row[header.index(column)])
    if not curve:
        raise ValueError(f'{path} holds no epoch with {column}')
    return curve


def rate_of(run: Run) -> float | None:
    """Images per second in training: median over the printed steps, because some include compilation."""
    path = run.folder / 'train.log'
    if not path.is_file():
        return None
    # Train: 7 [  38/39 (100%)]  Loss: 1.32 (1.19)  Time: 0.294s,  217.33/s  (1.559s,   41.04/s)  LR: ...
    log = path.read_text(encoding='utf-8', errors='replace')
    rates = re.findall(r'^Train: \d+ \[.*Time: [\d.]+s,\s*([\d.]+)/s', log, re.MULTILINE)
    return statistics.median(map(float, rates)) if rates else None


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs by network, in the order of the first run of each.

    Raises:
        ValueError: A run has no finished epoch, or two have one seed.
        RuntimeError: timm does not know a model.
    """
    by_network: dict[str, list[Run]] = {}
    for run in runs:
        size = run.args.get('input_size') or run.args.get('img_size')
        key = json.dumps([run.args['model'], run.model_args, size], sort_keys=True, default=str)
        by_network.setdefault(key, []).append(run)
    groups: list[Group] = []
    for members in by_network.values():
        seeds = [run.args.get('seed') for run in members]
        if len(set(seeds)) < len(seeds):
            folders = ', '.join(str(run.folder) for run in members)
            raise ValueError(f'runs of one network must differ in their seeds, got {seeds} in {folders}')
        first = members[0]
        overlay = {}
        if first.args.get('input_size'):
            overlay['input_size'] = tuple(first.args['input_size'])
        elif first.args.get('img_size'):
            overlay['input_size'] = (first.args.get('in_chans') or 3, first.args['img_size'], first.args['img_size'])
        cost = parameters_and_multiply_adds(
            first.args['model'], **first.model_args, **({'pretrained_cfg_overlay': overlay} if overlay else {}))
        kwargs = first.args.get('model_kwargs') or {}
        name = ' '.join([first.args['model'], *(f'{key}={value}' for key, value in kwargs.items())])
        names = [run.folder.name for run in members]
        called = {network_of(name) for name in names if network_of(name) != name}
        if len(called) == 1 and not called & {group.name for group in groups}:
            name = called.pop()
        rates = [rate for rate in map(rate_of, members) if rate is not None]
        groups.append(Group(
            name,
            members,
            [curve_of(run) for run in members],
            *cost,
            rates,
        ))
    return groups


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Settings in which runs differ, apart from network, seed and `PLACE`, with their values."""
    found = {}
    for key in sorted(set().union(*(run.args for run in runs)) - PLACE):
        values: list[Any] = []
        for run in runs:
            if run.args.get(key) not in values:
                values.append(run.args.get(key))
        if len(values) > 1:
            found[key] = values
    return found


def table(groups: Sequence[Group]) -> str:
    """Markdown table with one row for each network, and notes below."""
    lines = [
        '| network | parameters | multiply-adds | top-1 after the last epoch | lowest to highest | runs | epochs '
        '| images/s in training |',
        '| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |',
    ]
    for group in groups:
        spread = '' if group.deviation is None else f' ± {group.deviation:.2f}'
        extremes = f'{min(group.last):.2f} to {max(group.last):.2f}' if len(group.last) > 1 else ''
        epochs = '–'.join(str(n) for n in sorted({min(group.epochs), max(group.epochs)}))
        rate = f'{statistics.median(group.rates):,.0f}' if group.rates else ''
        lines.append(
            f'| {group.name} | {group.parameters:,} | {amount(group.multiply_adds)} | {group.mean:.2f}{spread} '
            f'| {extremes} | {len(group.runs)} | {epochs} | {rate} |')
    notes = ['Mean ± standard deviation of runs with different seeds.']
    if len({n for group in groups for n in group.epochs}) > 1:
        notes.append('The runs do not have the same number of epochs.')
    for key, values in differences([run for group in groups for run in group.runs]).items():
        notes.append(f'The runs differ in `{key}`: {", ".join(map(str, values))}.')
    return '\n'.join(lines) + '\n\n' + '\n'.join(notes)


def draw(groups: Sequence[Group], path: Path) -> None:
    """Accuracy over epochs: the mean of each network as a line, its runs from lowest to highest as a band."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.add_subplot()
    for number, group in enumerate(groups):
        epochs = sorted(set.intersection(*(set(curve) for curve in group.curves)))
        values = [[curve[epoch] for curve in group.curves] for epoch in epochs]
        done = [epoch + 1 for epoch in epochs]
        style: dict[str, Any] = dict(color=f'C{number % 10}')
        means = [statistics.mean(each) for each in values]
        axes.plot(done, means, '-' if number < 10 else '--', label=group.name, linewidth=1.4, **style)
        axes.fill_between(done, [min(each) for each in values], [max(each) for each in values], alpha=0.15, **style)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel('epochs')
    axes.set_ylabel('top-1 in %')
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with written_whole(path) as temporary:
        figure.savefig(temporary, format='png', dpi=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the runs of a command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    parser.add_argument('runs', metavar='DIR', nargs='+', type=Path, help='output folder of a run of train.py')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the figures there')
    parser.add_argument('--plot', type=Path, metavar='FILE', help='draw the curves there (needs matplotlib)')
    args = parser.parse_args(argv)
    try:
        groups = grouped([Run.of(folder) for folder in args.runs])
    except (RuntimeError, ValueError, OSError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    print(table(groups))
    if args.json:
        report = [
            dict(
                name=group.name,
                model=group.runs[0].args['model'],
                model_args=group.runs[0].model_args,
                parameters=group.parameters,
                multiply_adds=group.multiply_adds,
                mean=group.mean,
                deviation=group.deviation,
                rates=group.rates,
                runs=[
                    dict(folder=run.folder.name, seed=run.args.get('seed'), top1=curve[max(curve)], curve=curve)
                    for run, curve in zip(group.runs, group.curves, strict=True)
                ],
            )
            for group in groups
        ]
        with written_whole(args.json) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + '\n')
    if args.plot:
        draw(groups, args.plot)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
