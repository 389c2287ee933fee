"""Print the generated parts of README.md, BENCHMARKS.md and CITATION.bib, or check or renew them.

    python tools/checks/tables.py            # print
    python tools/checks/tables.py --check    # exit 1 if a file differs
    python tools/checks/tables.py --write    # put them into their files
    python tools/checks/tables.py --check --chart tools/figures/operations.png    # draw the chart of operations

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
from timm_gsa.models._zoo import entries

USUAL_SIZE = 224  # pixels
README, BENCHMARKS, CITATION = ROOT / 'README.md', ROOT / 'BENCHMARKS.md', ROOT / 'hub_configs' / 'CITATION.bib'


def models() -> str:
    """One row for each model and one for the tiny baseline. Figures that were not read at the source are in a note."""
    weights = Path(timm_gsa.__file__).parent / 'weights'
    results = {path.stem: json.loads(path.read_text(encoding='utf-8')) for path in sorted(weights.glob('*.json'))}
    rows = [
        f'| model, at {USUAL_SIZE} px | parameters | multiply-adds | ImageNet-1k, paper | trained here, at 64 px |',
        '| --- | ---: | ---: | ---: | ---: |',
    ]

    def here(tag: str, name: str) -> str:
        return f'{results[tag]["models"][name]["top1"]:.2f} on {results[tag]["dataset"]["name"]}'

    for name in registered():
        family = family_of(name)
        reported = f'{family.reported[name]:.1f}' if family.reported_confirmed and name in family.reported else ''
        size = timm.get_pretrained_cfg(name).input_size[-1]
        measured = ', '.join(here(entry.partition('.')[2], entry) for entry in entries(name))
        rows.append(_row(f'`{name}`', size, parameters_and_multiply_adds(name), reported, measured))
    baseline = results['c100']['models']['baseline']
    size = timm.get_pretrained_cfg('gsa_resnet_tiny').input_size[-1]
    cost = parameters_and_multiply_adds(
        baseline['model'], num_classes=100, pretrained_cfg_overlay=dict(input_size=(3, size, size)),
        **baseline['model_kwargs'])
    rows.append(_row('timm ResNet, same shape', size, cost, '', here('c100', 'baseline')))
    notes = ['Accuracies are top-1 in percent.']
    confirmed: dict[str, list[str]] = {}
    for family in FAMILIES:
        if family.reported_confirmed:
            confirmed.setdefault(family.reported_status, []).append(family.title)
    notes += [f'Those of {" and ".join(titles)} are from {source}.' for source, titles in confirmed.items()]
    unconfirmed = [
        ', '.join(f'`{name}` {top1:.1f}' for name, top1 in family.reported.items()) + f' ({family.reported_status})'
        for family in FAMILIES if family.reported and not family.reported_confirmed]
    return '\n'.join([*rows, '', ' '.join([*notes, f'Not confirmed: {"; ".join(unconfirmed)}.'])])


def _row(name: str, size: int, cost: tuple[int, int], reported: str, measured: str) -> str:
    at = '' if size == USUAL_SIZE else f' ({size} px)'
    return f'| {name}{at} | {cost[0] / 1e6:.2f} M | {amount(cost[1])} | {reported} | {measured} |'


def provenance() -> str:
    """Paper of each family, what is verified and what is our choice."""
    rows = ['| family | paper | verified | our choice |', '| --- | --- | --- | --- |']
    for family in FAMILIES:
        paper = f'[{family.arxiv}](https://arxiv.org/abs/{family.arxiv})'
        if family.code:
            paper += f', [code]({family.code})'
        rows.append(f'| {family.title} | {paper} | {family.verified} | {family.ours} |')
    return '\n'.join(rows)


def citations() -> str:
    """BibTeX of the papers."""
    return '\n\n'.join(family.bibtex for family in FAMILIES)


SECTIONS: dict[Section, Callable[[], str]] = {
    Section(README, 'models'): models,
    Section(README, 'families'): provenance,
    Section(README, 'speed'): _benchmarks.speed,
    Section(CITATION, 'citations'): citations,
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
