"""Print the generated parts of README.md and BENCHMARKS.md, or check or renew them.

    python tools/checks/tables.py            # print
    python tools/checks/tables.py --check    # exit 1 where a file holds something else
    python tools/checks/tables.py --write    # put them into their files
    python tools/checks/tables.py --check --chart tools/figures/operations.png    # draw the chart of operations, too

They are made from the registry, the records of the families and the recorded results.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import _benchmarks
import timm
from _sections import ROOT, Section, add_modes, settle

import timm_gsa
from timm_gsa.commands._cost import parameters_and_multiply_adds
from timm_gsa.commands.models import amount, registered
from timm_gsa.models._families import FAMILIES, family_of

README, BENCHMARKS = ROOT / 'README.md', ROOT / 'BENCHMARKS.md'


def models() -> str:
    """One row for each registered model and one for the tiny baseline; figures not read at the source in a note."""
    results = json.loads((Path(timm_gsa.__file__).parent / 'weights' / 'c100.json').read_text())['models']
    rows = [
        '| model | input | parameters | multiply-adds | ImageNet-1k top-1, paper | CIFAR-100 top-1, here |',
        '| --- | ---: | ---: | ---: | ---: | ---: |',
    ]
    for name in registered():
        family = family_of(name)
        reported = f'{family.reported[name]:.1f}' if family.reported_confirmed and name in family.reported else ''
        size = timm.get_pretrained_cfg(name).input_size[-1]
        rows.append(_row(f'`{name}`', size, parameters_and_multiply_adds(name), reported, results.get(f'{name}.c100')))
    baseline = results['baseline']
    size = timm.get_pretrained_cfg('gsa_resnet_tiny').input_size[-1]
    cost = parameters_and_multiply_adds(
        baseline['model'], num_classes=100, pretrained_cfg_overlay=dict(input_size=(3, size, size)),
        **baseline['model_kwargs'])
    rows.append(_row('timm ResNet of the shape of `gsa_resnet_tiny`', size, cost, '', baseline))
    notes = []
    for family in FAMILIES:
        if family.reported and family.reported_confirmed:
            notes.append(f'Figures of {family.title} are from {family.reported_status}.')
        elif family.reported:
            figures = ', '.join(f'`{name}` {top1:.1f}' for name, top1 in family.reported.items())
            notes.append(f'{family.title}: {figures} ({family.reported_status}).')
    return '\n'.join([*rows, '', 'Papers, ImageNet-1k top-1 in percent: ' + ' '.join(notes)])


def _row(name: str, size: int, cost: tuple[int, int], reported: str, measured: dict | None) -> str:
    accuracy = f'{measured["top1"]:.2f}' if measured else ''
    return f'| {name} | {size} | {cost[0]:,} | {amount(cost[1])} | {reported} | {accuracy} |'


def provenance() -> str:
    """What is verified of each family and what is our choice."""
    rows = ['| family | paper | verified | our choice |', '| --- | --- | --- | --- |']
    for family in FAMILIES:
        paper = f'[{family.arxiv}](https://arxiv.org/abs/{family.arxiv})'
        if family.code:
            paper += f', [code]({family.code})'
        rows.append(f'| {family.title} | {paper} | {family.verified} | {family.ours} |')
    return '\n'.join(rows)


def citations() -> str:
    """BibTeX of the papers."""
    return '\n'.join(['```bibtex', *(family.bibtex for family in FAMILIES), '```'])


SECTIONS: dict[Section, Callable[[], str]] = {
    Section(README, 'models'): models,
    Section(README, 'families'): provenance,
    Section(README, 'speed'): _benchmarks.speed,
    Section(README, 'citations'): citations,
    Section(BENCHMARKS, 'models on a CPU'): _benchmarks.cpu_models,
    Section(BENCHMARKS, 'models on a GPU'): _benchmarks.gpu_models,
    Section(BENCHMARKS, 'operations on a CPU'): _benchmarks.operations,
    Section(BENCHMARKS, 'operations on a GPU'): _benchmarks.gpu_operations,
    Section(ROOT / 'tools' / 'measure' / 'results' / 'README.md', 'runs'): _benchmarks.runs,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Print, check or write all parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    add_modes(parser)
    parser.add_argument('--chart', metavar='FILE', type=Path, help='draw the chart of operations (needs matplotlib)')
    args = parser.parse_args(argv)
    if args.chart:
        _benchmarks.draw_operations(args.chart)
    return max([settle(args, section, make()) for section, make in SECTIONS.items()])


if __name__ == '__main__':
    raise SystemExit(main())
