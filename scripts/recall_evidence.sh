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
#             1 to 16 of them, K/M = 1/2, and balance: aux scales and the biased
#             router, both on mqar at the rate that is best for `mom` there;
#             text: arms on the King James Bible (default: all)
#   ARMS="plain mom"         arms of mqar, needle, selective_copy (default: all)
#   RATES="7.5e-4 1.5e-3 3e-3" grid of learning rates
#   SEEDS="0 1 2"            the first is that of the grid
#   STEPS=N                  steps of a run (default: the recipe's)
#   PREFIX=COMMAND           put before each training, such as a queue's
#   PYTHON=...               interpreter (default: .venv/bin/python)
set -euo pipefail

if [[ $# -eq 0 || $1 == --help || $1 == -h ]]; then
  sed -n '2,20s/^# \{0,1\}//p' "$0"
  exit 0
fi
runs=$(realpath -m "$1")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
rates=${RATES:-7.5e-4 1.5e-3 3e-3}
read -r -a seeds <<< "${SEEDS:-0 1 2}"
arms=${ARMS:-plain mom single_kv attention keys expanded shared}
source scripts/allocator.sh
# Programs of runs that differ in their seed alone are compiled once.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$runs/compiled}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

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
  local rate seed rate_of_all
  for rate in $rates; do
    one "$1" "$2" "$rate" "${seeds[0]}" "${@:3}"
  done
  rate_of_all=$(best "$1-$2")
  for seed in "${seeds[@]:1}"; do
    one "$1" "$2" "$rate_of_all" "$seed" "${@:3}"
  done
}

best() {  # TASK-ARM: its best rate
  "$python" scripts/recall_report.py --runs="$runs" --best="$1" \
    --seed="${seeds[0]}"
}

like_mom() {  # ARM RECIPE-ARGUMENTS [--config...]: mqar, the seeds at mom's rate
  local rate seed
  rate=$(best mqar-mom)
  for seed in "${seeds[@]}"; do
    one mqar "$1" "$rate" "$seed" "${@:2}"
  done
}

for part in ${*:-mqar needle selective_copy memories balance text}; do
  case $part in
    mqar | needle | selective_copy)
      for name in $arms; do arm "$part" "$name" "mixer=$name"; done
      ;;
    memories)
      arm mqar mom mixer=mom  # 2 of 4
      for m in 1 2 8 16; do
        like_mom "mom$m" "mixer=mom,memories=$m,top_k=$(((m + 1) / 2))"
      done
      ;;
    balance)
      arm mqar mom mixer=mom  # aux scale 1e-2
      for scale in 0 1e-3; do
        like_mom "aux$scale" mixer=mom --config.loss.balance="$scale"
      done
      like_mom bias mixer=mom --config.loss.balance=0 \
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
