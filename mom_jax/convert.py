"""The bridge to published checkpoints: official MoM layout in and out.

One table says where each tensor of the official state dict (torch layout,
`y = x W^T`) lies in our tree and how its axes turn; reading and writing both go
by it, so that a round trip is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mom_jax import config

Tree = dict[str, Any]


class Place(NamedTuple):
  """Where an official tensor lies: a path in our tree, and its part there.

  `memory` is the index on the leading memory axis of a mixer's projection,
  None for parameters without one.
  """

  path: tuple[str, ...]
  shape: tuple[int, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]
  memory: int | None = None


def _linear(path, inputs, outputs, memory=None) -> Place:
  """[out, in] to [*inputs, *outputs]."""
  shape = (*inputs, *outputs)
  return Place(
      path, shape, lambda w: w.T.reshape(shape),
      lambda p: p.reshape(math.prod(inputs), -1).T, memory,
  )


def _conv(path, width, heads, size) -> Place:
  """[channels, 1, W] to [W, H, size]; the last tap is the current token."""
  shape = (width, heads, size)
  return Place(
      path, shape, lambda w: w[:, 0].T.reshape(shape),
      lambda p: p.reshape(width, -1).T[:, None],
  )


def _plain(path, *shape) -> Place:
  return Place(path, shape, lambda w: w, lambda p: p)


def mom_places(width: int, mixer: config.Mixer) -> dict[str, Place]:
  """Official names of a MoM layer's tensors."""
  D, H, K, V = width, mixer.num_heads, mixer.key_dim, mixer.value_dim
  places = {
      'q_proj.weight': _linear(('query',), (D,), (H, K)),
      'A_log': _plain(('A_log',), H),
      'dt_bias': _plain(('dt_bias',), H),
      'o_norm.weight': _plain(('norm', 'scale'), V),
      'o_proj.weight': _linear(('output', 'kernel'), (H, V), (D,)),
  }
  for theirs, ours, size in (
      ('q', 'query', K), ('k', 'key', K), ('v', 'value', V)):
    places[f'{theirs}_conv1d.weight'] = _conv(
        (f'conv_{ours}',), mixer.conv_width, H, size)
  if mixer.num_memories > 1:
    places['gate.weight'] = _linear(
        ('router', 'kernel'), (D,), (mixer.num_memories,))
  if mixer.output_gate:
    places['g_proj.weight'] = _linear(('gate', 'kernel'), (D,), (H, V))
  projections = {
      'k': ('key', (H, K)), 'v': ('value', (H, V)),
      'b': ('beta', (H,)), 'a': ('decay', (H,)),
  }
  routed = 0 if mixer.single_kv_proj else mixer.num_memories
  for theirs, (ours, shape) in projections.items():
    for m in range(routed):
      places[f'{theirs}_proj.{m}.weight'] = _linear((ours,), (D,), shape, m)
    if mixer.shared or mixer.single_kv_proj:
      places[f'shared_{theirs}.weight'] = _linear(
          (ours,), (D,), shape, routed)
  return places


def _attention_places(width, attention) -> dict[str, Place]:
  D, K = width, attention.head_dim
  H, G = attention.num_heads, attention.num_kv_heads
  return {
      'q_proj.weight': _linear(('query', 'kernel'), (D,), (H, K)),
      'k_proj.weight': _linear(('key', 'kernel'), (D,), (G, K)),
      'v_proj.weight': _linear(('value', 'kernel'), (D,), (G, K)),
      'o_proj.weight': _linear(('output', 'kernel'), (H, K), (D,)),
  }


def _model_places(model: config.Model) -> dict[str, tuple[int | None, Place]]:
  """Official name to (repeat of the unit or None, place)."""
  D, F, W = model.width, model.mlp.hidden, model.vocab_size
  places = {
      'model.embeddings.weight': (None, _plain(('embed', 'embedding'), W, D)),
      'model.norm.weight': (None, _plain(('final_norm', 'scale'), D)),
  }
  if not model.tie_embeddings:
    places['lm_head.weight'] = (
        None, _linear(('output', 'kernel'), (D,), (W,)))
  mixers = {
      'mom': lambda: mom_places(D, model.mixer),
      'attention': lambda: _attention_places(D, model.attention),
  }
  for layer in range(model.num_layers):
    repeat, i = divmod(layer, len(model.unit))
    block = ('units', f'block_{i}')
    inside = {
        'attn_norm.weight': _plain(('mixer_norm', 'scale'), D),
        'mlp_norm.weight': _plain(('channel_norm', 'scale'), D),
        'mlp.gate_proj.weight': _linear(('channel', 'gate', 'kernel'), (D,), (F,)),
        'mlp.up_proj.weight': _linear(('channel', 'up', 'kernel'), (D,), (F,)),
        'mlp.down_proj.weight': _linear(('channel', 'down', 'kernel'), (F,), (D,)),
    }
    for name, place in mixers[model.unit[i][0]]().items():
      inside[f'attn.{name}'] = place._replace(path=('mixer', *place.path))
    for name, place in inside.items():
      places[f'model.layers.{layer}.{name}'] = (
          repeat, place._replace(path=(*block, *place.path)))
  return places


def _fill(
    places: Mapping[str, tuple[int | None, Place]],
    repeats: int,
    tensors: Mapping[str, np.ndarray],
) -> Tree:
  """Our tree from official tensors; refuses missing, unknown, misshapen ones."""
  missing, unknown = set(places) - set(tensors), set(tensors) - set(places)
  if missing or unknown:
    raise config.UserError(
        f'the checkpoint does not fit its config: missing tensors'
        f' {sorted(missing)}, unknown tensors {sorted(unknown)}.'
    )
  memories: dict[tuple[str, ...], int] = {}
  for _, place in places.values():
    if place.memory is not None:
      memories[place.path] = max(memories.get(place.path, 0), place.memory + 1)
  flat: dict[tuple[str, ...], np.ndarray] = {}
  for name, (repeat, place) in places.items():
    try:
      value = np.asarray(place.to_ours(np.asarray(tensors[name])))
    except (ValueError, IndexError) as e:
      raise config.UserError(
          f'tensor {name} has shape {np.shape(tensors[name])}, which does not'
          f' fit {place.shape}: {e}.'
      ) from e
    if value.shape != place.shape:
      raise config.UserError(
          f'tensor {name} has shape {np.shape(tensors[name])}, which does not'
          f' fit {place.shape}.'
      )
    lead = () if repeat is None else (repeats,)
    lead += () if place.memory is None else (memories[place.path],)
    index = () if repeat is None else (repeat,)
    index += () if place.memory is None else (place.memory,)
    whole = flat.setdefault(
        place.path, np.empty(lead + place.shape, np.float32))
    whole[index] = value.astype(np.float32)
  tree: Tree = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree


def mom_params(
    width: int, mixer: config.Mixer, tensors: Mapping[str, np.ndarray]
) -> Tree:
  """Parameters of one `models.mom.Mom` from an official layer's state dict."""
  places = mom_places(width, mixer)
  return _fill({k: (None, p) for k, p in places.items()}, 1, tensors)


def from_state_dict(
    model: config.Model, tensors: Mapping[str, np.ndarray]
) -> Tree:
  """Parameters of `models.LM` from an official model's state dict."""
  return _fill(_model_places(model), model.repeats, tensors)


def to_state_dict(model: config.Model, params: Tree) -> dict[str, np.ndarray]:
  """The official state dict of our parameters."""
  tensors = {}
  for name, (repeat, place) in _model_places(model).items():
    value = params
    for key in place.path:
      value = value[key]
    value = np.asarray(value)
    value = value if repeat is None else value[repeat]
    value = value if place.memory is None else value[place.memory]
    tensors[name] = np.ascontiguousarray(place.to_theirs(value))
  return tensors


def config_from_hf(hf: Mapping[str, Any]) -> config.Config:
  """Our settings for an official `config.json`.

  Raises:
    UserError: another model type, or a setting with no counterpart here.
  """
  kind = hf.get('model_type')
  if kind not in ('mom', 'mom_gated_deltanet'):
    raise config.UserError(
        f"config.json has model_type={kind!r}; convert reads 'mom' and"
        " 'mom_gated_deltanet'."
    )
  for key, wanted in (
      ('mom_backend', 'gated_deltanet'), ('use_short_conv', True),
      ('hidden_act', 'swish')):
    if hf.get(key, wanted) != wanted:
      raise config.UserError(
          f'config.json has {key}={hf[key]!r}; only {wanted!r} is supported.'
      )
  D, H, K = hf['hidden_size'], hf['num_heads'], hf['head_dim']
  hidden = hf.get('intermediate_size')
  if hidden is None:
    hidden = 256 * -(-int(D * hf['hidden_ratio'] * 2 / 3) // 256)
  attn = hf.get('attn') or {}
  heads = attn.get('num_heads', H)
  layers = hf['num_hidden_layers']
  kinds = ['attention' if i in attn.get('layers', ()) else 'mom'
           for i in range(layers)]
  # The shortest unit whose repetition gives all layers.
  unit = next(n for n in range(1, layers + 1)
              if layers % n == 0 and kinds == kinds[:n] * (layers // n))
  base = config.Config()
  model = dataclasses.replace(
      base.model, vocab_size=hf['vocab_size'], width=D, num_layers=layers,
      pattern=' '.join(f'{kind}/mlp' for kind in kinds[:unit]),
      norm_eps=hf['norm_eps'], tie_embeddings=hf['tie_word_embeddings'],
      mlp=config.Mlp(hidden=hidden),
      attention=config.Attention(
          num_heads=heads, num_kv_heads=attn.get('num_kv_heads') or heads,
          head_dim=D // heads, qk_norm=False,
          window=attn.get('window_size') or 0,
      ),
      mixer=config.Mixer(
          num_memories=hf['num_memories'], top_k=hf['topk'],
          shared=hf['shared_mem'], single_kv_proj=hf['single_kv_proj'],
          num_heads=H, key_dim=K, value_dim=int(K * hf['expand_v']),
          conv_width=hf.get('conv_size', 4),
          output_gate=hf['use_output_gate'],
      ),
  )
  return config.validate(dataclasses.replace(base, model=model))


def config_to_hf(cfg: config.Config) -> dict[str, Any]:
  """An official `config.json` for our settings.

  Raises:
    UserError: the model has parts that the official layout lacks.
  """
  model, mixer, attention = cfg.model, cfg.model.mixer, cfg.model.attention
  lacks = [
      f'config.model.{key}={value!r}'
      for key, value, wanted in (
          ('mixer.rule', mixer.rule, 'gated_delta'),
          ('mixer_norm', model.mixer_norm, 'pre'),
          ('channel_norm', model.channel_norm, 'pre'),
      )
      if value != wanted
  ]
  kinds = [model.unit[i % len(model.unit)] for i in range(model.num_layers)]
  if any(channel != 'mlp' for _, channel in kinds):
    lacks.append(f'config.model.pattern={model.pattern!r}')
  if mixer.value_dim % mixer.key_dim:
    lacks.append(f'config.model.mixer.value_dim={mixer.value_dim}')
  where = [i for i, (kind, _) in enumerate(kinds) if kind == 'attention']
  if where and (attention.qk_norm or attention.rope_theta != 10000.0):
    lacks.append('config.model.attention with qk_norm or another rope_theta')
  if lacks:
    raise config.UserError(
        'the official layout has no place for ' + ', '.join(lacks) + '.'
    )
  attn = None
  if where:
    attn = dict(
        layers=where, num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        window_size=attention.window or None,
    )
  return dict(
      architectures=['MomForCausalLM'], model_type='mom',
      mom_backend='gated_deltanet', attn_mode='chunk', attn=attn,
      hidden_size=model.width, num_hidden_layers=model.num_layers,
      vocab_size=model.vocab_size, norm_eps=model.norm_eps,
      tie_word_embeddings=model.tie_embeddings, hidden_act='swish',
      hidden_ratio=4, intermediate_size=model.mlp.hidden,
      num_heads=mixer.num_heads, head_dim=mixer.key_dim,
      expand_v=mixer.value_dim // mixer.key_dim, conv_size=mixer.conv_width,
      use_short_conv=True, num_memories=mixer.num_memories, topk=mixer.top_k,
      shared_mem=mixer.shared, single_kv_proj=mixer.single_kv_proj,
      use_output_gate=mixer.output_gate, aux_loss_scale=cfg.loss.balance,
      dtype=model.dtype,
  )


def load_hf(directory: str | pathlib.Path) -> tuple[config.Config, Tree]:
  """Reads a checkpoint that the official MoM wrote.

  Args:
    directory: holds `config.json` and `model.safetensors`, or the shards that
      `model.safetensors.index.json` lists. Pickles are never read.
  Returns:
    (config, params), params in float32; `model.dtype` is the stored type.
  Raises:
    UserError: a file is missing, a tensor is unknown, missing or misshapen.
  """
  safetensors = _safetensors()
  directory = pathlib.Path(directory)
  try:
    hf = json.loads((directory / 'config.json').read_text(encoding='utf-8'))
    index = directory / 'model.safetensors.index.json'
    files = ['model.safetensors']
    if index.exists():
      weights = json.loads(index.read_text(encoding='utf-8'))['weight_map']
      files = sorted(set(weights.values()))
    tensors: dict[str, Any] = {}
    for file in files:
      tensors |= safetensors.load_file(directory / file)
  except FileNotFoundError as e:
    raise config.UserError(
        f'{directory} is no safetensors checkpoint: {e.filename or e} is'
        ' missing.'
    ) from e
  cfg = config_from_hf(hf)
  stored = {str(t.dtype) for t in tensors.values()}
  dtype = 'bfloat16' if stored == {'bfloat16'} else 'float32'
  model = dataclasses.replace(cfg.model, dtype=dtype)
  params = from_state_dict(
      model, {k: np.asarray(v, np.float32) for k, v in tensors.items()})
  return dataclasses.replace(cfg, model=model), params


def save_hf(
    directory: str | pathlib.Path, cfg: config.Config, params: Tree
) -> None:
  """Writes `config.json` and `model.safetensors` as the official MoM does.

  Tensors are stored as `model.dtype`; what `load_hf` read comes out bit-equal.
  """
  safetensors = _safetensors()
  hf = config_to_hf(cfg)
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = to_state_dict(cfg.model, params)
  safetensors.save_file(
      {k: jnp.asarray(v, cfg.model.dtype) for k, v in tensors.items()},
      directory / 'model.safetensors', metadata={'format': 'pt'},
  )
  (directory / 'config.json').write_text(
      json.dumps(hf, indent=2) + '\n', encoding='utf-8')


def _safetensors():
  try:
    import safetensors.flax
  except ImportError as e:
    raise config.UserError(
        "reading checkpoints needs safetensors; pip install 'mom_jax[hf]'."
    ) from e
  return safetensors.flax
