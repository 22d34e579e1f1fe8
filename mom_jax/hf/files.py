"""Folders with config.json, safetensors and a tokenizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp
import numpy as np

from mom_jax import config
from mom_jax.hf import settings
from mom_jax.hf import tensors as hf_tensors
from mom_jax.hf.tensor_maps import Tree

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
INDEX = WEIGHTS + '.index.json'
# Files of a tokenizer, which are copied.
TOKENIZER = (
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
    'vocab.txt', 'generation_config.json',
)
SHARD = 5_000_000_000  # bytes of tensors in a file


def load(directory: str | pathlib.Path) -> tuple[config.Config, Tree]:
  """Read a published checkpoint.

  Args:
    directory: holds `config.json` and `model.safetensors`, or the shards that
      `model.safetensors.index.json` lists. Pickles are never read.
  Returns:
    (config, params), params in float32; `model.dtype` is the stored type.
  Raises:
    UserError: a file is missing, a tensor is unknown, missing or misshapen, or
      a setting has no counterpart here.
  """
  safetensors = _safetensors()
  directory = pathlib.Path(directory)
  try:
    hf = read_config(directory)
    files = [WEIGHTS]
    if (directory / INDEX).exists():
      weights = json.loads(
          (directory / INDEX).read_text(encoding='utf-8'))['weight_map']
      files = sorted(set(weights.values()))
    tensors: dict[str, Any] = {}
    for file in files:
      tensors |= safetensors.load_file(directory / file)
  except FileNotFoundError as e:
    pickles = sorted(p.name for p in directory.glob('*.bin'))
    more = ''
    if pickles:
      more = (f' Pickles such as {pickles[0]} are not read, as they can run'
              ' anything; save the model as safetensors.')
    raise config.UserError(
        f'{directory} is no safetensors checkpoint: {e.filename or e} is'
        f' missing.{more}'
    ) from e
  cfg = settings.config_from_hf(hf)
  if cfg.model.tie_embeddings:  # some writers store the same tensor twice
    tensors.pop('lm_head.weight', None)
  stored = {str(t.dtype) for t in tensors.values()}
  dtype = 'bfloat16' if stored == {'bfloat16'} else 'float32'
  model = dataclasses.replace(cfg.model, dtype=dtype)
  params = hf_tensors.from_state_dict(
      model, {k: np.asarray(v, np.float32) for k, v in tensors.items()},
      settings.format_of(hf) == 'mom')
  return dataclasses.replace(cfg, model=model), params


def save(
    directory: str | pathlib.Path,
    cfg: config.Config,
    params: Tree,
    shard: int = SHARD,
) -> None:
  """Write `config.json` and safetensors as the official code does.

  Tensors are stored as `model.dtype`; those that `load` read are written back
  bit by bit.

  Args:
    shard: maximum bytes of tensors per file; several files get an index.
  Raises:
    UserError: the model has parts that no published format holds.
  """
  safetensors = _safetensors()
  hf = settings.config_to_hf(cfg)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = hf_tensors.to_state_dict(
      cfg.model, params, hf['model_type'] == 'mom')
  width = jnp.dtype(cfg.model.dtype).itemsize
  parts: list[dict[str, Any]] = [{}]
  left = shard
  for name, tensor in tensors.items():
    size = tensor.size * width
    if parts[-1] and size > left:
      parts.append({})
      left = shard
    parts[-1][name] = jnp.asarray(tensor, cfg.model.dtype)
    left -= size
  names = [WEIGHTS] if len(parts) == 1 else [
      f'model-{i + 1:05d}-of-{len(parts):05d}.safetensors'
      for i in range(len(parts))]
  for name, part in zip(names, parts):
    safetensors.save_file(part, directory / name, metadata={'format': 'pt'})
  if len(parts) > 1:
    total = sum(t.size * width for t in tensors.values())
    (directory / INDEX).write_text(json.dumps({
        'metadata': {'total_size': total},
        'weight_map': {t: name for name, part in zip(names, parts)
                       for t in part},
    }, indent=2), encoding='utf-8')
  (directory / CONFIG).write_text(
      json.dumps(hf, indent=2) + '\n', encoding='utf-8')


def read_config(directory: pathlib.Path) -> dict[str, Any]:
  return json.loads((directory / CONFIG).read_text(encoding='utf-8'))


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> list[str]:
  """Copy the files of a tokenizer and return their names."""
  found = [name for name in TOKENIZER if (source / name).is_file()]
  for name in found:
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / name, target / name)
  return found


def _safetensors():
  try:
    import safetensors.flax
  except ImportError as e:
    raise config.UserError(
        "reading checkpoints needs safetensors; pip install 'mom_jax[hf]'."
    ) from e
  return safetensors.flax
