#!/usr/bin/env bash
# Plans the large recipes on TPU pods, one compilation after another, and prints
# the tables of docs/scaling.md. Existing plans are kept.
#
#   bash scripts/scaling.sh [FOLDER]      (default: runs/scaling)
#
# Needs libtpu (pip install '.[tpu-compile]') and no TPU; a compilation takes
# one to three minutes of one core and 4 GB. PYTHON=... names the interpreter.
set -euo pipefail

folder=${1:-runs/scaling}
python=${PYTHON:-python3}
mkdir -p "$folder"

# plan NAME CONFIG TOPOLOGY [OVERRIDE ...]
plan() {
  local name=$1 config=$2 topology=$3 code=0
  shift 3
  [[ ! -f $folder/$name.json ]] || return 0
  echo "+ python -m mom_jax.plan --quick --config=$config --topology=$topology $*"
  "$python" -m mom_jax.plan --quick --config="$config" \
    --topology="$topology" "$@" --json="$folder/$name.json" > "$folder/$name.txt" || code=$?
  # 1: it does not fit, which is a result as well.
  ((code < 2)) || exit "$code"
}

one=configs/mom_1b3.py both=configs/mom_moma_1b4.py
# Parameters are sharded over all chips, with as few micro-batches as fit: each
# gathers all parameters again.
plan v5e-16 $one v5e-16 --config.mesh.fsdp=16 --config.train.grad_accum_steps=32
plan v5p-64 $one v5p-64 --config.mesh.fsdp=32 --config.train.grad_accum_steps=2
plan v6e-256 $one v6e-256 --config.mesh.fsdp=256
plan v5p-256 $both v5p-256 --config.mesh.fsdp=128 --config.train.grad_accum_steps=2

# Equally many rows per chip. One chip cannot hold them, and has no collectives.
for chips in 4 16 64 256; do
  plan weak-$chips $one v6e-$chips --config.mesh.fsdp=$chips \
    --config.data.batch_size=$((4 * chips))
done

"$python" scripts/scaling_report.py "$folder"
