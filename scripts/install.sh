# Makes the virtual environment where it is absent, and installs Ergon where it is not yet.
# Sourced by quickstart.sh and test.sh:  . scripts/install.sh [extras]
# PYTHON names the interpreter (default python3), VENV the folder (default .venv).

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
extras=${1:-}

if [ ! -x "$venv/bin/python" ]; then
  interpreter=${PYTHON:-python3}
  if ! "$interpreter" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "error: $interpreter is not Python 3.11 or newer; name one with PYTHON=" >&2
    exit 2
  fi
  echo "making $venv with $("$interpreter" --version)"
  "$interpreter" -m venv "$venv"
fi
python=$venv/bin/python
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ -n "${PYTHON:-}" ]; then
  wanted=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  if [ "$wanted" != "$version" ]; then
    echo "error: $venv has Python $version and PYTHON is $wanted: remove it or set VENV" >&2
    exit 2
  fi
fi

# A known-good set of versions exists for some Pythons; others take the newest that fit.
constraints=scripts/constraints/py$version.txt
[ -f "$constraints" ] || constraints=/dev/null
stamp=$(cat pyproject.toml "$constraints" <(echo "$extras") | cksum)
if [ "$(cat "$venv/ergon-installed${extras:+-$extras}" 2>/dev/null)" != "$stamp" ]; then
  echo "installing (once; a few minutes)"
  "$python" -m pip install --quiet --disable-pip-version-check \
    --constraint "$constraints" --editable ".${extras:+[$extras]}"
  echo "$stamp" > "$venv/ergon-installed${extras:+-$extras}"
fi
