#!/usr/bin/env bash
# Installs mom_jax with its test tools into a virtual environment and runs the
# tests. Safe to run twice: an environment that exists is updated and reused.
#
#   bash scripts/test.sh [--smoke] [--gpu_kernels] [pytest arguments]
#
#   --smoke       only the quick subset (models, data, one short training)
#   --gpu_kernels installs Triton too, with which the kernels for GPUs are
#                 interpreted and compiled (0.4 GB; Linux; no GPU needed)
#   PYTHON=...    interpreter to use, 3.11 or newer (default: python3)
#   VENV=DIR      where the environment lives (default: .venv)
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,12s/^# \{0,1\}//p' "$0"
  exit 0
fi
extras=dev smoke=()
while [[ ${1:-} == --smoke || ${1:-} == --gpu_kernels ]]; do
  case $1 in
    --smoke) smoke=(tests/test_smoke.py) ;;
    --gpu_kernels) extras=dev,gpu-compile ;;
  esac
  shift
done

# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment "$extras"

echo "== Running the tests on $(nproc 2>/dev/null || echo '?') cores."
# A worker that falls ends the run: with a new one in its place it can hang.
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile \
  --max-worker-restart=0 "${smoke[@]}" "$@"
