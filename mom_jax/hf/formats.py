"""Published formats: their settings and ours, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mom_jax import config
from mom_jax.models import memory_params

Hf = Mapping[str, Any]


class Format(NamedTuple):
  """A published kind of model.

  Attributes:
    architecture: name of its class.
    defaults: defaults of its settings that are read or checked.
    required: settings that must have this value.
    known: names of more settings, which are read or change nothing here.
    mixer: map from its settings, with defaults, to ours of the mixer; None if
      all layers are attention.
    settings: map from our model to its settings besides the common ones.
    channel: channel mixer of its blocks.
    model: map from its settings to more of our settings of the model.
  """

  architecture: str
  defaults: dict[str, Any]
  required: dict[str, Any]
  known: str
  mixer: Callable[[Hf], config.Mixer] | None
  settings: Callable[[config.Model], dict[str, Any]]
  channel: str = 'mlp'
  model: Callable[[Hf], dict[str, Any]] = lambda hf: {}


_PLAIN = dict(num_memories=1, top_k=1, shared=False)


def _gate(gated: bool) -> str:
  return 'silu' if gated else 'none'


def _by_head(hf: Hf) -> dict[str, int]:
  """Return heads and their sizes from total widths."""
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
  K, U = hf['head_dim'], hf['num_heads']
  H = hf['num_v_heads'] or U
  return config.Mixer(
      rule='gated_delta', num_heads=H, key_heads=U if U < H else 0, key_dim=K,
      value_dim=int(K * hf['expand_v']), conv_width=hf['conv_size'],
      output_gate=_gate(hf['use_gate']), **_PLAIN)


def _gated_deltanet_settings(model: config.Model) -> dict[str, Any]:
  mixer, U = model.mixer, model.mixer.key_heads
  return dict(
      num_heads=U or mixer.num_heads,
      num_v_heads=mixer.num_heads if U else None, head_dim=mixer.key_dim,
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
  # The arguments of its class are misspelt, its attributes are not.
  hf = {name: hf.get(f'exapnd_{name[-1]}', 1) for name in (
      'expand_k', 'expand_v')} | dict(hf)
  return config.Mixer(
      rule='gsa', conv_width=0, output_norm='all', output_gate='self_silu',
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


def _rwkv7(hf: Hf) -> config.Mixer:
  D = hf['hidden_size']
  K = hf['head_dim'] or D // hf['num_heads']
  H, values = D // K, hf['value_dim'] or D
  widths = set(values if isinstance(values, (list, tuple)) else [values])
  if any(type(width) is not int or width < 1 for width in widths):
    raise config.UserError(
        f'config.json has value_dim={values!r}; it must be a whole number from'
        ' 1 up or a list of such.'
    )
  if len(widths) > 1:
    raise config.UserError(
        f'config.json has value_dim={values}; here all layers have values of'
        ' one width.'
    )
  return config.Mixer(
      rule='rwkv7', num_heads=H, key_dim=K, value_dim=widths.pop() // H,
      conv_width=0, output_norm='group', norm_eps=K * hf['norm_eps'],
      output_gate='inner_sigmoid', gate_rank=hf['gate_low_rank_dim'],
      low_ranks=tuple(hf[f'{name}_low_rank_dim'] for name in _RANKS), **_PLAIN)


# In the order of the rule's gates.
_RANKS = ('decay', 'a', 'v')


def _rwkv7_settings(model: config.Model) -> dict[str, Any]:
  mixer = model.mixer
  ranks = memory_params.ranks(mixer, model.width).values()
  return dict(
      num_heads=mixer.num_heads, head_dim=mixer.key_dim,
      value_dim=[mixer.num_heads * mixer.value_dim] * model.num_layers,
      gate_low_rank_dim=mixer.gate_rank, norm_first=model.embed_norm,
      norm_bias=True, hidden_act='sqrelu',
      **{f'{name}_low_rank_dim': rank for name, rank in zip(_RANKS, ranks)})


def _rwkv7_model(hf: Hf) -> dict[str, Any]:
  hidden = hf.get('intermediate_size')
  if hidden is None:
    hidden = 32 * -(-int(hf['hidden_size'] * (hf['hidden_ratio'] or 4)) // 32)
  return dict(norm='layer', embed_norm=hf['norm_first'],
              mlp=config.Mlp(hidden=hidden))


def _mamba2(hf: Hf) -> config.Mixer:
  heads = int(hf['expand'] * hf['hidden_size']) // hf['head_dim']
  if hf.get('num_heads') not in (None, heads):
    raise config.UserError(
        f'config.json has num_heads={hf["num_heads"]}, but expand,'
        f' hidden_size and head_dim give {heads}.'
    )
  return config.Mixer(
      rule='mamba2', num_heads=heads,
      key_heads=hf['n_groups'], key_dim=hf['state_size'],
      value_dim=hf['head_dim'], conv_width=hf['conv_kernel'],
      conv_bias=hf['use_conv_bias'], output_norm='all',
      output_gate='silu_before_norm', **_PLAIN)


def _mamba2_settings(model: config.Model) -> dict[str, Any]:
  mixer = model.mixer
  return dict(
      num_heads=mixer.num_heads, head_dim=mixer.value_dim,
      state_size=mixer.key_dim, n_groups=mixer.key_heads,
      expand=mixer.num_heads * mixer.value_dim / model.width,
      conv_kernel=mixer.conv_width, use_conv_bias=mixer.conv_bias,
      hidden_act='silu', rmsnorm=True, norm_before_gate=False, use_bias=False,
      D_has_hdim=False)


def _transformer_settings(model: config.Model) -> dict[str, Any]:
  attention = model.attention
  return dict(
      num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads,
      qk_norm=attention.qk_norm, rope_theta=attention.rope_theta,
      window_size=attention.window or None)


_CONV = dict(use_short_conv=True, conv_size=4)
_EXPAND = dict(expand_k=1.0, expand_v=1.0)

FORMATS = {
    'mom': Format(
        'MomForCausalLM', _CONV,
        dict(mom_backend='gated_deltanet', use_short_conv=True),
        'num_heads head_dim expand_v num_memories topk shared_mem'
        ' single_kv_proj use_output_gate aux_loss_scale capacity'
        ' use_layer_wise_balance',
        _mom, _mom_settings),
    'gated_deltanet': Format(
        'GatedDeltaNetForCausalLM',
        _CONV | dict(
            head_dim=256, num_heads=6, expand_v=2.0, use_gate=True,
            num_v_heads=None),
        dict(use_short_conv=True, allow_neg_eigval=False), '',
        _gated_deltanet, _gated_deltanet_settings),
    'delta_net': Format(
        'DeltaNetForCausalLM',
        _CONV | _EXPAND | dict(num_heads=16, use_gate=False),
        dict(use_short_conv=True, allow_neg_eigval=False, use_beta=True,
             use_output_norm=True, qk_norm='l2', qk_activation='silu'),
        '',
        _delta_net, _delta_net_settings),
    'gla': Format(
        'GLAForCausalLM',
        _CONV | _EXPAND | dict(
            expand_k=0.5, use_short_conv=False, num_heads=4,
            use_output_gate=True),
        dict(feature_map=None, clamp_min=None, use_gk=True, use_gv=False,
             fuse_norm=True),
        '', _gla, _gla_settings),
    'retnet': Format(
        'RetNetForCausalLM',
        _EXPAND | dict(expand_v=2.0, num_heads=8, use_output_gate=True),
        dict(feature_map=None, fuse_norm=True, use_short_conv=False),
        'conv_size', _retnet, _retnet_settings),
    'hgrn2': Format(
        'HGRN2ForCausalLM',
        _CONV | dict(use_short_conv=False, num_heads=None, expand_ratio=128),
        dict(use_lower_bound=True), '', _hgrn2, _hgrn2_settings),
    'gsa': Format(
        'GSAForCausalLM', dict(num_heads=4),
        dict(use_short_conv=False, num_slots=64, feature_map='swish',
             use_norm=True, use_output_gate=False, gate_logit_normalizer=8,
             clamp_min=None, clamp_max=None),
        'conv_size expand_k expand_v exapnd_k exapnd_v', _gsa, _gsa_settings),
    'linear_attn': Format(
        'LinearAttentionForCausalLM',
        _EXPAND | dict(num_heads=4, feature_map='elementwise_product',
                       norm_feature_map=False),
        dict(tie_feature_map_qk=False, norm_q=False, norm_k=False), '',
        _linear_attn, _linear_attn_settings),
    'transformer': Format(
        'TransformerForCausalLM', dict(num_heads=32), {},
        'num_kv_heads qk_norm window_size rope_theta', None,
        _transformer_settings),
    # Without `fuse_norm` the epsilon of normalised keys is 1e-12, not 1e-6.
    'rwkv7': Format(
        'RWKV7ForCausalLM',
        dict(head_dim=64, num_heads=None, decay_low_rank_dim=64,
             a_low_rank_dim=64, v_low_rank_dim=16, gate_low_rank_dim=128,
             value_dim=None, norm_first=True, hidden_ratio=4),
        dict(hidden_act='sqrelu', norm_bias=True), '',
        _rwkv7, _rwkv7_settings, 'shift_mlp', _rwkv7_model),
    'mamba2': Format(
        'Mamba2ForCausalLM',
        dict(head_dim=64, state_size=128, expand=2, conv_kernel=4,
             use_conv_bias=True),
        dict(n_groups=1, use_bias=False, D_has_hdim=False, hidden_act='silu',
             rmsnorm=True, norm_before_gate=False,
             dt_limit=[0.0, float('inf')],
             time_step_limit=[0.0, float('inf')]),
        'num_heads chunk_size residual_in_fp32 rescale_prenorm_residual'
        ' conv_init A_init_range dt_min dt_max dt_init_floor time_step_rank'
        ' time_step_min time_step_max time_step_floor',
        _mamba2, _mamba2_settings, 'none'),
}
# Rule of a single memory without a router -> its format.
FORMAT_OF_RULE = {
    'gated_delta': 'gated_deltanet', 'delta': 'delta_net', 'gla': 'gla',
    'retention': 'retnet', 'hgrn2': 'hgrn2', 'gsa': 'gsa',
    'linear': 'linear_attn', 'rwkv7': 'rwkv7', 'mamba2': 'mamba2',
}
