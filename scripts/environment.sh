# shellcheck shell=bash
# Sourced by the other scripts: makes the virtual environment they run in.
# PYTHON is the interpreter (default python3), VENV the folder (default .venv).

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

# make_environment EXTRA: creates $VENV if need be and installs mom_jax[EXTRA].
make_environment() {
  if [[ ! -x $VENV/bin/python ]]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      echo "error: PYTHON=$PYTHON is missing or older than 3.11;" \
        "set PYTHON to a newer interpreter." >&2
      exit 2
    fi
    echo "== Making the environment $VENV with $("$PYTHON" --version)."
    "$PYTHON" -m venv "$VENV"
  fi
  echo "== Installing mom_jax[$1] into $VENV (a minute the first time)."
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
    --editable ".[$1]"
}
