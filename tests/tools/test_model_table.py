"""The README's table of models."""
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_readme_holds_the_table_that_the_registry_gives(promised):
    tool = ROOT / 'tools' / 'model_table.py'
    done = subprocess.run([sys.executable, str(tool), '--check'], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(re.findall(r'^\| `(\w+)` ', (ROOT / 'README.md').read_text(), re.MULTILINE)) == set(promised)
