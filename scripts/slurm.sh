#!/usr/bin/env bash
# Trains on GPU nodes of a Slurm cluster, one process a GPU.
#
#   scripts/slurm.sh --nodes=8 --gpus=8 --time=24:00:00 --partition=h100 \
#     --workdir=/shared/runs/mom_1b3 -- --config=configs/mom_1b3.py
#
# Two minutes before the time is up, and when the job is preempted, all processes
# save the same step; the job is queued again and goes on from there, as it does
# up to twenty times after a process was lost: exit code 3, or above 128 where it
# was killed or was process 0, whose loss JAX answers with an abort of the others.
# The workdir lies on a file system that all nodes share. data.readers is set to
# the number of processes, so that the run may later go on with fewer; set it
# yourself to go on with more. --account, --partition and --venv (default .venv)
# are optional; --dry-run prints the job and the command and submits nothing.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

nodes=1 gpus=8 time=24:00:00 workdir='' partition='' account='' venv=.venv
dry=false training=()
while (($#)); do
  case $1 in
    --nodes=*) nodes=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --time=*) time=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --partition=*) partition=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --venv=*) venv=${1#*=} ;;
    --dry-run) dry=true ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; training=("$@"); break ;;
    *) fail "$1 is unknown; flags of the training come after --." ;;
  esac
  shift
done
[[ -n $workdir ]] || fail 'slurm.sh needs --workdir.'
for name in nodes gpus; do
  [[ ${!name} =~ ^[1-9][0-9]*$ ]] ||
    fail "--$name=${!name} must be a whole number above 0."
done
workdir=${workdir/#\~\//$HOME/} venv=${venv/#\~\//$HOME/}
((${#training[@]})) || fail 'slurm.sh needs the flags of the training after --.'
if [[ " ${training[*]} " != *' --config.data.readers='* ]]; then
  training+=("--config.data.readers=$((nodes * gpus))")
fi

options=(
  --job-name="mom-$(basename "$workdir")" --nodes="$nodes"
  --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --time="$time"
  --signal=TERM@120 --requeue --open-mode=append
  --output="$workdir/slurm-%j.log"
)
[[ -z $partition ]] || options+=(--partition="$partition")
[[ -z $account ]] || options+=(--account="$account")

root=$(cd "$(dirname "$0")/.." && pwd)
flags=$(printf ' %q' "${training[@]}")
job="#!/bin/bash
cd $(printf %q "$root")
srun --kill-on-bad-exit=0 $(printf %q "$venv")/bin/python -m mom_jax.train \
--workdir=$(printf %q "$workdir")$flags
code=\$?
# Stopped before its end, or a process was lost: again.
if grep -q 'stopped by SIGTERM' <(tail -n 50 $(printf %q "$workdir")/slurm-\
\$SLURM_JOB_ID.log) || (((code == 3 || code > 128) &&
    \${SLURM_RESTART_COUNT:-0} < 20)); then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \$code"

printf '+ sbatch'
printf ' %q' "${options[@]}"
printf ' <<JOB\n%s\nJOB\n' "$job"
if ! $dry; then
  mkdir -p "$workdir"
  sbatch "${options[@]}" <<< "$job"
fi
