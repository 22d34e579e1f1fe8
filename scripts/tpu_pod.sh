#!/usr/bin/env bash
# Trains on a TPU VM pod of Google Cloud, from queued resource to results.
#
#   scripts/tpu_pod.sh create  --name=mom --zone=us-east5-a --type=v5p-256 [--spot]
#   scripts/tpu_pod.sh install --name=mom --zone=us-east5-a --bucket=my-bucket
#   scripts/tpu_pod.sh run     --name=mom --zone=us-east5-a --workdir=run1 -- \
#     --config=configs/mom_1b3.py --config.data.readers=64
#   scripts/tpu_pod.sh status  --name=mom --zone=us-east5-a
#   scripts/tpu_pod.sh stop    --name=mom --zone=us-east5-a
#   scripts/tpu_pod.sh resume  --name=mom --zone=us-east5-a --type=v5p-256 \
#     --bucket=my-bucket --workdir=run1 -- --config=configs/mom_1b3.py ...
#   scripts/tpu_pod.sh collect --name=mom --zone=us-east5-a --workdir=run1
#   scripts/tpu_pod.sh delete  --name=mom --zone=us-east5-a
#
# The workdir is a folder of the bucket, which every host mounts; the bucket
# needs a hierarchical namespace, so that a checkpoint appears whole. resume
# makes the pod anew if it is gone (preempted), installs, and runs the same
# command, which goes on from the last checkpoint. --dry-run prints every command
# and runs none. --project and --runtime are optional. Names of --type are those
# of python -m mom_jax.plan --topology.
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"
}

fail() {
  echo "error: $1" >&2
  exit 2
}

action=${1:-}
case $action in
  create | install | run | status | stop | resume | collect | delete) shift ;;
  -h | --help) usage; exit 0 ;;
  *) fail "'$action' is no action; known: create, install, run, status, stop,\
 resume, collect, delete." ;;
esac

name='' zone='' type='' bucket='' workdir='' project='' runtime=''
spot=() dry=false training=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --dry-run) dry=true ;;
    --) shift; training=("$@"); break ;;
    *) fail "$1 is unknown; flags of the training come after --." ;;
  esac
  shift
done

need() {
  local flag
  for flag in "$@"; do
    [[ -n ${!flag} ]] || fail "$action needs --$flag."
  done
}

# Prints a command as it can be pasted; runs it unless --dry-run.
do_() {
  printf '+'
  printf ' %q' "$@"
  printf '\n'
  $dry || "$@"
}

need name zone
where=(--zone="$zone")
[[ -z $project ]] || where+=(--project="$project")
mount=\$HOME/mom_jax_runs

on_all() {
  do_ gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || echo NONE
}

accelerator() {
  case $type in
    v5e-*) echo "v5litepod-${type#v5e-}" ;;
    v4-* | v5p-* | v6e-*) echo "$type" ;;
    *) fail "--type=$type is no TPU VM; known: v4-N, v5e-N, v5p-N, v6e-N\
 (tpu7x runs on GKE, see scripts/gke)." ;;
  esac
}

image() {
  case $type in
    v4-*) echo tpu-ubuntu2204-base ;;
    v5e-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
  esac
}

create() {
  need type
  local accelerator
  accelerator=$(accelerator)
  do_ gcloud compute tpus queued-resources create "$name" --node-id="$name" \
    "${where[@]}" --accelerator-type="$accelerator" \
    --runtime-version="${runtime:-$(image)}" "${spot[@]}"
  await
}

await() {
  if $dry; then
    echo "# waits until the queued resource $name is ACTIVE"
    return
  fi
  local now before=''
  while true; do
    now=$(state)
    [[ $now == "$before" ]] || echo "queued resource $name: $now"
    before=$now
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | NONE)
        fail "the queued resource $name is $now; delete it and try another\
 zone or type." ;;
    esac
    sleep 30
  done
}

install() {
  need bucket
  local root archive
  root=$(cd "$(dirname "$0")/.." && pwd)
  archive=$(mktemp -u).tar.gz
  do_ tar -czf "$archive" -C "$root" README.md setup.py pyproject.toml \
    mom_jax configs
  do_ gcloud compute tpus tpu-vm scp "$archive" "$name:mom_jax.tar.gz" \
    "${where[@]}" --worker=all
  do_ rm "$archive"
  on_all "set -e
mkdir -p mom_jax $mount
tar -xzf mom_jax.tar.gz -C mom_jax
python3 -m venv mom_jax/.venv
mom_jax/.venv/bin/pip install --quiet './mom_jax[tpu,parquet,sentencepiece]'
command -v gcsfuse > /dev/null || {
  echo deb https://packages.cloud.google.com/apt gcsfuse-\$(lsb_release -cs) main |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
    sudo tee /etc/apt/trusted.gpg.d/gcsfuse.asc > /dev/null
  sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
}
mountpoint -q $mount || gcsfuse --implicit-dirs $bucket $mount"
}

run() {
  need workdir
  ((${#training[@]})) || fail "$action needs the flags of the training after --."
  local flags
  flags=$(printf ' %q' "${training[@]}")
  on_all "set -e
cd mom_jax
if [ -f train.pid ] && kill -0 \$(cat train.pid) 2> /dev/null; then
  echo 'a training is running already; stop it first' >&2
  exit 2
fi
setsid nohup .venv/bin/python -m mom_jax.train --distributed \
--workdir=$mount/$workdir$flags > train.log 2>&1 < /dev/null &
echo \$! > train.pid"
}

status() {
  if $dry; then
    echo "+ gcloud compute tpus queued-resources describe $name ${where[*]}"
  else
    echo "queued resource $name: $(state)"
  fi
  # shellcheck disable=SC2016  # expanded there, not here
  on_all 'cd mom_jax; kill -0 $(cat train.pid) 2> /dev/null && echo running ||
echo stopped; tail -n 3 train.log'
}

# One process is enough: all save the same step and end.
stop() {
  # shellcheck disable=SC2016  # expanded there, not here
  do_ gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 \
    --command='kill -TERM $(cat mom_jax/train.pid)'
}

resume() {
  need type bucket workdir
  local now=NONE
  $dry || now=$(state)
  case $now in
    ACTIVE) ;;
    NONE) create ;;
    WAITING_FOR_RESOURCES | PROVISIONING | ACCEPTED | CREATING) await ;;
    *) delete; create ;;
  esac
  install
  run
}

collect() {
  need workdir
  local target=runs/$name-$workdir
  do_ mkdir -p "$target"
  do_ gcloud compute tpus tpu-vm scp --recurse "${where[@]}" --worker=0 \
    "$name:mom_jax_runs/$workdir/config.json" \
    "$name:mom_jax_runs/$workdir/metrics.jsonl" "$name:mom_jax/train.log" \
    "$target"
}

delete() {
  do_ gcloud compute tpus queued-resources delete "$name" "${where[@]}" \
    --force --quiet
}

"$action"
