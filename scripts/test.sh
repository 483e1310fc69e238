#!/usr/bin/env bash
# Installs, then lints, type-checks and runs every test. Arguments go to pytest.
set -euo pipefail
. "$(dirname "$0")/install.sh" dev,plan

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A file's tests stay in one process, which compiles what they share once.
"$python" -m pytest --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
