#!/usr/bin/env bash
# Builds the wheel and imports every module from it, away from the sources.
#
#   bash scripts/wheel.sh
#
#   PYTHON=..., VENV=DIR   as in scripts/test.sh, whose environment it uses
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0"
  exit 0
fi
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment dev
python=$PWD/$VENV/bin/python

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# From a copy: what an older build left beside the sources stays out.
mkdir "$folder/source"
cp -r mom_jax setup.py pyproject.toml README.md LICENSE "$folder/source"
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps \
  --wheel-dir "$folder" "$folder/source"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps \
  --target "$folder/site" "$folder"/*.whl
cd "$folder"
PYTHONPATH=$folder/site JAX_PLATFORMS=cpu "$python" - "$folder/site" <<'PYTHON'
import importlib
import pathlib
import sys

import mom_jax

site = pathlib.Path(sys.argv[1])
assert site in pathlib.Path(mom_jax.__file__).parents, mom_jax.__file__
count = 0
for path in sorted((site / 'mom_jax').rglob('*.py')):
  module = '.'.join(path.relative_to(site).with_suffix('').parts)
  if 'triton' not in module:  # needs the extra of GPU kernels
    importlib.import_module(module.removesuffix('.__init__'))
    count += 1
print(f'mom_jax {mom_jax.__version__}: {count} modules import from the wheel.')
PYTHON
