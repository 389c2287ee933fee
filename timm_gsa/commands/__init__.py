"""Attention networks and rivals as timm models: commands for photos, weights and the table of models.

A command is a module of this package without an underscore: its docstring is its help, `add_arguments` declares its
arguments and `run` does the work and returns the exit status. Libraries of an extra are imported in `run`.
"""
import argparse
import pkgutil
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from ..version import __version__

__all__ = ['commands', 'console', 'main', 'make_parser']

PROG = 'timm-gsa'


def commands() -> list[str]:
    """Names of all commands, as they are typed."""
    modules = (module.name for module in pkgutil.iter_modules(__path__))
    return [name.replace('_', '-') for name in modules if not name.startswith('_')]


def make_parser() -> argparse.ArgumentParser:
    """Parser of the whole command line."""
    description, _, _ = (__doc__ or '').partition('\n')
    parser = argparse.ArgumentParser(
        prog=PROG,
        description=description,
        epilog=f'`{PROG} COMMAND --help` lists the arguments of a command, with an example.',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    choices = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)
    for name in commands():
        module = import_module(f'{__name__}.{name.replace("-", "_")}')
        summary, _, details = (module.__doc__ or '').partition('\n')
        command = choices.add_parser(
            name, help=_lowered(summary), description=summary, epilog=details.strip(), formatter_class=_Formatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: Arguments without the program; those of this process where None.

    Returns:
        Exit status of the command.

    Raises:
        SystemExit: The command line is wrong or a command failed (status 2), or help was printed.
    """
    args = make_parser().parse_args(argv)
    try:
        return args.run(args)
    except (RuntimeError, ValueError, OSError) as error:
        command: argparse.ArgumentParser = args.command
        command.exit(2, f'{command.prog}: error: {error}\n')


def console() -> NoReturn:
    """Run the command line of this process and end it."""
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the docstring's examples with their line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, [], False):
            return action.help
        return super()._get_help_string(action)


def _lowered(sentence: str) -> str:
    return re.sub(r'^.', lambda first: first[0].lower(), sentence).rstrip('.')
