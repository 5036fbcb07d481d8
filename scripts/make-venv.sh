#!/usr/bin/env bash
# Makes the virtual environment $2 with the interpreter $1, or says what the machine lacks for it.
set -euo pipefail
python=$1
venv=$2
if ! command -v "$python" >/dev/null; then
    echo "error: $python not found: install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2
    exit 1
fi
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $("$python" --version) is too old: Arriero needs Python 3.11 or newer (make PYTHON=...)" >&2
    exit 1
fi
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    echo "error: $python cannot make virtual environments: install its venv module" \
         "(Debian and Ubuntu: apt-get install python3-venv)" >&2
    exit 1
fi
# One that works is kept: pip then only brings it up to date. The scripts in it name its folder.
if ! "$venv/bin/python" -c '' 2>/dev/null || ! grep -qF "$PWD/$venv" "$venv/bin/activate"; then
    "$python" -m venv --clear "$venv"
fi
