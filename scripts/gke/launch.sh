#!/usr/bin/env bash
# Trains on GKE: fills in a JobSet and hands it to kubectl.
#
#   scripts/gke/launch.sh --name=mom --type=v5p:4x4x8 --image=REGISTRY/mom_jax \
#     --bucket=my-bucket -- --config=configs/mom_1b3.py
#   scripts/gke/launch.sh --name=mom --type=h100 --nodes=8 --image=... ...
#
# Types: v5e:TOPOLOGY, v5p:TOPOLOGY, v6e:TOPOLOGY, tpu7x:TOPOLOGY with --slices=N,
# or h100, b200 with --nodes=N. The image has mom_jax installed, and configs/ in
# its working folder. The bucket (with hierarchical namespace) is mounted at
# /runs, the workdir is /runs/NAME; --account is a Kubernetes service account that
# may write there (default "default"). A failed or preempted job starts again up
# to --restarts=N times (default 20) and goes on from its last checkpoint.
# data.readers is set to the number of processes unless you set it. --dry-run
# prints the manifest and the command and applies nothing.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}

name='' type='' image='' bucket='' account=default
slices=1 nodes=1 restarts=20 dry=false training=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --account=*) account=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --nodes=*) nodes=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --dry-run) dry=true ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
    --) shift; training=("$@"); break ;;
    *) fail "$1 is unknown; flags of the training come after --." ;;
  esac
  shift
done
for flag in name type image bucket; do
  [[ -n ${!flag} ]] || fail "launch.sh needs --$flag."
done
for flag in slices nodes; do
  [[ ${!flag} =~ ^[1-9][0-9]*$ ]] ||
    fail "--$flag=${!flag} must be a whole number above 0."
done
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts=$restarts must be a whole number."
((${#training[@]})) || fail 'launch.sh needs the flags of the training after --.'

topology=${type#*:} chips=4 manifest=tpu.yaml
case $type in
  v5e:*) accelerator=tpu-v5-lite-podslice ;;
  v5p:*) accelerator=tpu-v5p-slice ;;
  v6e:*) accelerator=tpu-v6e-slice ;;
  tpu7x:*) accelerator=tpu7x ;;
  h100) accelerator=nvidia-h100-80gb chips=8 manifest=gpu.yaml ;;
  b200) accelerator=nvidia-b200 chips=8 manifest=gpu.yaml ;;
  *) fail "--type=$type is unknown; known: v5e:2x4, v5p:4x4x8, v6e:16x16,\
 tpu7x:4x4x4 and the like, h100, b200." ;;
esac
hosts=$nodes
if [[ $manifest == tpu.yaml ]]; then
  [[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] ||
    fail "--type=$type must end with a topology such as 4x4x8."
  total=$((${topology//x/*}))
  ((total >= chips)) || chips=$total
  hosts=$((total / chips))
fi
if [[ " ${training[*]} " != *' --config.data.readers='* ]]; then
  training+=("--config.data.readers=$((hosts * slices))")
fi

# A YAML list is a JSON list; single quotes keep their content.
args=''
for flag in "${training[@]}"; do
  args+="${args:+, }'${flag//\'/\'\'}'"
done

filled=$(< "$(dirname "$0")/$manifest")
fill() {
  filled=${filled//"@$1@"/"$2"}
}
fill NAME "$name"
fill SLICES "$slices"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill ACCELERATOR "$accelerator"
fill TOPOLOGY "$topology"
fill IMAGE "$image"
fill BUCKET "$bucket"
fill ACCOUNT "$account"
fill RESTARTS "$restarts"
fill ARGS "[$args]"

printf '+ kubectl apply -f - <<JOBSET\n%s\nJOBSET\n' "$filled"
$dry || kubectl apply -f - <<< "$filled"
