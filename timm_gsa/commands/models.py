"""List the models of this package: parameters, multiply-adds, and where weights come from.

examples:
  timm-gsa models
  timm-gsa models 'san*' gsa_resnet50

Parameters are for the number of classes of the model's config, multiply-adds for one image of the input size.
"""
import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

import timm

from ..models._families import FAMILIES, family_of
from ._cost import parameters_and_multiply_adds
from ._inputs import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument(
        'patterns', metavar='PATTERN', nargs='*', help='shell patterns of names; all models if not given')


def run(args: argparse.Namespace) -> int:
    """Print the table; returns 0."""
    names = chosen(args.patterns)
    rows = [('model', 'input', 'parameters', 'multiply-adds', 'weights')]
    for name in progress(names, 'counting', 'model'):
        parameters, multiply_adds = parameters_and_multiply_adds(name)
        size = timm.get_pretrained_cfg(name).input_size[-1]
        rows.append((name, str(size), f'{parameters:,}', amount(multiply_adds), source_of_weights(name)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
        print('  '.join(cells))
    return 0


def registered() -> list[str]:
    """Names of all models of this package, family by family; the tiny ones last."""
    names = []
    for family in FAMILIES:
        module = f'timm_gsa.models.{family.name}'
        names += [name for name in timm.list_models(f'{family.prefix}*')
                  if timm.model_entrypoint(name).__module__ == module]
    return sorted(names, key=lambda name: name in family_of(name).tiny)


def chosen(patterns: Sequence[str]) -> list[str]:
    """The registered names that match a pattern; all where there is none.

    Raises:
        ValueError: A pattern matches nothing.
    """
    names = registered()
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f'PATTERN must match a model of this package, {pattern!r} matches none of {", ".join(names)}')
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, p) for p in patterns)]


def source_of_weights(name: str) -> str:
    """Where the pretrained weights of a model come from, '-' where there are none."""
    config = timm.get_pretrained_cfg(name)
    if config.file and Path(config.file).is_file():
        return f'in the package ({config.tag})'
    if config.hf_hub_id:
        return f'Hugging Face Hub: {config.hf_hub_id}'
    family = family_of(name)
    return family.weights if family.weights and name in family.reported else '-'


def amount(count: int) -> str:
    """A number of multiply-adds with its unit."""
    return f'{count / 1e9:.2f} G' if count > 1e9 else f'{count / 1e6:.1f} M'
