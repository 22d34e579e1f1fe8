#!/usr/bin/env bash
# Trains a small text and image model on this computer and shows what it does:
# makes an environment, installs mom_jax with its demo data, trains for about
# five minutes on two cores, evaluates, and draws images and text from captions.
# Nothing is downloaded but packages. Safe to run twice: a run that was
# interrupted goes on, one that is complete is evaluated again.
#
#   bash scripts/quickstart.sh [WORKDIR] [--config.key=value ...]
#
#   WORKDIR       folder of the run (default: runs/quickstart)
#   --config...   settings for training, e.g. --config.train.steps=100
#   PYTHON=...    interpreter to use, 3.11 or newer (default: python3)
#   VENV=DIR      where the environment lives (default: .venv)
set -euo pipefail

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '2,13s/^# \{0,1\}//p' "$0"
  exit 0
fi
workdir=${WORKDIR:-}
if [[ $# -gt 0 && $1 != -* ]]; then
  workdir=$1
  shift
fi
if [[ -n $workdir && $workdir != /* ]]; then
  workdir=$PWD/$workdir
fi
cd "$(dirname "$0")/.."
workdir=${workdir:-runs/quickstart}

if [[ -z ${PYTHON:-} ]]; then  # the newest that will do, whatever python3 is
  for found in python3 python3.12 python3.11 python3.13; do
    if "$found" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      2>/dev/null; then
      PYTHON=$found
      break
    fi
  done
fi
# shellcheck source=scripts/environment.sh
source scripts/environment.sh
make_environment demo
python=$VENV/bin/python

# On a CPU a tenth of the time and more.
source scripts/allocator.sh

echo "== Training configs/quickstart.py in $workdir."
"$python" -m mom_jax.train --config=configs/quickstart.py \
  --workdir="$workdir" "$@"

echo "== Evaluating."
"$python" -m mom_jax.evaluate --workdir="$workdir"

echo "== Drawing images for captions and going on with texts."
"$python" -m mom_jax.generate --workdir="$workdir" --max_new_tokens=200 --guidance=2 \
  --prompt='cook<draw>' \
  --prompt='couple with heart<draw>' \
  --prompt='woman blond hair' \
  --prompt='Genesis 1
1 In the beginning'

cat <<END

== Done. In $workdir you find
  checkpoints/        the model
  metrics.jsonl       training and validation metrics, one record a line
  tensorboard/        the same for: tensorboard --logdir=$workdir
  evaluation.json     losses beside the unigram entropy, and routing loads
  loss_curve.png      losses over steps
  routing.png         which memory and expert takes which tokens, by layer
  samples.png         real next to generated images
  samples.txt         generated texts
  generated/          the images drawn above
Draw more with
  $python -m mom_jax.generate --workdir=$workdir --guidance=2 --prompt='man superhero<draw>'
END
