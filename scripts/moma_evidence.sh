#!/usr/bin/env bash
# Trains the models of docs/results/moma.md, one after another: every arm with
# seed 0, then with seed 1, and so on. Safe to interrupt: the same command goes
# on where it stopped. Several may run at once on different arms, but for
# upcycled, which comes after moe_1t1i of the same seed.
#
#   bash scripts/moma_evidence.sh DIR [ARM ...]
#
#   DIR           folder for the runs: DIR/ARM-SEED
#   ARM           names of configs/moma_small.py (default: all)
#   SEEDS="0 1 2" seeds of parameters and data order
#   STEPS=1600    steps of a run; upcycled has those of its seed run among them
#   PYTHON=...    interpreter (default: .venv/bin/python)
set -euo pipefail

if [[ $# -eq 0 || $1 == --help || $1 == -h ]]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0"
  exit 0
fi
runs=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
arms=${*:-dense moe_1t1i moe_8x moe_4t4i threshold token_choice upcycled mot}
python=${PYTHON:-.venv/bin/python}
steps=${STEPS:-1600}
grown=$((steps / 8))  # steps of moe_1t1i after which upcycled goes on

source scripts/allocator.sh

train() {  # ARM SEED STEPS [--config...]
  local to=$runs/$1-$2
  echo "== $1, seed $2"
  "$python" -m mom_jax.train --config="configs/moma_small.py:$1" \
    --workdir="$to" --config.train.seed="$2" --config.train.steps="$3" \
    --config.data.cache="$runs/cache" "${@:4}"
}

for seed in ${SEEDS:-0 1 2}; do
  for arm in $arms; do
    case $arm in
      moe_1t1i)
        train "$arm" "$seed" "$steps" --config.checkpoint.every=$grown \
          --config.checkpoint.keep_every=$grown
        ;;
      upcycled)
        young=$runs/young-$seed  # moe_1t1i as it was after those steps
        if [[ ! -e $runs/upcycled-$seed/upcycled.json ]]; then
          rm -rf "$young" "$runs/upcycled-$seed"
          cp -r "$runs/moe_1t1i-$seed" "$young"
          find "$young/checkpoints" -mindepth 1 -maxdepth 1 \
            ! -name "$grown" -exec rm -r {} +
          "$python" -m mom_jax.convert --upcycle="$young" \
            --config=configs/moma_small.py:upcycled \
            --workdir="$runs/upcycled-$seed" --config.train.seed="$seed" \
            --config.train.steps=$((steps - grown)) \
            --config.data.cache="$runs/cache"
        fi
        train "$arm" "$seed" $((steps - grown))
        ;;
      *) train "$arm" "$seed" "$steps" ;;
    esac
  done
done
