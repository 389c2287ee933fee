"""The generated parts of the README."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_readme_holds_what_the_registry_and_the_records_give(promised, run_tool):
    done = run_tool(ROOT / 'tools' / 'checks' / 'tables.py', '--check')
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r'^\| `(\w+)` ', (ROOT / 'README.md').read_text(), re.MULTILINE)) == set(promised)
