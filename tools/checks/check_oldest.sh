#!/usr/bin/env bash
# Runs the tests against the oldest supported version of everything: Python 3.10 and tools/checks/oldest-constraints.txt.
#
#     tools/checks/check_oldest.sh [ARGUMENT OF PYTEST ...]
#
# PYTHON names the interpreter when it is not python3.10. VENV names a folder whose virtual environment is kept and used
# again; without it a temporary one is made, for which pip downloads about 3 GB the first time.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3.10}
if [ "$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != 3.10 ]; then
    echo "$python is not Python 3.10, the oldest supported: set PYTHON" >&2
    exit 2
fi
if [ -z "${VENV:-}" ]; then
    VENV=$(mktemp -d)
    trap 'rm -rf "$VENV"' EXIT
fi
"$python" -m venv "$VENV"
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c tools/checks/oldest-constraints.txt ".[test]" torchvision
"$VENV/bin/python" -m pip freeze | grep -iE "^($(grep -v '^#' tools/checks/oldest-constraints.txt | cut -d= -f1 | paste -sd'|' | sed 's/-/[-_]/g'))=="
"$VENV/bin/pytest" "$@"
