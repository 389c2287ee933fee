"""Print the README's table of models, counted from the registry, or check or renew it in the README.

    python tools/model_table.py            # print
    python tools/model_table.py --check    # exit 1 where README.md holds another table
    python tools/model_table.py --write    # put it into README.md
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import timm
from _cost import parameters_and_multiply_adds
from _readme import Section, add_modes, settle

import timm_gsa

SECTION = Section('<!-- model table: tools/model_table.py -->', '<!-- end of model table -->')

# ImageNet-1k top-1 of the papers, each with what it rests on. None was measured here: no ImageNet was at hand.
PAPER = {
    'gsa_resnet50': '78.5 (recalled; an author states +1.6 over ResNet-50)',
    'gsa_resnet101': '79.6 (recalled, not confirmed)',
    'san10_pairwise': "74.9 (authors' README)",
    'san15_pairwise': "76.6 (authors' README)",
    'san19_pairwise': "76.9 (authors' README)",
    'san10_patchwise': "77.1 (authors' README)",
    'san15_patchwise': "78.0 (authors' README)",
    'san19_patchwise': "78.2 (authors' README)",
    'priorattn_resnet152': '80.0 (derived: +0.9 over AA-ResNet-152)',
}


def table() -> str:
    """The table in Markdown, one row for each registered model of ours and one for the tiny baseline."""
    results = json.loads((Path(timm_gsa.__file__).parent / 'weights' / 'c100.json').read_text())['models']
    rows = [
        '| model | input | parameters | multiply-adds | ImageNet-1k top-1 in the paper | CIFAR-100 top-1 here |',
        '| --- | ---: | ---: | ---: | --- | ---: |',
    ]
    names = [name for family in ('gsa_resnet*', 'san*', 'priorattn*') for name in timm.list_models(family)]
    names = [name for name in names if timm.model_entrypoint(name).__module__.startswith('timm_gsa.')]
    for name in sorted(names, key=lambda name: 'tiny' in name):
        cost = parameters_and_multiply_adds(name)
        measured = results.get(f'{name}.c100')
        size = timm.get_pretrained_cfg(name).input_size[-1]
        rows.append(_row(f'`{name}`', size, cost, PAPER.get(name, ''), measured))
    baseline = results['baseline']
    size = timm.get_pretrained_cfg('gsa_resnet_tiny').input_size[-1]
    cost = parameters_and_multiply_adds(
        baseline['model'], num_classes=100, pretrained_cfg_overlay=dict(input_size=(3, size, size)),
        **baseline['model_kwargs'])
    rows.append(_row('timm ResNet of the shape of `gsa_resnet_tiny`', size, cost, '', baseline))
    return '\n'.join(rows)


def _row(name: str, size: int, cost: tuple[int, int], paper: str, measured: dict | None) -> str:
    accuracy = f'{measured["top1"]:.2f}' if measured else ''
    multiply_adds = f'{cost[1] / 1e9:.2f} G' if cost[1] > 1e9 else f'{cost[1] / 1e6:.1f} M'
    return f'| {name} | {size} | {cost[0]:,} | {multiply_adds} | {paper} | {accuracy} |'


def main(argv: Sequence[str] | None = None) -> int:
    """Print, check or write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    add_modes(parser)
    return settle(parser.parse_args(argv), SECTION, table())


if __name__ == '__main__':
    raise SystemExit(main())
