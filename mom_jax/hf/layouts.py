"""Published `config.json` files and ours.

Every layout is a model of flash-linear-attention: RMS norms before a mixer and
a SwiGLU MLP, some layers softmax attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any, NamedTuple

from mom_jax import config
from mom_jax.hf import model as models

Hf = Mapping[str, Any]


class Layout(NamedTuple):
  """A kind of published model.

  Attributes:
    architecture: name of its class.
    defaults: of its settings that we read or refuse.
    refused: settings with only one value that has a counterpart here.
    mixer: its settings, defaults filled in -> ours of the mixer; None is
      attention throughout.
    settings: ours -> its settings beside the common ones.
  """

  architecture: str
  defaults: dict[str, Any]
  refused: dict[str, Any]
  mixer: Callable[[Hf], config.Mixer] | None
  settings: Callable[[config.Model], dict[str, Any]]


_COMMON = dict(
    hidden_act='swish', attnres_block_size=None, elementwise_affine=True,
    qkv_bias=False,
)
_PLAIN = dict(num_memories=1, top_k=1, shared=False)


def _gate(gated: bool) -> str:
  return 'silu' if gated else 'none'


def _by_head(hf: Hf) -> dict[str, int]:
  """Heads and their sizes where the config gives widths of all heads."""
  D, H = hf['hidden_size'], hf['num_heads']
  return dict(
      num_heads=H, key_dim=int(D * hf['expand_k']) // H,
      value_dim=int(D * hf['expand_v']) // H)


def _expansions(model: config.Model) -> dict[str, Any]:
  mixer = model.mixer
  return dict(
      num_heads=mixer.num_heads,
      expand_k=mixer.num_heads * mixer.key_dim / model.width,
      expand_v=mixer.num_heads * mixer.value_dim / model.width)


def _mom(hf: Hf) -> config.Mixer:
  H, K = hf['num_heads'], hf['head_dim']
  return config.Mixer(
      num_memories=hf['num_memories'], top_k=hf['topk'],
      shared=hf['shared_mem'], single_kv_proj=hf['single_kv_proj'],
      num_heads=H, key_dim=K, value_dim=int(K * hf['expand_v']),
      conv_width=hf['conv_size'], output_gate=_gate(hf['use_output_gate']),
  )


def _mom_settings(model: config.Model) -> dict[str, Any]:
  mixer = model.mixer
  return dict(
      mom_backend='gated_deltanet', num_heads=mixer.num_heads,
      head_dim=mixer.key_dim, expand_v=mixer.value_dim // mixer.key_dim,
      conv_size=mixer.conv_width, use_short_conv=True,
      num_memories=mixer.num_memories, topk=mixer.top_k,
      shared_mem=mixer.shared, single_kv_proj=mixer.single_kv_proj,
      use_output_gate=mixer.output_gate != 'none',
  )


def _gated_deltanet(hf: Hf) -> config.Mixer:
  K = hf['head_dim']
  return config.Mixer(
      rule='gated_delta', num_heads=hf['num_heads'], key_dim=K,
      value_dim=int(K * hf['expand_v']), conv_width=hf['conv_size'],
      output_gate=_gate(hf['use_gate']), **_PLAIN)


def _gated_deltanet_settings(model: config.Model) -> dict[str, Any]:
  mixer = model.mixer
  return dict(
      num_heads=mixer.num_heads, head_dim=mixer.key_dim,
      expand_v=mixer.value_dim / mixer.key_dim, conv_size=mixer.conv_width,
      use_short_conv=True, use_gate=mixer.output_gate == 'silu',
      allow_neg_eigval=False)


def _delta_net(hf: Hf) -> config.Mixer:
  return config.Mixer(
      rule='delta', conv_width=hf['conv_size'],
      output_gate=_gate(hf['use_gate']), **_by_head(hf), **_PLAIN)


def _delta_net_settings(model: config.Model) -> dict[str, Any]:
  return _expansions(model) | dict(
      conv_size=model.mixer.conv_width, use_short_conv=True, qk_norm='l2',
      qk_activation='silu', use_beta=True, use_output_norm=True,
      use_gate=model.mixer.output_gate == 'silu', allow_neg_eigval=False)


def _gla(hf: Hf) -> config.Mixer:
  return config.Mixer(
      rule='gla', conv_width=hf['conv_size'] if hf['use_short_conv'] else 0,
      output_gate=_gate(hf['use_output_gate']), **_by_head(hf), **_PLAIN)


def _gla_settings(model: config.Model) -> dict[str, Any]:
  width = model.mixer.conv_width
  return _expansions(model) | dict(
      use_short_conv=width > 0, conv_size=width or 4, feature_map=None,
      clamp_min=None, use_output_gate=model.mixer.output_gate == 'silu')


def _retnet(hf: Hf) -> config.Mixer:
  return config.Mixer(
      rule='retention', conv_width=0,
      output_gate=_gate(hf['use_output_gate']), **_by_head(hf), **_PLAIN)


def _retnet_settings(model: config.Model) -> dict[str, Any]:
  return _expansions(model) | dict(
      feature_map=None, use_output_gate=model.mixer.output_gate == 'silu')


def _hgrn2(hf: Hf) -> config.Mixer:
  D, K = hf['hidden_size'], hf['expand_ratio']
  heads = hf['num_heads'] if K is None else D // K
  return config.Mixer(
      rule='hgrn2', num_heads=heads, key_dim=K or D // heads,
      value_dim=D // heads, output_norm='all', output_gate='none',
      conv_width=hf['conv_size'] if hf['use_short_conv'] else 0, **_PLAIN)


def _hgrn2_settings(model: config.Model) -> dict[str, Any]:
  width = model.mixer.conv_width
  return dict(
      num_heads=model.mixer.num_heads, expand_ratio=model.mixer.key_dim,
      use_short_conv=width > 0, conv_size=width or 4, use_lower_bound=True)


def _gsa(hf: Hf) -> config.Mixer:
  return config.Mixer(
      rule='gsa', conv_width=0, output_norm='all', output_gate='own',
      **_by_head(hf), **_PLAIN)


def _gsa_settings(model: config.Model) -> dict[str, Any]:
  return _expansions(model) | dict(
      num_slots=64, use_short_conv=False, feature_map='swish', use_norm=True,
      use_output_gate=False, gate_logit_normalizer=8)


_FEATURES = {
    'elementwise_product': 'hadamard', 'hedgehog': 'hedgehog', 't2r': 't2r',
    'elu': 'elu', 'relu': 'relu', 'identity': 'identity',
}


def _linear_attn(hf: Hf) -> config.Mixer:
  name = hf['feature_map']
  if name not in _FEATURES:
    raise config.UserError(
        f'config.json has feature_map={name!r}; known here:'
        f' {", ".join(_FEATURES)}.'
    )
  return config.Mixer(
      rule='linear', conv_width=0, output_gate='none',
      feature_map=_FEATURES[name], normaliser=hf['norm_feature_map'],
      **_by_head(hf), **_PLAIN)


def _linear_attn_settings(model: config.Model) -> dict[str, Any]:
  theirs = {ours: name for name, ours in _FEATURES.items()}
  return _expansions(model) | dict(
      feature_map=theirs.get(model.mixer.feature_map),
      norm_feature_map=model.mixer.normaliser, tie_feature_map_qk=False,
      norm_q=False, norm_k=False)


def _transformer_settings(model: config.Model) -> dict[str, Any]:
  attention = model.attention
  return dict(
      num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads,
      qk_norm=attention.qk_norm, rope_theta=attention.rope_theta,
      window_size=attention.window or None)


_CONV = dict(use_short_conv=True, conv_size=4)
_EXPAND = dict(expand_k=1.0, expand_v=1.0)

LAYOUTS = {
    'mom': Layout(
        'MomForCausalLM', _CONV,
        dict(mom_backend='gated_deltanet', use_short_conv=True),
        _mom, _mom_settings),
    'gated_deltanet': Layout(
        'GatedDeltaNetForCausalLM',
        _CONV | dict(
            head_dim=256, num_heads=6, expand_v=2.0, use_gate=True,
            num_v_heads=None),
        dict(use_short_conv=True, allow_neg_eigval=False),
        _gated_deltanet, _gated_deltanet_settings),
    'delta_net': Layout(
        'DeltaNetForCausalLM',
        _CONV | _EXPAND | dict(num_heads=16, use_gate=False),
        dict(use_short_conv=True, allow_neg_eigval=False, use_beta=True,
             use_output_norm=True, qk_norm='l2', qk_activation='silu'),
        _delta_net, _delta_net_settings),
    'gla': Layout(
        'GLAForCausalLM',
        _CONV | _EXPAND | dict(
            expand_k=0.5, use_short_conv=False, num_heads=4,
            use_output_gate=True),
        dict(feature_map=None, clamp_min=None, use_gk=True, use_gv=False,
             fuse_norm=True),
        _gla, _gla_settings),
    'retnet': Layout(
        'RetNetForCausalLM',
        _EXPAND | dict(expand_v=2.0, num_heads=8, use_output_gate=True),
        dict(feature_map=None, fuse_norm=True),
        _retnet, _retnet_settings),
    'hgrn2': Layout(
        'HGRN2ForCausalLM',
        _CONV | dict(use_short_conv=False, num_heads=None, expand_ratio=128),
        dict(use_lower_bound=True), _hgrn2, _hgrn2_settings),
    'gsa': Layout(
        'GSAForCausalLM', _EXPAND | dict(num_heads=4),
        dict(use_short_conv=False, num_slots=64, feature_map='swish',
             use_norm=True, use_output_gate=False, gate_logit_normalizer=8),
        _gsa, _gsa_settings),
    'linear_attn': Layout(
        'LinearAttentionForCausalLM',
        _EXPAND | dict(num_heads=4, feature_map='elementwise_product',
                       norm_feature_map=False),
        dict(tie_feature_map_qk=False, norm_q=False, norm_k=False),
        _linear_attn, _linear_attn_settings),
    'transformer': Layout(
        'TransformerForCausalLM', dict(num_heads=32), {}, None,
        _transformer_settings),
}
RENAMED = {'mom_gated_deltanet': 'mom'}
_OF_RULE = {
    'gated_delta': 'gated_deltanet', 'delta': 'delta_net', 'gla': 'gla',
    'retention': 'retnet', 'hgrn2': 'hgrn2', 'gsa': 'gsa',
    'linear': 'linear_attn',
}


def kind_of(hf: Hf) -> str:
  """The layout of a published config.

  Raises:
    UserError: we know no such one.
  """
  kind = hf.get('model_type')
  kind = RENAMED.get(kind, kind)
  if kind not in LAYOUTS:
    raise config.UserError(
        f"config.json has model_type={kind!r}; convert reads"
        f' {", ".join(sorted({*LAYOUTS, *RENAMED}))}.'
    )
  return kind


def config_from_hf(hf: Hf) -> config.Config:
  """Our settings for a published `config.json`.

  Raises:
    UserError: another model type, or a setting with no counterpart here.
  """
  layout = LAYOUTS[kind_of(hf)]
  for key, wanted in (_COMMON | layout.refused).items():
    if hf.get(key, wanted) != wanted:
      raise config.UserError(
          f'config.json has {key}={hf[key]!r}; only {wanted!r} is supported.'
      )
  hf = layout.defaults | layout.refused | dict(hf)
  for key in ('num_kv_heads', 'num_v_heads'):
    if layout.mixer and hf.get(key) not in (None, hf['num_heads']):
      raise config.UserError(
          f'config.json has {key}={hf[key]}; here each of the'
          f' num_heads={hf["num_heads"]} heads has keys and values of its own.'
      )
  D, layers = hf['hidden_size'], hf['num_hidden_layers']
  hidden = hf.get('intermediate_size')
  if hidden is None:
    hidden = 256 * -(-int(D * hf['hidden_ratio'] * 2 / 3) // 256)
  attn = hf.get('attn') or {}
  if layout.mixer is None:
    attn = dict(hf, layers=range(layers))
  kinds = ['attention' if i in attn.get('layers', ()) else 'mom'
           for i in range(layers)]
  # The shortest unit whose repetition gives all layers.
  unit = next(n for n in range(1, layers + 1)
              if layers % n == 0 and kinds == kinds[:n] * (layers // n))
  base = config.Config()
  model = dataclasses.replace(
      base.model, vocab_size=hf['vocab_size'], width=D, num_layers=layers,
      image_side=0, modalities=('text',),
      pattern=' '.join(f'{kind}/mlp' for kind in kinds[:unit]),
      norm_eps=hf['norm_eps'], tie_embeddings=hf['tie_word_embeddings'],
      mlp=config.Mlp(hidden=hidden),
      attention=_attention(hf, attn, layout),
      mixer=layout.mixer(hf) if layout.mixer else base.model.mixer,
  )
  return config.validate(dataclasses.replace(
      base, model=model,
      data=dataclasses.replace(base.data, sources=('kjv',), weights=(1.0,)),
      loss=dataclasses.replace(base.loss, modality_weights=(1.0,)),
  ))


def _attention(hf: Hf, attn: Hf, layout: Layout) -> config.Attention:
  heads = attn.get('num_heads') or hf.get('num_heads') or 1
  # MoM's attention layers leave rope_theta at its default.
  theta = 10000.0
  if layout.architecture != 'MomForCausalLM':
    theta = float(attn.get('rope_theta') or theta)
  qk_norm = bool(attn.get('qk_norm'))
  if qk_norm and hf['norm_eps'] != 1e-5:
    raise config.UserError(
        f'config.json has qk_norm=True, whose epsilon is 1e-5, beside'
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


def kind_for(model: config.Model) -> str:
  """The layout that holds a model of ours.

  Raises:
    UserError: there is none.
  """
  if all(mixer == 'attention' for mixer, _ in model.unit):
    return 'transformer'
  rule = model.mixer.rule
  if models.is_single(model.mixer) and rule in _OF_RULE:
    return _OF_RULE[rule]
  if rule == 'gated_delta':
    return 'mom'
  raise config.UserError(
      f'no published layout holds config.model.mixer.rule={rule!r} with'
      f' num_memories={model.mixer.num_memories} and'
      f' shared={model.mixer.shared}; there are layouts of one memory alone for'
      f' {", ".join(_OF_RULE)}, and of more for gated_delta.'
  )


def config_to_hf(cfg: config.Config) -> dict[str, Any]:
  """A published `config.json` for our settings.

  Raises:
    UserError: the model has parts that the layout lacks.
  """
  model = cfg.model
  kind = kind_for(model)
  layout = LAYOUTS[kind]
  kinds = [mixer for _ in range(model.repeats) for mixer, _ in model.unit]
  where = [i for i, name in enumerate(kinds) if name == 'attention']
  hf = dict(
      architectures=[layout.architecture], model_type=kind, attn_mode='chunk',
      attn=None, hidden_size=model.width, num_hidden_layers=model.num_layers,
      vocab_size=model.vocab_size, norm_eps=model.norm_eps,
      tie_word_embeddings=model.tie_embeddings, hidden_act='swish',
      hidden_ratio=4, intermediate_size=model.mlp.hidden, dtype=model.dtype,
      fuse_norm=True, **layout.settings(model),
  )
  if where and kind != 'transformer':
    hf['attn'] = dict(
        layers=where, num_heads=model.attention.num_heads,
        num_kv_heads=model.attention.num_kv_heads,
        rope_theta=model.attention.rope_theta,
        window_size=model.attention.window or None,
    )
  if kind == 'mom':
    hf['aux_loss_scale'] = cfg.loss.balance
  _check_held(model, hf)
  return hf


def _check_held(model: config.Model, hf: dict[str, Any]) -> None:
  """Raises UserError if reading `hf` would not give the model back."""
  again = config_from_hf(hf).model
  same = dataclasses.replace(
      model, modalities=again.modalities, dtype=again.dtype, remat=again.remat,
      mixer=dataclasses.replace(
          model.mixer, chunk=again.mixer.chunk, backend=again.mixer.backend,
          balance_rate=again.mixer.balance_rate),
      attention=dataclasses.replace(
          model.attention, backend=again.attention.backend),
      moma=again.moma,
  )
  if hf['attn'] is None and hf['model_type'] != 'transformer':
    same = dataclasses.replace(same, attention=again.attention)
  if hf['model_type'] == 'transformer':
    same = dataclasses.replace(same, mixer=again.mixer)
  lacks = [
      f'config.model.{key}={a!r}' for (key, a, _), (_, b, _) in zip(
          config.settings(same), config.settings(again)) if a != b]
  if lacks:
    raise config.UserError(
        f'the layout {hf["model_type"]!r} has no place for'
        f' {", ".join(lacks)}.'
    )
