#!/usr/bin/env bash
# Gathers the wheels that scripts/gpu_kit.sh needs on a machine that has jax
# with CUDA, torch and Triton but no network. Dependencies are named one by one,
# so nothing large comes along; what a rival still lacks there, the kit reports.
# causal-conv1d has no wheel: where it is wanted it is built beside torch.
#
#   bash scripts/gpu_wheels.sh DIR
#
#   PYTHON=...          an interpreter with pip (default: python3)
#   PYTHON_VERSION=...  of the other machine (default: 3.12)
set -euo pipefail

if [[ $# != 1 || $1 == --help || $1 == -h ]]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0"
  [[ ${1:-} == --help || ${1:-} == -h ]] && exit 0
  exit 2
fi

wheels=(
  jax-triton==0.3.1
  # Rivals: fla's kernels and models; tokamax and what it imports.
  fla-core==0.6.0 flash-linear-attention==0.6.0 einops
  tokamax==0.0.14 typeguard==2.13.3 qwix einshape immutabledict
  'pydantic>=2.11' annotated-types typing-inspection
  # What the tests and the library import beside jax, flax, optax and orbax.
  pytest pytest-timeout pytest-xdist execnet pluggy iniconfig
  jaxtyping wadler-lindig beartype
  ml-collections absl-py etils grain array-record portpicker cloudpickle
)
mkdir -p "$1"
"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$1" \
  --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux2014_x86_64 --platform any "${wheels[@]}"
# Which pydantic-core fits is written in pydantic.
core=$(unzip -p "$1"/pydantic-[0-9]*.whl '*/METADATA' |
  sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
"${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$1" \
  --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
  --platform manylinux2014_x86_64 "pydantic-core==$core"
du -sh "$1"
