"""The README's table of models."""
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_holds_the_table_that_the_registry_gives(promised, run_tool):
    done = run_tool(ROOT / 'tools' / 'model_table.py', '--check')
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r'^\| `(\w+)` ', (ROOT / 'README.md').read_text(), re.MULTILINE)) == set(promised)
