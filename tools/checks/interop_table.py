"""Print the table of other libraries in tests/interop/README.md from a run of the tests, or check or renew it.

    python tools/checks/interop_table.py                    # run `pytest --slow -m interop`, print
    python tools/checks/interop_table.py --check            # ... exit 1 if the file differs in more than versions
    python tools/checks/interop_table.py --write            # ... put the table into the file
    python tools/checks/interop_table.py --junit FILE ...   # from the report of that, by --junitxml=FILE

A test names its row by `record`. Tests with equal cells share a row; tests without a row count only if they fail. Tests
whose library does not work untouched set the property `result` to what is needed.
"""
from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from xml.etree import ElementTree

from _sections import ROOT, Section, add_modes, settle

from timm_gsa.models._families import tiny_models

SECTION = Section(ROOT / 'tests' / 'interop' / 'README.md', 'table')
MODELS = tiny_models()
UNTOUCHED = 'works untouched'


class ReportError(Exception):
    """The tests gave no table."""


def record(record_property: Callable[[str, object], None], library: str, did: str, model: str) -> None:
    """Name the row of a test. Call it before the test skips because the library is missing.

    Args:
        record_property: pytest's fixture.
        library: Name of the library for pip.
        did: What the test does, in Markdown.
        model: Name of a tiny model.

    Raises:
        ValueError: `model` is no tiny model.
    """
    if model not in MODELS:
        raise ValueError(f'model must be one of {", ".join(MODELS)}, got {model}')
    try:
        installed = version(library)
    except PackageNotFoundError:
        installed = ''
    for name, value in (('library', library), ('version', installed), ('did', did), ('model', model)):
        record_property(name, value)


def table(report: Path) -> str:
    """The table in Markdown.

    Args:
        report: File written by pytest's `--junitxml`.

    Raises:
        ReportError: A test failed, or there are no rows.
    """
    rows: dict[tuple[str, str, str, str], set[str]] = {}
    failed = []
    cases = list(ElementTree.parse(report).iter('testcase'))
    for case in sorted(cases, key=lambda case: (case.get('file', ''), int(case.get('line', 0)))):
        cell = {each.get('name', ''): each.get('value', '') for each in case.iter('property')}
        skipped = case.find('skipped')
        if case.find('failure') is not None or case.find('error') is not None:
            failed.append(f'{case.get("classname")}.{case.get("name")} failed')
        elif 'library' in cell:
            result = cell.get('result', UNTOUCHED) if skipped is None else f'not run: {skipped.get("message")}'
            rows.setdefault((cell['library'], cell['version'], cell['did'], result), set()).add(cell['model'])
    if failed or not rows:
        raise ReportError('\n'.join(failed) or 'no test recorded a row')

    lines = ['| library | version | what was done | models | result |', '| --- | --- | --- | --- | --- |']
    order = {did: number for number, (_, _, did, _) in reversed(list(enumerate(rows)))}
    for key in sorted(rows, key=lambda key: (key[0].lower(), order[key[2]])):
        library, installed, did, result = key
        models = 'all' if rows[key] == set(MODELS) else ', '.join(f'`{name}`' for name in MODELS if name in rows[key])
        cells = (library, installed, did, models, result)
        lines.append('| ' + ' | '.join(each.replace('|', r'\|') for each in cells) + ' |')
    return '\n'.join(lines)


def without_versions(text: str) -> str:
    """A table without its second column."""
    return re.sub(r'^(\|[^|]*\|)[^|]*\|', r'\1', text, flags=re.MULTILINE)


def _run_tests(folder: Path) -> Path:
    """Run the tests and return their report, a file in `folder`. Raises ReportError if they fail."""
    report = folder / 'interop.xml'
    command = [sys.executable, '-m', 'pytest', '--slow', '-m', 'interop', f'--junitxml={report}']
    status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
    if status:
        raise ReportError(f'pytest --slow -m interop ended with status {status}')
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """Print, check or write the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').partition('\n')[0])
    add_modes(parser)
    parser.add_argument('--junit', type=Path, metavar='FILE', help='report of a run; without it the tests are run')
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as folder:
            made = table(args.junit or _run_tests(Path(folder)))
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    return settle(args, SECTION, made, compared=without_versions)


if __name__ == '__main__':
    raise SystemExit(main())
