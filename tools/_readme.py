"""Tables in README.md between two markers, written by a tool."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from _files import written_whole

README = Path(__file__).parents[1] / 'README.md'


class Section:
    """What stands in README.md between two lines.

    Args:
        begin: The line before it.
        end: The line after it.
    """

    def __init__(self, begin: str, end: str) -> None:
        self.begin, self.end = begin, end

    def _parts(self) -> tuple[str, str, str]:
        text = README.read_text(encoding='utf-8')
        before, begin, rest = text.partition(self.begin + '\n')
        content, end, after = rest.partition(self.end + '\n')
        if not begin or not end:
            raise ValueError(f'{README.name} must hold the lines {self.begin!r} and, below, {self.end!r}')
        return before, content, after

    def read(self) -> str:
        """The content without the markers.

        Raises:
            ValueError: A marker is missing.
        """
        return self._parts()[1].strip()

    def write(self, content: str) -> None:
        """Put `content` between the markers.

        Raises:
            ValueError: A marker is missing.
        """
        before, _, after = self._parts()
        with written_whole(README) as temporary:
            temporary.write_text(f'{before}{self.begin}\n{content}\n{self.end}\n{after}', encoding='utf-8')


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Add --check and --write, which `settle` follows."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--check', action='store_true', help='exit 1 where README.md holds another table')
    mode.add_argument('--write', action='store_true', help='put the table into README.md')


def settle(
        args: argparse.Namespace,
        section: Section,
        table: str,
        compared: Callable[[str], object] = str,
) -> int:
    """Print, check or write a table, as the command line says; returns the exit status.

    Args:
        args: The command line, with the options of `add_modes`.
        section: Where the table stands.
        table: The table as it should be.
        compared: What of a table --check compares.

    Raises:
        ValueError: A marker is missing in README.md.
    """
    if args.write:
        section.write(table)
    elif not args.check:
        print(table)
    elif compared(section.read()) != compared(table):
        print(f'{README.name} holds another table; renew it with --write')
        return 1
    return 0
