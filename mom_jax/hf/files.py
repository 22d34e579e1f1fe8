"""Folders with config.json, safetensors and a tokenizer.

What a published model has besides its settings and parameters goes with a run
in files of their own: those of the tokenizer, the generation config, and
`published.json` with the types of tensors and the ids of special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import pathlib
import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mom_jax import config
from mom_jax.hf import settings, tokenizer_file
from mom_jax.hf import tensors as hf_tensors
from mom_jax.hf.tensor_maps import Tree

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
INDEX = WEIGHTS + '.index.json'
GENERATION = 'generation_config.json'
RECORD = 'published.json'
# Files of a tokenizer and of generation, which are copied.
TOKENIZER = (
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json',
    'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'merges.txt',
    'vocab.txt', 'chat_template.jinja', GENERATION,
)
SHARD = 5_000_000_000  # bytes of tensors in a file
# Types of safetensors that are read -> ours.
_TYPES = {'F32': 'float32', 'BF16': 'bfloat16', 'F16': 'float16'}
_SHARDS = re.compile(r'model-\d{5}-of-\d{5}\.safetensors')


class Stored(NamedTuple):
  """Tensors of a folder by name, and the type that each is stored as."""

  tensors: dict[str, Any]
  types: dict[str, str]


def load(directory: str | pathlib.Path) -> tuple[config.Config, Tree]:
  """Read a published checkpoint.

  Args:
    directory: holds `config.json` and `model.safetensors`, or the shards that
      `model.safetensors.index.json` lists. Pickles are never read.
  Returns:
    (config, params), params in float32; `model.dtype` is the type of most
    values. `stored_types` has that of each tensor.
  Raises:
    UserError: a file is missing or damaged, a tensor is unknown, missing or
      misshapen, or a setting has no counterpart here.
  """
  directory = pathlib.Path(directory)
  hf = read_config(directory)
  cfg = settings.config_from_hf(hf)
  kind = settings.format_of(hf)
  tensors, types = _read(directory, kind)
  if cfg.model.tie_embeddings:  # some writers store the same tensor twice
    tensors.pop('lm_head.weight', None)
  size = {'float32': 0, 'bfloat16': 0, 'float16': 0}
  for name, tensor in tensors.items():
    size[types[name]] += tensor.size
  dtype = 'bfloat16' if 2 * size['bfloat16'] > sum(size.values()) else 'float32'
  model = dataclasses.replace(cfg.model, dtype=dtype)
  params = hf_tensors.from_state_dict(
      model, {k: np.asarray(v, np.float32) for k, v in tensors.items()},
      kind == 'mom')
  return dataclasses.replace(cfg, model=model), params


def stored_types(directory: str | pathlib.Path) -> dict[str, str]:
  """Return the type of each tensor of a published checkpoint, for `save`."""
  directory = pathlib.Path(directory)
  return _read(directory, settings.format_of(read_config(directory))).types


def _read(directory: pathlib.Path, kind: str) -> Stored:
  """Read all tensors, in the present form of their format."""
  safetensors = _safetensors()
  tensors: dict[str, Any] = {}
  types: dict[str, str] = {}
  for file in _weight_files(directory):
    path = directory / file
    if not path.is_file():
      pickles = sorted(p.name for p in directory.glob('*.bin'))
      more = ''
      if pickles:
        more = (f' Pickles such as {pickles[0]} are not read, as they can run'
                ' anything; save the model as safetensors.')
      raise config.UserError(
          f'{directory} is no safetensors checkpoint: {path} is missing.{more}')
    try:
      with safetensors.safe_open(path, framework='flax') as opened:
        for name in opened.keys():  # noqa: SIM118, no mapping
          stored = opened.get_slice(name).get_dtype()
          if stored not in _TYPES:
            raise config.UserError(
                f'{path} has tensor {name} of type {stored}; types that are'
                f' read are {", ".join(_TYPES)}.'
            )
          tensors[name] = opened.get_tensor(name)
          types[name] = _TYPES[stored]
    except (OSError, safetensors.SafetensorError) as e:
      raise config.UserError(
          f'{path} cannot be read ({e}); copy it again.') from e
  return Stored(hf_tensors.present_form(tensors, kind),
                hf_tensors.present_form(types, kind))


def _weight_files(directory: pathlib.Path) -> list[str]:
  """List the files of tensors: one, or those that the index names."""
  if not (directory / INDEX).is_file():
    return [WEIGHTS]
  index = _read_json(directory / INDEX)
  weights = index.get('weight_map')
  if not isinstance(weights, dict) or not weights or not all(
      isinstance(name, str) and name == pathlib.PurePath(name).name
      for name in weights.values()):
    raise config.UserError(
        f'{directory / INDEX} must have a "weight_map" from tensors to files of'
        ' this folder; copy it again.'
    )
  files = sorted(set(weights.values()))
  if (directory / WEIGHTS).is_file() and WEIGHTS not in files:
    raise config.UserError(
        f'{directory} has {WEIGHTS} and an index of other files ({files[0]},'
        f' ...); remove {INDEX} or {WEIGHTS}, whichever is of another save.'
    )
  return files


def save(
    directory: str | pathlib.Path,
    cfg: config.Config,
    params: Tree,
    shard: int = SHARD,
    types: Mapping[str, str] | None = None,
    token_ids: Mapping[str, Any] | None = None,
) -> None:
  """Write `config.json` and safetensors as the official code does.

  Weights of an earlier save into the folder are replaced once all new files are
  written.

  Args:
    shard: maximum bytes of tensors per file; several files get an index.
    types: of tensors that are not stored as `model.dtype`, by name. With those
      of `stored_types`, what `load` read is written back bit by bit.
    token_ids: 'bos_token_id', 'eos_token_id' and 'pad_token_id' of the config.
  Raises:
    UserError: the model has parts that no published format holds.
  """
  safetensors = _safetensors()
  hf = settings.config_to_hf(cfg) | dict(token_ids or {})
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = hf_tensors.to_state_dict(
      cfg.model, params, hf['model_type'] == 'mom')
  types = {name: (types or {}).get(name, cfg.model.dtype) for name in tensors}
  sizes = {name: tensor.size * jnp.dtype(types[name]).itemsize
           for name, tensor in tensors.items()}
  parts: list[dict[str, Any]] = [{}]
  left = shard
  for name, tensor in tensors.items():
    if parts[-1] and sizes[name] > left:
      parts.append({})
      left = shard
    parts[-1][name] = jnp.asarray(tensor, types[name])
    left -= sizes[name]
  names = [WEIGHTS] if len(parts) == 1 else [
      f'model-{i + 1:05d}-of-{len(parts):05d}.safetensors'
      for i in range(len(parts))]
  for name, part in zip(names, parts):
    partial = directory / f'{name}.partial'
    partial.write_bytes(b'')
    mode = partial.stat().st_mode  # by umask; safetensors makes its own file
    safetensors.flax.save_file(part, partial, metadata={'format': 'pt'})
    partial.chmod(mode)
  for old in directory.iterdir():
    if old.name in (WEIGHTS, INDEX) or _SHARDS.fullmatch(old.name):
      old.unlink()
  for name in names:
    (directory / f'{name}.partial').replace(directory / name)
  if len(parts) > 1:
    write_json(directory / INDEX, {
        'metadata': {'total_size': sum(sizes.values())},
        'weight_map': {t: name for name, part in zip(names, parts)
                       for t in part},
    })
  write_json(directory / CONFIG, hf)


def read_config(directory: pathlib.Path) -> dict[str, Any]:
  return _read_json(directory / CONFIG)


def token_ids(directory: pathlib.Path) -> dict[str, Any]:
  """Return the ids of special tokens, as config.json has them.

  Those that end a text in generation are read too, and added to the ones of
  config.json; ids in neither file are left out.

  Raises:
    UserError: one is no id.
  """
  hf, found = read_config(directory), {}
  generation = directory / GENERATION
  more = _read_json(generation) if generation.is_file() else {}
  for kind in ('bos', 'eos', 'pad'):
    key, ids = f'{kind}_token_id', []
    for value in (hf.get(key), more.get(key)):
      for i in value if isinstance(value, list) else [value]:
        if i is not None and (type(i) is not int or i < -1):
          raise config.UserError(
              f'{directory} has {key}={value!r}; it must be an id from 0 up'
              ' or a list of such.'
          )
        if i not in (None, -1, *ids):
          ids.append(i)
    if ids and (kind != 'eos' or len(ids) == 1):
      found[key] = ids[0]
    elif ids:
      found[key] = ids
    elif key in hf:
      found[key] = None
  return found


def special_tokens(directory: pathlib.Path) -> dict[str, str]:
  """Return the texts of 'bos_token' and so on in the tokenizer's files."""
  found = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    if (directory / name).is_file():
      said = _read_json(directory / name)
      for key in ('bos_token', 'eos_token', 'pad_token'):
        value = said.get(key)
        value = value.get('content') if isinstance(value, dict) else value
        if isinstance(value, str) and value:
          found[key] = value
  return found


def copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> list[str]:
  """Copy the files of a tokenizer and of generation; return their names."""
  return _copy(source, target, TOKENIZER)


def write_tokenizer(
    directory: pathlib.Path, suffix: str, content: bytes,
    specials: Sequence[str],
) -> None:
  """Write the file of a text tokenizer for other programs, if they have one.

  Args:
    suffix, content: of the file; both empty for the tokenizer of bytes.
    specials: names of special tokens after those of the file, 'pad' and 'eos'
      in angle brackets among them; none if the file has all.
  """
  if suffix not in ('', '.json', '.model'):
    return
  name = f'tokenizer{suffix or ".json"}'
  if specials and suffix != '.model':
    made = tokenizer_file.with_specials(content, specials)
    if made is None:
      return
    content = made
    write_json(directory / 'tokenizer_config.json', {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': '<eos>',
        'eos_token': '<eos>', 'pad_token': '<pad>'})
  (directory / name).write_bytes(content)


def copy_record(source: pathlib.Path, target: pathlib.Path) -> None:
  """Copy all that a run keeps of a published model to another run."""
  _copy(source, target, (*TOKENIZER, RECORD))


def _copy(source, target, names) -> list[str]:
  found = [name for name in names if (source / name).is_file()]
  for name in found:
    target.mkdir(parents=True, exist_ok=True)
    if not ((target / name).exists()
            and os.path.samefile(source / name, target / name)):
      (target / name).write_bytes((source / name).read_bytes())
  return found


def write_json(path: pathlib.Path, value: Any) -> None:
  path.write_text(json.dumps(value, indent=2) + '\n', encoding='utf-8')


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except FileNotFoundError as e:
    raise config.UserError(
        f'{path.parent} is no safetensors checkpoint: {path} is missing.'
    ) from e
  except (OSError, ValueError, RecursionError) as e:
    raise config.UserError(f'{path} cannot be read ({e}).') from e
  if not isinstance(value, dict):
    raise config.UserError(f'{path} must hold a JSON object.')
  return value


def read_record(directory: pathlib.Path) -> dict[str, Any]:
  """Return what `published.json` of a run says, {} without it."""
  path = directory / RECORD
  return _read_json(path) if path.is_file() else {}


def _safetensors():
  try:
    import safetensors
    import safetensors.flax
  except ImportError as e:
    raise config.UserError(
        "reading checkpoints needs safetensors; pip install 'mom_jax[hf]'."
    ) from e
  return safetensors
