#!/usr/bin/env bash
# Tests and times the GPU kernels on a machine with an NVIDIA GPU, in under ten
# minutes a part. Each stage is a process of its own with a time box; rows are
# appended to DIR/results.jsonl as they come and DIR/table.md is made last.
#
#   bash scripts/gpu_kit.sh [--dry-run] [--out=DIR] [--wheels=DIR] [kernels|models]
#
#   kernels       operations beside fla, torch._grouped_mm, tokamax, cuDNN and
#                 jax.lax.ragged_dot (default)
#   models        training steps and decoding of whole models
#   --dry-run     print the stages of both parts, their boxes and their cases
#   --out=DIR     where results go (default: gpu_results)
#   --wheels=DIR  what scripts/gpu_wheels.sh gathered; installed under --out
#   PYTHON=...    interpreter that has jax with CUDA (default: python3)
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; }

PYTHON=${PYTHON:-python3}
out=gpu_results wheels='' part=kernels dry=''
for word in "$@"; do
  case $word in
    --dry-run) dry=1 ;;
    --out=*) out=${word#*=} ;;
    --wheels=*) wheels=${word#*=} ;;
    kernels | models) part=$word ;;
    --help | -h) usage; exit 0 ;;
    *) echo "error: unknown argument $word; --help names them." >&2; exit 2 ;;
  esac
done

if [[ -n $dry ]]; then
  for part in kernels models; do
    echo "== $part: name, seconds, needed or not, command"
    "$PYTHON" scripts/gpu_cases.py "$part" "$out" --cases
  done
  exit 0
fi

mkdir -p "$out"
export PYTHONPATH=$PWD:${PYTHONPATH:-}
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu}
export XLA_PYTHON_CLIENT_PREALLOCATE=false
export XLA_FLAGS=${XLA_FLAGS:-}  # the tests would turn optimisations off
if [[ -n $wheels ]]; then
  # Only what is not there: PYTHONPATH comes before what is installed.
  mapfile -t missing < <("$PYTHON" - "$wheels" <<'PY'
import importlib.metadata
import pathlib
import sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob('*.whl')):
  try:
    importlib.metadata.version(wheel.name.split('-')[0])
  except importlib.metadata.PackageNotFoundError:
    print(wheel)
PY
  )
  if ((${#missing[@]})); then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade \
      --target "$out/site" "${missing[@]}"
    PYTHONPATH=$PYTHONPATH:$(cd "$out/site" && pwd)
  fi
fi

started=$SECONDS
while IFS=$'\t' read -r name seconds needed command; do
  echo "== $name (at most $seconds s; $((SECONDS - started)) s so far)"
  # A stage's command begins with "python": that of PYTHON.
  read -ra words <<<"$command"
  code=0
  timeout --kill-after=5 "$seconds" "$PYTHON" "${words[@]:1}" \
    </dev/null || code=$?
  if ((code != 0)); then
    if ((code == 124 || code == 137)); then
      ended="its $seconds seconds were over"
    else
      ended="exit status $code"
    fi
    echo "{\"stage\": \"$name\", \"ended\": \"$ended\"}" >>"$out/results.jsonl"
    echo "== $name: $ended"
    if [[ $needed == needed ]]; then
      "$PYTHON" scripts/gpu_table.py "$out"
      echo "error: nothing after a stage that is needed." >&2
      exit 1
    fi
  fi
done < <("$PYTHON" scripts/gpu_cases.py "$part" "$out")
