"""Make, check, pin or export the entries in hub_configs/ from the registry and the recorded results.

    python tools/release/hub_configs.py check              # exit 1 if a folder differs from the registry
    python tools/release/hub_configs.py build              # write the folders
    python tools/release/hub_configs.py pin ENTRY COMMIT   # record the commit that publish.py printed
    python tools/release/hub_configs.py export DIR         # write whole repositories, weights included, for local-dir:
"""
from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from _hub_entry import CONFIGS, Entry, EntryError, all_entries


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    commands = parser.add_subparsers(dest='command', required=True)
    for name, what in (('check', 'report what differs'), ('build', 'write folders anew')):
        command = commands.add_parser(name, help=what)
        command.add_argument('entries', nargs='*', metavar='ENTRY', help='arch.tag; all where none is given')
    command = commands.add_parser('pin', help='record the commit of a published entry')
    command.add_argument('entry', metavar='ENTRY')
    command.add_argument('revision', metavar='COMMIT', help='40 hexadecimal digits')
    command = commands.add_parser('export', help='write whole repositories')
    command.add_argument('dir', metavar='DIR', type=Path, help='gets a folder for each entry')
    command.add_argument('entries', nargs='*', metavar='ENTRY', help='arch.tag; all where none is given')
    args = parser.parse_args(argv)
    if args.command == 'pin' and not re.fullmatch('[0-9a-f]{40}', args.revision):
        parser.error(f'COMMIT must be 40 hexadecimal digits, got {args.revision!r}')
    try:
        entries = [Entry(name) for name in ([args.entry] if args.command == 'pin' else args.entries or all_entries())]
        if args.command == 'export':
            for entry in entries:
                entry.export(args.dir / entry.name)
            return 0
    except EntryError as error:
        parser.error(str(error))

    status = 0
    for entry in entries:
        if args.command == 'pin':
            entry.pin(args.revision)
        elif args.command == 'build':
            entry.write()
        for problem in entry.problems():
            print(f'{entry.name}: {problem}')
            status = 1
    if not getattr(args, 'entries', True):
        for folder in sorted(CONFIGS.iterdir()):
            if folder.is_dir() and folder.name != 'recipes' and folder.name not in all_entries():
                print(f'{folder.name}: no results are recorded for this folder')
                status = 1
    return status


if __name__ == '__main__':
    raise SystemExit(main())
