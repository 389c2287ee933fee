"""Generated parts of files, each between two markers."""
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from timm_gsa.commands._files import written_whole

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Section:
    """Part of a file between the lines `<!-- NAME -->` and `<!-- end of NAME -->`.

    Attributes:
        path: The file.
        name: NAME.
    """

    path: Path
    name: str

    def _parts(self) -> tuple[str, str, str]:
        text = self.path.read_text(encoding='utf-8')
        before, begin, rest = text.partition(f'<!-- {self.name} -->\n')
        content, end, after = rest.partition(f'<!-- end of {self.name} -->\n')
        if not begin or not end:
            raise ValueError(
                f'{self.path.name} must hold the lines <!-- {self.name} --> and, below, <!-- end of {self.name} -->')
        return before + begin, content, end + after

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
        with written_whole(self.path) as temporary:
            temporary.write_text(f'{before}{content}\n{after}', encoding='utf-8')


def add_modes(parser: argparse.ArgumentParser) -> None:
    """Add the options --check and --write."""
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--check', action='store_true', help='exit 1 if a file holds another table')
    mode.add_argument('--write', action='store_true', help='put the tables into their files')


def settle(
        args: argparse.Namespace,
        section: Section,
        table: str,
        compared: Callable[[str], object] = str,
) -> int:
    """Print, check or write a table; returns the exit status.

    Args:
        args: Command line with the options of `add_modes`.
        section: Where the table stands.
        table: The table as it should be.
        compared: Applied to both tables before --check compares them.

    Raises:
        ValueError: The file lacks a marker.
    """
    if args.write:
        section.write(table)
    elif not args.check:
        print(table)
    elif compared(section.read()) != compared(table):
        print(f'{section.path.name} holds another table of {section.name}; renew it with --write')
        return 1
    return 0
