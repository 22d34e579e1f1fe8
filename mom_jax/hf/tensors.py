"""Names of the tensors of published models, and their maps to ours."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mom_jax import config
from mom_jax.hf import tensor_maps
from mom_jax.hf.tensor_maps import TensorMap, TensorMaps, Tree
from mom_jax.models import memory_params, outputs


def _base(
    width: int, mixer: config.Mixer, names: Mapping[str, str]
) -> TensorMaps:
  """Map the tensors that all layers with one memory have.

  Args:
    names: published names of 'q', 'k', 'v' where they differ.
  """
  D, H, K, V = width, mixer.num_heads, mixer.key_dim, mixer.value_dim
  U = mixer.key_heads or H
  q, k, v = (names.get(name, name) for name in 'qkv')
  found = {
      f'{q}_proj.weight': tensor_maps.linear(('query',), (D,), (U, K)),
      f'{k}_proj.weight': _single(tensor_maps.linear(('key',), (D,), (U, K))),
      f'{v}_proj.weight': _single(tensor_maps.linear(('value',), (D,), (H, V))),
      'o_proj.weight': tensor_maps.linear(('output', 'kernel'), (H, V), (D,)),
  }
  if mixer.conv_width:
    for theirs, ours, heads, size in (
        (q, 'query', U, K), (k, 'key', U, K), (v, 'value', H, V)):
      found[f'{theirs}_conv1d.weight'] = tensor_maps.conv(
          (f'conv_{ours}',), mixer.conv_width, heads, size)
  if mixer.output_gate not in ('none', 'self_silu'):
    found['g_proj.weight'] = tensor_maps.linear(
        ('gate', 'kernel'), (D,), (H, V))
  return found


def _single(tensor: TensorMap) -> TensorMap:
  """Map a tensor to the only memory."""
  return tensor_maps.one_of(tensor, 0, 1)


def _norm(name: str, mixer: config.Mixer) -> TensorMaps:
  H, V = mixer.num_heads, mixer.value_dim
  scale = tensor_maps.plain(('norm', 'scale'), V)
  if mixer.output_norm in ('all', 'group'):
    scale = tensor_maps.flat(('norm', 'scale'), H, V)
  return {f'{name}.weight': scale}


def _gate(ours: str, width: int, *shape: int) -> TensorMap:
  return _single(tensor_maps.linear((ours,), (width,), shape))


def _delta(width, mixer) -> TensorMaps:
  return _base(width, mixer, {}) | _norm('o_norm', mixer) | {
      'b_proj.weight': _gate('beta', width, mixer.num_heads)}


def _gated_delta(width, mixer) -> TensorMaps:
  H = mixer.num_heads
  return _delta(width, mixer) | {
      'a_proj.weight': _gate('decay', width, H),
      'A_log': tensor_maps.plain(('A_log',), H),
      'dt_bias': tensor_maps.plain(('dt_bias',), H),
  }


def _retention(width, mixer) -> TensorMaps:
  gated = mixer.output_gate == 'silu'
  return _base(width, mixer, {}) | _norm(
      'g_norm_swish_gate' if gated else 'g_norm', mixer)


def _gla(width, mixer) -> TensorMaps:
  H, K = mixer.num_heads, mixer.key_dim
  return _retention(width, mixer) | {
      'gk_proj.0.weight': _gate('decay_in', width, 16),
      'gk_proj.1.weight': _gate('decay_out', 16, H, K),
      'gk_proj.1.bias': tensor_maps.flat(('bias',), H, K),
  }


def _hgrn2(width, mixer) -> TensorMaps:
  return _base(width, mixer, {'k': 'f', 'v': 'i'}) | _norm('g_norm', mixer)


def _gsa(width, mixer) -> TensorMaps:
  return _base(width, mixer, {}) | _norm('g_norm', mixer) | {
      'f_proj.weight': _gate('forget', width, mixer.num_heads, 64)}


# Our names of matrices of feature maps -> theirs.
_MAPS = {
    'hadamard': {'map': 'layer1', 'map_2': 'layer2'},
    'hedgehog': {'map': 'layer'},
    't2r': {'map': 'layer'},
}


def _linear(width, mixer) -> TensorMaps:
  K = mixer.key_dim
  found = _base(width, mixer, {}) | _norm('norm', mixer)
  for ours, theirs in _MAPS.get(mixer.feature_map, {}).items():
    for which in 'qk':
      name = f'feature_map_{which}.{theirs}'
      found[f'{name}.weight'] = tensor_maps.linear(
          (f'{ours}_{which}',), (K,), (K,))
      if mixer.feature_map != 't2r':
        found[f'{name}.bias'] = tensor_maps.plain((f'{ours}_{which}_bias',), K)
  return found


# Our names of shifted projections -> theirs; their low-rank gates -> ours.
_SHIFTED = {'query': 'r', 'key': 'k', 'value': 'v', 'decay': 'w', 'rate': 'a',
            'output': 'g'}
_LORAS = {
    'w': ('decay', 'w0'), 'a': ('rate', 'a0'), 'v': ('first', 'first_bias')}


def _rwkv7(width, mixer) -> TensorMaps:
  D, H, K, V = width, mixer.num_heads, mixer.key_dim, mixer.value_dim
  found = _base(width, dataclasses.replace(mixer, output_gate='none'),
                {'q': 'r'}) | _norm('g_norm', mixer)
  found |= {
      'g_norm.bias': tensor_maps.flat(('norm', 'bias'), H, V),
      'g_lora.lora.0.weight': tensor_maps.linear(
          ('gate_in', 'kernel'), (D,), (mixer.gate_rank,)),
      'g_lora.lora.2.weight': tensor_maps.linear(
          ('gate', 'kernel'), (mixer.gate_rank,), (H, V)),
      'k_k': tensor_maps.flat(('k_k',), H, K),
      'k_a': tensor_maps.flat(('k_a',), H, K),
      'r_k': tensor_maps.plain(('r_k',), H, K),
  }
  names = memory_params.shifted_projections(mixer)
  for i, name in enumerate(names):
    found[f'x_{_SHIFTED[name]}'] = tensor_maps.one_of(
        tensor_maps.vector(('shift',), D), i, len(names))
  for theirs, (ours, bias) in _LORAS.items():
    size = V if theirs == 'v' else K
    rank = memory_params.ranks(mixer, D)[ours]
    found |= {
        f'{theirs}_lora.lora.0.weight': _gate(f'{ours}_in', D, rank),
        f'{theirs}_lora.lora.2.weight': _gate(f'{ours}_out', rank, H, size),
        f'{theirs}_lora.lora.2.bias': tensor_maps.flat((bias,), H, size),
    }
  return found


def _mamba2(width, mixer) -> TensorMaps:
  D, H, K, V = width, mixer.num_heads, mixer.key_dim, mixer.value_dim
  U, W = mixer.key_heads, mixer.conv_width
  sizes = {'value': (H, V), 'key': (U, K), 'query': (U, K)}  # x, B and C
  found = {
      'in_proj.weight': (
          tensor_maps.linear(('gate', 'kernel'), (D,), (H, V)),
          _gate('value', D, H, V), _gate('key', D, U, K),
          tensor_maps.linear(('query',), (D,), (U, K)), _gate('decay', D, H)),
      'conv1d.weight': tuple(
          tensor_maps.conv((f'conv_{name}',), W, *size)
          for name, size in sizes.items()),
      'out_proj.weight': tensor_maps.linear(('output', 'kernel'), (H, V), (D,)),
  } | _norm('norm', mixer)
  if mixer.conv_bias:
    found['conv1d.bias'] = tuple(
        tensor_maps.flat((f'conv_{name}_bias',), *size)
        for name, size in sizes.items())
  return found | {
      name: tensor_maps.plain((name,), H) for name in ('A_log', 'D', 'dt_bias')}


# Maps of a layer with a single memory and no router, by rule.
SINGLE = {
    'gated_delta': _gated_delta,
    'delta': _delta,
    'gla': _gla,
    'hgrn2': _hgrn2,
    'gsa': _gsa,
    'retention': _retention,
    'linear': _linear,
    'rwkv7': _rwkv7,
    'mamba2': _mamba2,
}


class Names(NamedTuple):
  """Published names outside the mixers."""

  root: str = 'model'
  final: str = 'norm'
  mixer: str = 'attn'
  mixer_norm: str = 'attn_norm'
  channel_norm: str = 'mlp_norm'


NAMES = {
    'rwkv7': Names(channel_norm='ffn_norm'),
    'mamba2': Names('backbone', 'norm_f', 'mixer', 'norm'),
}


def _mom(width: int, mixer: config.Mixer) -> TensorMaps:
  """Map the tensors of a MoM layer."""
  D, H, K, V = width, mixer.num_heads, mixer.key_dim, mixer.value_dim
  found = {
      'q_proj.weight': tensor_maps.linear(('query',), (D,), (H, K)),
      'A_log': tensor_maps.plain(('A_log',), H),
      'dt_bias': tensor_maps.plain(('dt_bias',), H),
      'o_norm.weight': tensor_maps.plain(('norm', 'scale'), V),
      'o_proj.weight': tensor_maps.linear(('output', 'kernel'), (H, V), (D,)),
  }
  for theirs, ours, size in (
      ('q', 'query', K), ('k', 'key', K), ('v', 'value', V)):
    found[f'{theirs}_conv1d.weight'] = tensor_maps.conv(
        (f'conv_{ours}',), mixer.conv_width, H, size)
  if mixer.num_memories > 1:
    found['gate.weight'] = tensor_maps.linear(
        ('router', 'kernel'), (D,), (mixer.num_memories,))
  if mixer.output_gate != 'none':
    found['g_proj.weight'] = tensor_maps.linear(
        ('gate', 'kernel'), (D,), (H, V))
  projections = {
      'k': ('key', (H, K)), 'v': ('value', (H, V)),
      'b': ('beta', (H,)), 'a': ('decay', (H,)),
  }
  routed = 0 if mixer.single_kv_proj else mixer.num_memories
  names = [f'{{}}_proj.{m}.weight' for m in range(routed)]
  if mixer.shared or mixer.single_kv_proj:
    names.append('shared_{}.weight')
  for theirs, (ours, shape) in projections.items():
    projection = tensor_maps.linear((ours,), (D,), shape)
    for i, name in enumerate(names):
      found[name.format(theirs)] = tensor_maps.one_of(
          projection, i, len(names))
  return found


def _attention(width, attention: config.Attention) -> TensorMaps:
  D, K = width, attention.head_dim
  H, G = attention.num_heads, attention.num_kv_heads
  found = {
      'q_proj.weight': tensor_maps.linear(('query', 'kernel'), (D,), (H, K)),
      'k_proj.weight': tensor_maps.linear(('key', 'kernel'), (D,), (G, K)),
      'v_proj.weight': tensor_maps.linear(('value', 'kernel'), (D,), (G, K)),
      'o_proj.weight': tensor_maps.linear(('output', 'kernel'), (H, K), (D,)),
  }
  if attention.qk_norm:
    found['q_norm.weight'] = tensor_maps.plain(('query_norm', 'scale'), K)
    found['k_norm.weight'] = tensor_maps.plain(('key_norm', 'scale'), K)
  return found


# Mixing coefficients of shifted projections, in the order of the rows of `x_x`,
# which held them all.
_X_X = 'rwkvag'


def present_form(tensors: Mapping[str, Any], kind: str) -> dict[str, Any]:
  """Rename and split tensors of earlier forms of a format.

  Args:
    tensors: by name; arrays, or types, which their parts share.
    kind: name of the format.
  """
  found = {}
  for name, tensor in tensors.items():
    if kind == 'rwkv7' and name.endswith('.attn.x_x'):
      if isinstance(tensor, str):
        rows = [tensor] * len(_X_X)
      elif tensor.ndim != 2 or len(tensor) != len(_X_X):
        raise config.UserError(
            f'tensor {name} has shape {tensor.shape}; it must have'
            f' {len(_X_X)} rows.'
        )
      else:
        rows = [row[None, None] for row in tensor]
      found |= {f'{name[:-1]}{x}': row for x, row in zip(_X_X, rows)}
    elif kind == 'mamba2':
      found[name.replace('.embedding.', '.embeddings.')] = tensor
    else:
      found[name] = tensor
  return found


def is_single(mixer: config.Mixer) -> bool:
  """Return True for a single memory without a router."""
  return mixer.num_memories == 1 and not mixer.shared


def _stream_norm(name: str, path: str, model: config.Model) -> TensorMaps:
  """Map a norm of the residual stream."""
  found = {f'{name}.weight': tensor_maps.plain((path, 'scale'), model.width)}
  if model.norm == 'layer':
    found[f'{name}.bias'] = tensor_maps.plain((path, 'bias'), model.width)
  return found


def _channel(model: config.Model, kind: str) -> TensorMaps:
  """Map the tensors of a channel mixer without its norm."""
  D, F = model.width, model.mlp.hidden
  if kind == 'none':
    return {}
  down = tensor_maps.linear(('channel', 'down', 'kernel'), (F,), (D,))
  if kind == 'shift_mlp':
    return {
        'ffn.x_k': tensor_maps.plain(('channel', 'shift'), D),
        'ffn.key.weight': tensor_maps.linear(
            ('channel', 'up', 'kernel'), (D,), (F,)),
        'ffn.value.weight': down,
    }
  gate_up = tensor_maps.linear(('channel', 'gate_up', 'kernel'), (D,), (F,))
  return {
      'mlp.gate_proj.weight': tensor_maps.one_of(gate_up, 0, 2, axis=1),
      'mlp.up_proj.weight': tensor_maps.one_of(gate_up, 1, 2, axis=1),
      'mlp.down_proj.weight': down,
  }


def _model(
    model: config.Model, mom: bool
) -> tuple[TensorMaps, list[TensorMap]]:
  """Map the tensors of a model; also list our parameters without a tensor.

  Args:
    mom: tensors are named as in MoM, else as in layers of a single memory.
  """
  D, W, mixer = model.width, model.vocab_size, model.mixer
  kinds = {name for name, _ in model.unit}
  names = Names()
  if not mom and 'mom' in kinds:
    names = NAMES.get(mixer.rule, names)
  root, unused = names.root, []
  found = {
      f'{root}.embeddings.weight': tensor_maps.plain(
          ('embed', 'embedding'), W, D),
  } | _stream_norm(f'{root}.{names.final}', 'final_norm', model)
  if model.embed_norm:
    found |= _stream_norm(f'{root}.layers.0.pre_norm', 'embed_norm', model)
  if not model.tie_embeddings:
    found['lm_head.weight'] = tensor_maps.linear(
        ('output', 'kernel'), (D,), (W,))
  if not mom and mixer.rule == 'hgrn2' and 'mom' in kinds:
    found['model.lower_bounds'] = tensor_maps.rows(
        ('layers_bound',), model.num_layers, mixer.num_heads, mixer.key_dim)
  mixers = {
      'mom': lambda: (_mom if mom else SINGLE[mixer.rule])(D, mixer),
      'attention': lambda: _attention(D, model.attention),
  }
  for layer in range(model.num_layers):
    repeat, i = divmod(layer, len(model.unit))
    kind, channel = model.unit[i]
    inside = _stream_norm(names.mixer_norm, 'mixer_norm', model)
    if channel != 'none':
      inside |= _stream_norm(names.channel_norm, 'channel_norm', model)
      inside |= _channel(model, channel)
    for name, tensor in mixers[kind]().items():
      inside[f'{names.mixer}.{name}'] = tensor_maps.map_parts(
          lambda p: p._replace(path=('mixer', *p.path)), tensor)
    for name, tensor in inside.items():
      tensor = tensor_maps.map_parts(
          lambda p, at=(repeat, i): tensor_maps.one_of(
              p._replace(path=('units', outputs.block_name(at[1]), *p.path)),
              at[0], model.repeats), tensor)
      if layer == 0 and name.startswith(f'{names.mixer}.v_lora'):
        unused.append(tensor)  # the first layer has no other values to mix in
      else:
        found[f'{root}.layers.{layer}.{name}'] = tensor
  return found, unused


def mom_params(
    width: int, mixer: config.Mixer, tensors: Mapping[str, np.ndarray]
) -> Tree:
  """Convert the tensors of an official MoM layer to parameters of `Mom`."""
  return tensor_maps.to_params(_mom(width, mixer), tensors)


def from_state_dict(
    model: config.Model, tensors: Mapping[str, np.ndarray], mom: bool = True
) -> Tree:
  """Convert the tensors of a published model to parameters of `models.LM`.

  Args:
    mom: tensors are named as in MoM, else as in layers of a single memory.
  Raises:
    UserError: a tensor is missing, unknown or misshapen.
  """
  found, unused = _model(model, mom)
  return tensor_maps.to_params(found, tensors, unused)


def to_state_dict(
    model: config.Model, params: Tree, mom: bool = True
) -> dict[str, np.ndarray]:
  """Convert our parameters to the tensors of a published model."""
  return tensor_maps.to_tensors(_model(model, mom)[0], params)
