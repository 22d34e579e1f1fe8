"""Published `config.json` files and ours.

Every format is a model of flash-linear-attention: pre-norm blocks of a token
mixer and usually a channel mixer; some layers may be softmax attention.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
import dataclasses
from typing import Any

from mom_jax import config
from mom_jax.hf import formats, tensors

Hf = Mapping[str, Any]

_COMMON = dict(
    hidden_act='swish', attnres_block_size=None, elementwise_affine=True,
    qkv_bias=False,
)
RENAMED = {'mom_gated_deltanet': 'mom'}
# Settings of every format that are read or change nothing here. A format adds
# its own; all others are refused.
_KNOWN = frozenset((
    'model_type', 'hidden_size', 'num_hidden_layers', 'vocab_size', 'norm_eps',
    'num_heads', 'tie_word_embeddings', 'hidden_ratio', 'intermediate_size',
    'attn', 'num_kv_heads', 'bos_token_id', 'eos_token_id', 'pad_token_id',
    'architectures', 'transformers_version', 'torch_dtype', 'dtype',
    'use_cache', 'auto_map', '_name_or_path', '_commit_hash',
    '_attn_implementation_autoset', 'tokenizer_class', 'output_attentions',
    'output_hidden_states', 'return_dict', 'use_return_dict',
    'max_position_embeddings', 'initializer_range', 'attn_mode', 'fuse_norm',
    'fuse_swiglu', 'fuse_cross_entropy', 'fuse_linear_cross_entropy',
    'use_l2warp',
))
_ATTENTION = frozenset((
    'layers', 'num_heads', 'num_kv_heads', 'qkv_bias', 'window_size',
    'rope_theta',
))
# What values must be, where they are not null.
_SIZES = frozenset((
    'hidden_size', 'num_hidden_layers', 'vocab_size', 'intermediate_size',
    'num_heads', 'num_kv_heads', 'num_v_heads', 'head_dim', 'conv_size',
    'conv_kernel', 'num_memories', 'topk', 'state_size', 'expand_ratio',
    'decay_low_rank_dim', 'a_low_rank_dim', 'v_low_rank_dim',
    'gate_low_rank_dim', 'window_size',
))
_MAY_BE_NULL = frozenset((
    'intermediate_size', 'num_heads', 'num_kv_heads', 'num_v_heads',
    'head_dim', 'expand_ratio', 'window_size', 'hidden_ratio', 'rope_theta',
))
_FACTORS = frozenset((
    'norm_eps', 'hidden_ratio', 'expand', 'expand_k', 'expand_v', 'exapnd_k',
    'exapnd_v', 'rope_theta',
))
_SWITCHES = frozenset((
    'tie_word_embeddings', 'shared_mem', 'single_kv_proj', 'use_output_gate',
    'use_gate', 'use_short_conv', 'norm_feature_map', 'norm_first',
    'use_conv_bias', 'qkv_bias',
))


def format_of(hf: Hf) -> str:
  """Return the name of the format of a published config.

  Raises:
    UserError: it is unknown.
  """
  name = hf.get('model_type')
  if isinstance(name, str):
    name = RENAMED.get(name, name)
  if not isinstance(name, str) or name not in formats.FORMATS:
    raise config.UserError(
        f"config.json has model_type={name!r}; convert reads"
        f' {", ".join(sorted({*formats.FORMATS, *RENAMED}))}.'
    )
  return name


def config_from_hf(hf: Hf) -> config.Config:
  """Return our settings for a published `config.json`.

  Raises:
    UserError: another model type, or a setting with no counterpart here.
  """
  format_ = formats.FORMATS[format_of(hf)]
  required = _COMMON | format_.required
  for key, wanted in required.items():
    if hf.get(key, wanted) != wanted:
      raise config.UserError(
          f'config.json has {key}={hf[key]!r}; only {wanted!r} is supported.'
      )
  known = {*_KNOWN, *format_.known.split(), *format_.defaults, *required}
  _check_known(hf, known, '')
  attn = hf.get('attn') or {}
  for spec in attn if isinstance(attn, list) else [attn]:
    if not isinstance(spec, dict):
      raise config.UserError(
          f'config.json has attn={attn!r}; it must be an object, such as'
          ' {"layers": [3], "num_heads": 4}, or null.'
      )
    _check_known(spec, _ATTENTION, 'attn.')
  for key in ('hidden_size', 'num_hidden_layers', 'vocab_size', 'norm_eps',
              'tie_word_embeddings'):
    if hf.get(key) is None:
      raise config.UserError(f'config.json lacks {key!r}.')
  hf = format_.defaults | format_.required | dict(hf)
  hf['norm_eps'] = float(hf['norm_eps'])
  if format_.mixer and hf.get('num_kv_heads') not in (
      None, hf.get('num_heads')):
    raise config.UserError(
        f'config.json has num_kv_heads={hf["num_kv_heads"]}; here each of the'
        f' num_heads={hf["num_heads"]} heads has its own keys and values.'
    )
  try:
    return _config(hf, format_)
  except KeyError as e:
    raise config.UserError(f'config.json lacks {e}.') from e
  except (TypeError, ValueError, ArithmeticError) as e:
    if isinstance(e, config.UserError):
      raise
    raise config.UserError(
        f'config.json has settings that do not fit together ({e}).') from e


def _check_known(hf: Hf, known: Collection[str], where: str) -> None:
  """Raise UserError at an unknown setting, or a known one of another kind."""
  unknown = [f'{where}{k}={v!r}' for k, v in hf.items() if k not in known]
  if unknown:
    raise config.UserError(
        f'config.json has {", ".join(unknown)}, unknown here; if the model'
        ' does not depend on it, remove it from the file.'
    )
  for key, value in hf.items():
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    for keys, rule, fits in (
        (_SIZES, 'a whole number from 1 to 2**31 - 1',
         type(value) is int and 0 < value < 2**31),
        (_FACTORS, 'a finite number above 0',
         number and 0 < value < 1e30),
        (_SWITCHES, 'true or false', isinstance(value, bool)),
    ):
      null = value is None and key in _MAY_BE_NULL
      if key in keys and not null and not fits:
        raise config.UserError(
            f'config.json has {where}{key}={value!r}; it must be {rule}.')


def _config(hf: Hf, format_: formats.Format) -> config.Config:
  D, layers = hf['hidden_size'], hf['num_hidden_layers']
  base, more = config.Config(), {}
  if format_.channel == 'mlp':
    hidden = hf.get('intermediate_size')
    if hidden is None:
      hidden = 256 * -(-int(D * hf['hidden_ratio'] * 2 / 3) // 256)
    more = dict(mlp=config.Mlp(hidden=hidden))
  attn = _one_attention(hf.get('attn') or {}, layers)
  if format_.mixer is None:
    attn = dict(hf, layers=range(layers))
  names = ['attention' if i in attn.get('layers', ()) else 'mom'
           for i in range(layers)]
  # The shortest unit whose repetition gives all layers.
  unit = next(n for n in range(1, layers + 1)
              if layers % n == 0 and names == names[:n] * (layers // n))
  model = dataclasses.replace(
      base.model, vocab_size=hf['vocab_size'], width=D, num_layers=layers,
      image_side=0, modalities=('text',),
      pattern=' '.join(f'{name}/{format_.channel}' for name in names[:unit]),
      norm_eps=hf['norm_eps'], tie_embeddings=hf['tie_word_embeddings'],
      attention=_attention(
          hf, attn, format_) if 'attention' in names else base.model.attention,
      mixer=format_.mixer(hf) if format_.mixer else base.model.mixer,
      **more, **format_.model(hf),
  )
  return config.validate(dataclasses.replace(
      base, model=model,
      data=dataclasses.replace(base.data, sources=('kjv',), weights=(1.0,)),
      loss=dataclasses.replace(
          base.loss, modality_weights=(1.0,),
          balance=hf.get('aux_loss_scale', base.loss.balance)),
  ))


def _one_attention(attn: Any, num_layers: int) -> dict[str, Any]:
  """Merge specifications of attention layers, which may differ in layers."""
  specs = [dict(s) for s in (attn if isinstance(attn, list) else [attn])]
  layers = [layer for s in specs for layer in s.pop('layers', ())]
  for layer in layers:
    if type(layer) is not int or not 0 <= layer < num_layers:
      raise config.UserError(
          f'config.json has attn.layers with {layer!r}; a layer is a whole'
          f' number from 0 to {num_layers - 1}.'
      )
  if any(spec != specs[0] for spec in specs):
    raise config.UserError(
        'config.json has attn with layers of different settings; here all'
        ' attention layers have the same.'
    )
  return dict(specs[0] if specs else {}, layers=layers)


def _attention(hf: Hf, attn: Hf, format_: formats.Format) -> config.Attention:
  heads = attn.get('num_heads') or hf.get('num_heads') or 1
  # MoM's attention layers leave rope_theta at its default.
  theta = 10000.0
  if format_.architecture != 'MomForCausalLM':
    theta = float(attn.get('rope_theta') or theta)
  qk_norm = bool(attn.get('qk_norm'))
  if qk_norm and hf['norm_eps'] != 1e-5:
    raise config.UserError(
        f'config.json has qk_norm=True, whose epsilon is 1e-5, but'
        f' norm_eps={hf["norm_eps"]}; here all norms have one epsilon.'
    )
  if attn.get('qkv_bias'):
    raise config.UserError(
        'config.json has attn.qkv_bias=True; attention has no biases here.')
  return config.Attention(
      num_heads=heads, num_kv_heads=attn.get('num_kv_heads') or heads,
      head_dim=hf['hidden_size'] // heads, qk_norm=qk_norm, rope_theta=theta,
      window=attn.get('window_size') or 0,
  )


def format_for(model: config.Model) -> str:
  """Return the name of the format that can hold our model.

  Raises:
    UserError: there is none.
  """
  if all(mixer == 'attention' for mixer, _ in model.unit):
    return 'transformer'
  rule = model.mixer.rule
  if tensors.is_single(model.mixer) and rule in formats.FORMAT_OF_RULE:
    return formats.FORMAT_OF_RULE[rule]
  if rule == 'gated_delta':
    return 'mom'
  raise config.UserError(
      f'no published format holds config.model.mixer.rule={rule!r} with'
      f' num_memories={model.mixer.num_memories} and'
      f' shared={model.mixer.shared}; there are formats of a single memory for'
      f' {", ".join(formats.FORMAT_OF_RULE)}, and of several for gated_delta.'
  )


def config_to_hf(cfg: config.Config) -> dict[str, Any]:
  """Return a published `config.json` for our settings.

  Raises:
    UserError: the model has parts that the format lacks.
  """
  model = cfg.model
  name = format_for(model)
  format_ = formats.FORMATS[name]
  names = [mixer for _ in range(model.repeats) for mixer, _ in model.unit]
  where = [i for i, name in enumerate(names) if name == 'attention']
  hf = dict(
      architectures=[format_.architecture], model_type=name, attn_mode='chunk',
      attn=None, hidden_size=model.width, num_hidden_layers=model.num_layers,
      vocab_size=model.vocab_size, norm_eps=model.norm_eps,
      tie_word_embeddings=model.tie_embeddings, dtype=model.dtype,
      fuse_norm=True,
  )
  if format_.channel != 'none':
    hf |= dict(hidden_act='swish', hidden_ratio=4,
               intermediate_size=model.mlp.hidden)
  hf |= format_.settings(model)
  if where and name != 'transformer':
    hf['attn'] = dict(
        layers=where, num_heads=model.attention.num_heads,
        num_kv_heads=model.attention.num_kv_heads,
        rope_theta=model.attention.rope_theta,
        window_size=model.attention.window or None,
    )
  if name == 'mom':
    hf['aux_loss_scale'] = cfg.loss.balance
  _check_held(model, hf)
  return hf


def _check_held(model: config.Model, hf: dict[str, Any]) -> None:
  """Raise UserError if reading `hf` would give another model."""
  again = config_from_hf(hf).model
  same = dataclasses.replace(
      model, modalities=again.modalities, dtype=again.dtype, remat=again.remat,
      mixer=dataclasses.replace(
          model.mixer, chunk=again.mixer.chunk, backend=again.mixer.backend,
          balance_rate=again.mixer.balance_rate,
          low_ranks=again.mixer.low_ranks),
      attention=dataclasses.replace(
          model.attention, backend=again.attention.backend),
      moma=again.moma,
  )
  if not hf['attn'] and hf['model_type'] != 'transformer':
    same = dataclasses.replace(same, attention=again.attention)
  if formats.FORMATS[hf['model_type']].channel == 'none':
    same = dataclasses.replace(same, mlp=again.mlp)
  if hf['model_type'] == 'transformer':
    same = dataclasses.replace(same, mixer=again.mixer)
  lacks = [
      f'config.model.{key}={a!r}' for (key, a, _), (_, b, _) in zip(
          config.settings(same), config.settings(again)) if a != b]
  if lacks:
    raise config.UserError(
        f'the format {hf["model_type"]!r} cannot hold'
        f' {", ".join(lacks)}.'
    )
