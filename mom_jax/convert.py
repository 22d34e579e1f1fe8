"""Checkpoints from elsewhere: official MoM layout in and out, upcycling.

  python -m mom_jax.convert --upcycle=runs/seed --config=configs/moma_90m.py \\
    --workdir=runs/upcycled

makes a run with experts of a finished run without (see `mom_jax.upcycle`);
python -m mom_jax.train with the same --config and --workdir goes on with it.

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

from absl import flags
import jax.numpy as jnp
import numpy as np

from mom_jax import cli, config, upcycle

Tree = dict[str, Any]


class Place(NamedTuple):
  """Where an official tensor lies: a path in our tree and a part of the array.

  The array has shape `whole`; the tensor is `array[part]` of it, turned.
  """

  path: tuple[str, ...]
  whole: tuple[int, ...]
  part: tuple[int | slice, ...]
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def _linear(path, inputs, outputs) -> Place:
  """[out, in] to [*inputs, *outputs]."""
  shape = (*inputs, *outputs)
  return Place(
      path, shape, (), lambda w: w.T.reshape(shape),
      lambda p: p.reshape(math.prod(inputs), -1).T,
  )


def _one_of(place: Place, index: int, count: int, axis: int = 0) -> Place:
  """The place as number `index` of `count` side by side on a new axis."""
  whole = (*place.whole[:axis], count, *place.whole[axis:])
  return place._replace(
      whole=whole, part=(slice(None),) * axis + (index, *place.part))


def _conv(path, width, heads, size) -> Place:
  """[channels, 1, W] to [W, H, size]; the last tap is the current token."""
  shape = (width, heads, size)
  return Place(
      path, shape, (), lambda w: w[:, 0].T.reshape(shape),
      lambda p: p.reshape(width, -1).T[:, None],
  )


def _plain(path, *shape) -> Place:
  return Place(path, shape, (), lambda w: w, lambda p: p)


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
  if mixer.output_gate != 'none':
    places['g_proj.weight'] = _linear(('gate', 'kernel'), (D,), (H, V))
  projections = {
      'k': ('key', (H, K)), 'v': ('value', (H, V)),
      'b': ('beta', (H,)), 'a': ('decay', (H,)),
  }
  routed = 0 if mixer.single_kv_proj else mixer.num_memories
  names = [f'{{}}_proj.{m}.weight' for m in range(routed)]
  if mixer.shared or mixer.single_kv_proj:
    names.append('shared_{}.weight')
  for theirs, (ours, shape) in projections.items():
    place = _linear((ours,), (D,), shape)
    for i, name in enumerate(names):
      places[name.format(theirs)] = _one_of(place, i, len(names))
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


def _model_places(model: config.Model) -> dict[str, Place]:
  """Official names of a model's tensors."""
  D, F, W = model.width, model.mlp.hidden, model.vocab_size
  places = {
      'model.embeddings.weight': _plain(('embed', 'embedding'), W, D),
      'model.norm.weight': _plain(('final_norm', 'scale'), D),
  }
  if not model.tie_embeddings:
    places['lm_head.weight'] = _linear(('output', 'kernel'), (D,), (W,))
  mixers = {
      'mom': lambda: mom_places(D, model.mixer),
      'attention': lambda: _attention_places(D, model.attention),
  }
  gate_up = _linear(('channel', 'gate_up', 'kernel'), (D,), (F,))
  for layer in range(model.num_layers):
    repeat, i = divmod(layer, len(model.unit))
    inside = {
        'attn_norm.weight': _plain(('mixer_norm', 'scale'), D),
        'mlp_norm.weight': _plain(('channel_norm', 'scale'), D),
        'mlp.gate_proj.weight': _one_of(gate_up, 0, 2, axis=1),
        'mlp.up_proj.weight': _one_of(gate_up, 1, 2, axis=1),
        'mlp.down_proj.weight': _linear(
            ('channel', 'down', 'kernel'), (F,), (D,)),
    }
    for name, place in mixers[model.unit[i][0]]().items():
      inside[f'attn.{name}'] = place._replace(path=('mixer', *place.path))
    for name, place in inside.items():
      place = place._replace(path=('units', f'block_{i}', *place.path))
      places[f'model.layers.{layer}.{name}'] = _one_of(
          place, repeat, model.repeats)
  return places


def _fill(
    places: Mapping[str, Place], tensors: Mapping[str, np.ndarray]
) -> Tree:
  """Our tree of official tensors; refuses missing, unknown or misshapen."""
  missing, unknown = set(places) - set(tensors), set(tensors) - set(places)
  if missing or unknown:
    raise config.UserError(
        f'the checkpoint does not fit its config: missing tensors'
        f' {sorted(missing)}, unknown tensors {sorted(unknown)}.'
    )
  tree: Tree = {}
  for name, place in places.items():
    node = tree
    for key in place.path[:-1]:
      node = node.setdefault(key, {})
    whole = node.setdefault(
        place.path[-1], np.empty(place.whole, np.float32))
    theirs = np.asarray(tensors[name])
    wanted = place.to_theirs(whole[place.part]).shape
    if theirs.shape != wanted:
      raise config.UserError(
          f'tensor {name} has shape {theirs.shape}; the config asks for'
          f' {wanted}.'
      )
    whole[place.part] = place.to_ours(theirs)
  return tree


def mom_params(
    width: int, mixer: config.Mixer, tensors: Mapping[str, np.ndarray]
) -> Tree:
  """Parameters of one `models.mom.Mom` from an official layer's state dict."""
  return _fill(mom_places(width, mixer), tensors)


def from_state_dict(
    model: config.Model, tensors: Mapping[str, np.ndarray]
) -> Tree:
  """Parameters of `models.LM` from an official model's state dict."""
  return _fill(_model_places(model), tensors)


def to_state_dict(model: config.Model, params: Tree) -> dict[str, np.ndarray]:
  """The official state dict of our parameters."""
  tensors = {}
  for name, place in _model_places(model).items():
    value = params
    for key in place.path:
      value = value[key]
    part = np.asarray(value)[place.part]
    tensors[name] = np.ascontiguousarray(place.to_theirs(part))
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
      image_side=0,
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
          output_gate='silu' if hf['use_output_gate'] else 'none',
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
          ('mixer.writes', mixer.writes, 1),
          ('image_side', model.image_side, 0),
          ('mixer_norm', model.mixer_norm, 'pre'),
          ('channel_norm', model.channel_norm, 'pre'),
      )
      if value != wanted
  ]
  kinds = [model.unit[i % len(model.unit)] for i in range(model.num_layers)]
  if any(channel != 'mlp' for _, channel in kinds):
    lacks.append(f'config.model.pattern={model.pattern!r}')
  if not mixer.conv_width:
    lacks.append('config.model.mixer.conv_width=0')
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
      use_output_gate=mixer.output_gate != 'none',
      aux_loss_scale=cfg.loss.balance,
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


def main(overrides: list[str]) -> None:
  """Runs the command from its flags."""
  f = flags.FLAGS
  for name in ('upcycle', 'config', 'workdir'):
    if not getattr(f, name):
      raise config.UserError(
          f'--{name}=... is needed: give --upcycle=SEED_WORKDIR,'
          ' --config=RECIPE and --workdir=NEW_WORKDIR.'
      )
  cfg = config.load(f.config, overrides)
  upcycle.upcycle(f.upcycle, cfg, f.workdir, f.schedule, f.optimizer)
  if not cfg.model.moma.noise:
    print('note: config.model.moma.noise=False, so the copies of an expert part'
          ' by their routers alone.')
  print(f'written: {f.workdir}; go on with python -m mom_jax.train'
        f' --config={f.workdir}/config.json --workdir={f.workdir}')


def define_flags() -> None:
  flags.DEFINE_string(
      'upcycle', None, 'workdir of a run that is dense or has one expert a'
      ' modality')
  flags.DEFINE_string('config', None, 'recipe or config.json of the new run')
  flags.DEFINE_string('workdir', None, 'folder of the new run')
  flags.DEFINE_string(
      'schedule', 'restart', 'of the learning rate: restart begins it anew,'
      " continue goes on at the seed's step")
  flags.DEFINE_string(
      'optimizer', 'reset', 'moments: reset begins with none, copy gives each'
      " expert its FFN's")


if __name__ == '__main__':
  define_flags()
  cli.run(main)
