#!/usr/bin/env bash
# Trains and evaluates the models of docs/results/memory.md, one after another:
# every arm at every learning rate with seed 0, then the best one with the other
# seeds. Safe to interrupt: the same command goes on where it stopped, and what
# is evaluated already is not run again.
#
#   bash scripts/recall_evidence.sh DIR [PART ...]
#
#   DIR       folder for the runs: DIR/TASK-ARM-LR-SEED
#   PART      mqar, needle, selective_copy: arms on a task; memories: MoM with
#             1 to 16 of them, K/M = 1/2; balance: aux scales and the biased
#             router; text: arms on the King James Bible (default: all)
#   RATES="1e-3 3e-3 1e-2"   grid of learning rates
#   SEEDS="0 1 2"            the first is that of the grid
#   STEPS=N                  steps of a run (default: the recipe's)
#   PREFIX=COMMAND           put before each training, such as a queue's
#   PYTHON=...               interpreter (default: .venv/bin/python)
set -euo pipefail

if [[ $# -eq 0 || $1 == --help || $1 == -h ]]; then
  sed -n '2,18s/^# \{0,1\}//p' "$0"
  exit 0
fi
runs=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
rates=${RATES:-1e-3 3e-3 1e-2}
read -r -a seeds <<< "${SEEDS:-0 1 2}"
arms="plain mom attention keys expanded shared"
source scripts/allocator.sh

one() {  # TASK ARM RATE SEED RECIPE-ARGUMENTS [--config...]
  local to=$runs/$1-$2-$3-$4 evaluate=$1
  [[ $1 == text ]] && evaluate=loss,length,throughput
  [[ -e $to/evaluation.json ]] && return
  echo "== $1, $2, learning rate $3, seed $4"
  ${PREFIX:-} "$python" -m mom_jax.train \
    --config="configs/recall.py:task=$1,$5" --workdir="$to" \
    --config.optimizer.learning_rate="$3" --config.train.seed="$4" \
    --config.data.cache="$runs/cache" \
    ${STEPS:+--config.train.steps=$STEPS} "${@:6}"
  ${PREFIX:-} "$python" -m mom_jax.evaluate --workdir="$to" --task="$evaluate"
}

arm() {  # TASK ARM RECIPE-ARGUMENTS [--config...]: the grid, then the seeds
  local rate seed best
  for rate in $rates; do
    one "$1" "$2" "$rate" "${seeds[0]}" "${@:3}"
  done
  best=$("$python" scripts/recall_report.py --runs="$runs" --best="$1-$2" \
    --seed="${seeds[0]}")
  for seed in "${seeds[@]:1}"; do
    one "$1" "$2" "$best" "$seed" "${@:3}"
  done
}

for part in ${*:-mqar needle selective_copy memories balance text}; do
  case $part in
    mqar | needle | selective_copy)
      for name in $arms; do arm "$part" "$name" "mixer=$name"; done
      ;;
    memories)
      for m in 1 2 4 8 16; do
        arm mqar "mom$m" "mixer=mom,memories=$m,top_k=$(((m + 1) / 2))"
      done
      ;;
    balance)
      for scale in 0 1e-3 1e-2; do
        arm mqar "aux$scale" mixer=mom --config.loss.balance="$scale"
      done
      arm mqar bias mixer=mom --config.loss.balance=0 \
        --config.model.mixer.router=softmax_topk_bias
      ;;
    text)
      for name in $arms hybrid; do arm text "$name" "mixer=$name"; done
      ;;
    *)
      echo "error: PART $part is unknown; see --help." >&2
      exit 2
      ;;
  esac
done
