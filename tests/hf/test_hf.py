"""Published formats: names, what the tensors mean, round trips."""

import dataclasses
import functools
import json
import os

import contract
import jax
import jax.numpy as jnp
import numpy as np
import published
from published import LAYERS, PUBLISHED, WORDS, D, T
import pytest

from mom_jax import config, convert, hf, models
from mom_jax.hf import settings as hf_settings
from mom_jax.models import block, layers, mom

each = pytest.mark.parametrize('kind', sorted(PUBLISHED))
# Tensors that are no matrix of a map, by their names without 'weight'.
VECTORS = ('A_log', 'D', 'dt_bias', 'k_k', 'k_a', 'r_k', 'x_r', 'x_k', 'x_v',
           'x_w', 'x_a', 'x_g')
# Where others than 'model', 'attn', 'mlp_norm' and so on are published.
OUTSIDE = {
    'hgrn2': {'model.lower_bounds'},
    'rwkv7': {'model.norm.bias'},
    'mamba2': {'backbone.embeddings.weight', 'backbone.norm_f.weight'},
}
BESIDE = {
    'rwkv7': 'attn_norm.weight attn_norm.bias ffn_norm.weight ffn_norm.bias'
             ' ffn.x_k ffn.key.weight ffn.value.weight',
    'mamba2': 'norm.weight',
}
SWIGLU = ('attn_norm.weight mlp_norm.weight mlp.gate_proj.weight'
          ' mlp.up_proj.weight mlp.down_proj.weight')


@each
def test_tensors_have_their_published_names(kind):
  cfg = hf_settings.config_from_hf(published.config_of(kind))
  tensors = hf.tensors.to_state_dict(
      cfg.model, published.random(cfg), mom=False)
  mixer = 'mixer.' if kind == 'mamba2' else 'attn.'
  want = {mixer + (name if name in VECTORS or name.endswith('.bias')
                   else name + '.weight')
          for name in PUBLISHED[kind][1].split()}
  want |= set(BESIDE.get(kind, SWIGLU).split())
  at = lambda layer: {name.partition(f'.layers.{layer}.')[2]
                      for name in tensors if f'.layers.{layer}.' in name}
  assert at(1) == want
  if kind == 'rwkv7':
    want = {n for n in want if 'v_lora' not in n} | {
        'pre_norm.weight', 'pre_norm.bias'}
  assert at(0) == want
  outside = {name for name in tensors if '.layers.' not in name}
  usual = {'model.embeddings.weight', 'model.norm.weight'}
  assert outside == {'lm_head.weight'} | OUTSIDE.get(kind, set()) | (
      usual if kind != 'mamba2' else set())


@each
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_round_trip_is_bit_equal(kind, dtype, tmp_path):
  """Sharded too, with a hybrid's attention layers."""
  more = {} if kind in ('transformer', 'mamba2') else dict(
      attn=dict(layers=[1], num_heads=4, num_kv_heads=2, window_size=7))
  cfg = hf_settings.config_from_hf(published.config_of(kind, **more))
  cfg = dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, dtype=dtype))
  params = jax.tree.map(
      lambda x: np.asarray(jnp.asarray(x, dtype), np.float32),
      published.random(cfg))
  if kind == 'rwkv7':  # the first layer has no values to mix with
    mixer = params['units']['block_0']['mixer']
    for name in ('first_in', 'first_out', 'first_bias'):
      mixer[name] = mixer[name].copy()
      mixer[name][0] = 0
  hf.files.save(tmp_path, cfg, params, shard=4000)
  assert len(list(tmp_path.glob('*.safetensors'))) > 1
  again, same = convert.load_hf(tmp_path)
  assert again == cfg
  jax.tree.map(np.testing.assert_array_equal, same, params)
  written = json.loads((tmp_path / 'config.json').read_text())
  assert written['model_type'] == kind


# What the published layers compute, in float64, from tensors by their names.


def _sigmoid(x):
  return 1 / (1 + np.exp(-x))


def _silu(x):
  return x * _sigmoid(x)


def _conv(w, u):
  padded = np.concatenate([np.zeros((3, u.shape[1])), u])
  return sum(padded[j : j + len(u)] * w['weight'][:, 0, j] for j in range(4))


def _norm(x, weight):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def _unit(x):
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _scan(q, k, v, log_decay=None, beta=None):
  """[T, H, ...]; the read is scaled."""
  S, reads = np.zeros((*q.shape[1:], v.shape[-1])), []
  for t in range(len(q)):
    if log_decay is not None:
      g = np.exp(log_decay[t])
      S = S * g.reshape(*g.shape, *[1] * (3 - g.ndim))
    u = v[t] if beta is None else beta[t][:, None] * (
        v[t] - np.einsum('hk,hkv->hv', k[t], S))
    S = S + k[t][:, :, None] * u[:, None]
    reads.append(np.einsum('hk,hkv->hv', q[t], S))
  return np.stack(reads) * q.shape[-1] ** -0.5


def _rwkv7(w, x, first):
  """The mixer on x [T, D], `first` the values of the first layer."""
  T, H = len(x), 2
  before = np.concatenate([np.zeros((1, D)), x[:-1]])
  read = {n: x + (before - x) * w[''][f'x_{n}'][0, 0] for n in 'rwkvag'}
  lora = lambda n, inner: inner(
      read[n] @ w[f'{n}_lora.lora.0']['weight'].T) @ w[
          f'{n}_lora.lora.2']['weight'].T + w[f'{n}_lora.lora.2'].get('bias', 0)
  same = lambda u: u
  heads = lambda u: u.reshape(T, H, -1)
  r, k, v = (read[n] @ w[f'{n}_proj']['weight'].T for n in 'rkv')
  v = v + _sigmoid(lora('v', same)) * (first - v)
  decay = np.exp(-0.6065306597126334 * _sigmoid(lora('w', np.tanh)))
  a = _sigmoid(lora('a', same))
  kk = _unit(heads(k * w['']['k_k']))
  k = heads(k * (1 + (a - 1) * w['']['k_a']))
  r, v, decay, a = map(heads, (r, v, decay, a))
  S, reads = np.zeros((H, K7, K7)), []
  for t in range(T):
    erased = np.einsum('hk,hkv->hv', kk[t], S)
    S = (decay[t][:, :, None] * S - (kk[t] * a[t])[:, :, None] * erased[:, None]
         + k[t][:, :, None] * v[t][:, None])
    reads.append(np.einsum('hk,hkv->hv', r[t], S))
  o = np.stack(reads)
  o = o - o.mean(-1, keepdims=True)
  o = o / np.sqrt((o**2).mean(-1, keepdims=True) + K7 * 1e-6)
  o = o.reshape(T, -1) * w['g_norm']['weight'] + w['g_norm']['bias']
  o = o + ((r * k * w['']['r_k']).sum(-1, keepdims=True) * v).reshape(T, -1)
  return (o * lora('g', _sigmoid)) @ w['o_proj']['weight'].T


K7 = 8  # size of rwkv7's heads here


def _mamba2(w, x):
  """The mixer on x [T, D]."""
  T, H, V, N = len(x), 3, 8, 6
  z, u, dt = np.split(
      x @ w['in_proj']['weight'].T, [H * V, 2 * H * V + 2 * N], axis=1)
  u = _silu(_conv(w['conv1d'], u) + w['conv1d']['bias'])
  x, B, C = np.split(u, [H * V, H * V + N], axis=1)
  x, dt = x.reshape(T, H, V), np.logaddexp(0, dt + w['']['dt_bias'])
  S, reads = np.zeros((H, N, V)), []
  for t in range(T):
    S = np.exp(-np.exp(w['']['A_log']) * dt[t])[:, None, None] * S
    S = S + B[t][None, :, None] * (dt[t][:, None] * x[t])[:, None]
    reads.append(np.einsum('k,hkv->hv', C[t], S)
                 + w['']['D'][:, None] * x[t])
  o = np.stack(reads).reshape(T, -1) * _silu(z)
  return _norm(o, w['norm']['weight']) @ w['out_proj']['weight'].T


def _oracle(kind, tensors, bound, x, first):
  """The mixer on x [T, D]."""
  H = 2
  w = {}
  for name, value in tensors.items():
    *path, leaf = name.split('.')
    w.setdefault('.'.join(path), {})[leaf] = np.asarray(value, np.float64)
  if kind == 'mamba2':
    return _mamba2(w, x)
  if kind == 'rwkv7':
    return _rwkv7(w, x, first)
  proj = lambda name: x @ w[f'{name}_proj']['weight'].T
  heads = lambda u: u.reshape(len(u), H, -1)
  flat = lambda o: o.reshape(len(o), -1)
  if kind == 'hgrn2':
    q, f, v = proj('q'), proj('f'), proj('i')
    f = bound + (1 - bound) * _sigmoid(f)
    o = _scan(heads(_silu(q)), heads(1 - f), heads(v), np.log(heads(f)))
    o = _norm(flat(o), w['g_norm']['weight'])
  elif kind == 'gsa':
    q, k, v = (heads(_silu(proj(n))) for n in 'qkv')
    f = _sigmoid(heads(proj('f'))) ** (1 / 8)
    A, B, reads = np.zeros((H, q.shape[-1], 64)), np.zeros(
        (H, 64, v.shape[-1])), []
    for t in range(len(q)):
      A = A * f[t][:, None] + k[t][:, :, None] * (1 - f[t])[:, None]
      B = B * f[t][:, :, None] + (1 - f[t])[:, :, None] * v[t][:, None]
      score = np.exp(np.einsum('hk,hkm->hm', q[t], A))
      reads.append(np.einsum(
          'hm,hmv->hv', score / score.sum(-1, keepdims=True), B))
    o = _norm(_silu(flat(np.stack(reads))), w['g_norm']['weight'])
  elif kind == 'linear_attn':
    def mapped(u, which):
      one, two = (
          u @ w[f'feature_map_{which}.{n}']['weight'].T
          + w[f'feature_map_{which}.{n}']['bias'] for n in (
              'layer1', 'layer2'))
      return one * two

    q, k, v = (heads(proj(n)) for n in 'qkv')
    o = flat(_norm(_scan(mapped(q, 'q'), mapped(k, 'k'), v),
                   w['norm']['weight']))
  elif kind == 'retnet':
    q, k, v = (heads(proj(n)) for n in 'qkv')

    def turn(u):
      half = u.shape[-1] // 2
      angle = np.arange(len(u))[:, None, None] * 10000.0 ** (
          -np.arange(half) / half)
      a, b = u[..., :half], u[..., half:]
      return np.concatenate([a * np.cos(angle) - b * np.sin(angle),
                             b * np.cos(angle) + a * np.sin(angle)], -1)

    decay = np.log(1 - 2.0 ** (-5 - np.arange(H)))
    o = _scan(turn(q), turn(k), v, np.broadcast_to(decay, (len(x), H)))
    o = flat(_norm(o, w['g_norm_swish_gate']['weight'])) * _silu(proj('g'))
  elif kind == 'gla':
    q, k, v = (heads(proj(n)) for n in 'qkv')
    g = x @ w['gk_proj.0']['weight'].T @ w['gk_proj.1']['weight'].T
    g = heads(np.log(_sigmoid(g + w['gk_proj.1']['bias'])) / 16)
    o = flat(_norm(_scan(q, k, v, g), w['g_norm_swish_gate']['weight']))
    o = o * _silu(proj('g'))
  else:
    q, k, v = (
        heads(_silu(_conv(w[f'{n}_conv1d'], proj(n)))) for n in 'qkv')
    g = None
    if kind == 'gated_deltanet':
      dt = np.logaddexp(0, proj('a') + w['']['dt_bias'])
      g = -np.exp(w['']['A_log']) * dt
    o = flat(_norm(_scan(_unit(q), _unit(k), v, g, _sigmoid(proj('b'))),
                   w['o_norm']['weight']))
    if kind == 'gated_deltanet':
      o = o * _silu(proj('g'))
  return o @ w['o_proj']['weight'].T


@pytest.mark.parametrize('kind', sorted({*PUBLISHED} - {'transformer'}))
def test_tensors_mean_what_the_published_layer_computes(kind):
  cfg = hf_settings.config_from_hf(published.config_of(kind))
  cfg = config.override(cfg, ['model.mixer.chunk=8'])
  params = published.random(cfg)
  tensors = hf.tensors.to_state_dict(cfg.model, params, mom=False)
  prefix, at, bound = 'model.layers.1.attn.', 1, 0
  if kind == 'mamba2':
    prefix = 'backbone.layers.1.mixer.'
  layer = mom.layer_values(cfg.model.mixer, LAYERS, None)
  if kind == 'hgrn2':
    share = np.exp(tensors['model.lower_bounds'].astype(np.float64))
    share /= share.sum(0)
    bound = share[1]
    layer = mom.layer_values(
        cfg.model.mixer, LAYERS, {'bound': jnp.asarray(params['layers_bound'])})
  x = np.random.default_rng(1).normal(size=(T, D))
  mine = jax.tree.map(
      lambda a: a[at], params['units']['block_0']['mixer'])
  layer, first = layers.LayerInfo(jax.tree.map(lambda a: a[at], layer)), None
  if kind == 'rwkv7':
    first = np.random.default_rng(2).normal(size=(T, D))
    layer = layer._replace(
        v_first_BTHV=jnp.asarray(first.reshape(1, T, 2, -1), jnp.float32))
  y, _, _ = jax.jit(block.MIXERS['mom'].make(cfg.model).apply)(
      {'params': mine}, jnp.asarray(x, jnp.float32)[None], None,
      jnp.ones((1, T), jnp.int32), None, layer)
  want = _oracle(
      kind, {name.removeprefix(prefix): value for name, value in
             tensors.items() if name.startswith(prefix)}, bound, x, first)
  contract.outputs_agree(y[0], want)


@functools.cache
def _model(kind):
  """(config, parameters, compiled model) of blocks of their own."""
  cfg = hf_settings.config_from_hf(published.config_of(kind))
  cfg = config.override(cfg, ['model.mixer.chunk=8', 'model.remat=none'])
  params, run = published.random(cfg), jax.jit(models.LM(cfg).apply)
  return cfg, params, lambda tokens, segment, cache=None: run(
      {'params': params}, jnp.asarray(tokens), segment_BT=jnp.asarray(segment),
      cache=cache)


def test_a_whole_rwkv7_reads_as_published():
  """First norm, norms with biases, values of the first layer, shifted MLPs."""
  cfg, params, apply = _model('rwkv7')
  w = {name: np.asarray(a, np.float64) for name, a in
       hf.tensors.to_state_dict(cfg.model, params, mom=False).items()}
  tokens = np.random.default_rng(3).integers(0, WORDS, (2, 12))

  def norm(x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * w[f'{name}.weight'] + w[f'{name}.bias']

  x = norm(w['model.embeddings.weight'][tokens[0]], 'model.layers.0.pre_norm')
  first = None
  for i in range(LAYERS):
    at, mixer = f'model.layers.{i}', {}
    for name, value in w.items():
      if name.startswith(f'{at}.attn.'):
        *path, leaf = name.removeprefix(f'{at}.attn.').split('.')
        mixer.setdefault('.'.join(path), {})[leaf] = value
    y = norm(x, f'{at}.attn_norm')
    before = np.concatenate([np.zeros((1, D)), y[:-1]])
    if first is None:  # mixing values with themselves changes nothing
      first = (y + (before - y) * mixer['']['x_v'][0, 0]) @ mixer[
          'v_proj']['weight'].T
      mixer |= {f'v_lora.lora.{n}': {'weight': np.zeros(shape)}
                for n, shape in ((0, (1, D)), (2, (D, 1)))}
    x = x + _rwkv7(mixer, y, first)
    y = norm(x, f'{at}.ffn_norm')
    before = np.concatenate([np.zeros((1, D)), y[:-1]])
    y = (y + (before - y) * w[f'{at}.ffn.x_k']) @ w[f'{at}.ffn.key.weight'].T
    x = x + np.maximum(y, 0) ** 2 @ w[f'{at}.ffn.value.weight'].T
  want = norm(x, 'model.norm') @ w['lm_head.weight'].T
  contract.outputs_agree(apply(tokens, [[1] * 12] * 2).logits[0], want)


@pytest.mark.parametrize('kind', ['rwkv7', 'mamba2'])
def test_models_of_blocks_of_their_own_decode_as_they_read(kind):
  """Two tokens a call, one of them padding in the second row; packed too."""
  cfg, _, apply = _model(kind)
  tokens = np.random.default_rng(4).integers(0, WORDS, (2, 12))
  want = apply(tokens, [[1] * 12] * 2).logits
  both = np.concatenate([tokens[0, :5], tokens[1, :7]])
  got = apply(np.stack([both, both]), [[1] * 5 + [2] * 7] * 2).logits[0]
  contract.outputs_agree(got[:5], want[0, :5])
  contract.outputs_agree(got[5:], want[1, :7])
  cache = models.init_cache(cfg, 2, 12)
  for i in range(6):
    real = [0, 1] if i % 2 else [1, 0]
    two = np.stack([tokens[0, 2 * i : 2 * i + 2], [tokens[1, i]] * 2])
    logits, cache, _ = apply(two, [[1, 1], real], cache)
    contract.outputs_agree(logits[0], want[0, 2 * i : 2 * i + 2])
    contract.outputs_agree(logits[1, i % 2], want[1, i])


def test_values_in_groups_are_read_and_written(tmp_path):
  """Fewer heads of keys than of values: each key serves heads side by side."""
  cfg = hf_settings.config_from_hf(
      published.config_of('gated_deltanet', num_v_heads=4))
  mixer = cfg.model.mixer
  assert (mixer.num_heads, mixer.key_heads, mixer.value_dim) == (4, 2, 12)
  params = published.random(cfg)
  hf.files.save(tmp_path, cfg, params)
  again, same = convert.load_hf(tmp_path)
  assert again == cfg
  jax.tree.map(np.testing.assert_array_equal, same, params)
  take = lambda name: params['units']['block_0']['mixer'][name][0]
  own = {name: take(name) for name in (
      'A_log', 'dt_bias', 'conv_value', 'value', 'beta', 'decay')}
  own |= {name: jax.tree.map(lambda a: a[0], params['units']['block_0'][
      'mixer'][name]) for name in ('norm', 'gate', 'output')}
  own |= {name: np.repeat(take(name), 2, axis=-2)
          for name in ('query', 'key', 'conv_query', 'conv_key')}
  x = jnp.asarray(np.random.default_rng(1).normal(size=(1, T, D)), jnp.float32)
  run = lambda model, p: jax.jit(block.MIXERS['mom'].make(model).apply)(
      {'params': p}, x, None, jnp.ones((1, T), jnp.int32))[0]
  full = config.override(cfg, ['model.mixer.key_heads=0'])
  contract.outputs_agree(
      run(cfg.model, jax.tree.map(
          lambda a: jnp.asarray(a[0]), params['units']['block_0']['mixer'])),
      run(full.model, jax.tree.map(jnp.asarray, own)))


def test_unknown_or_missing_tensors_are_listed():
  cfg = hf_settings.config_from_hf(published.config_of('gla'))
  tensors = hf.tensors.to_state_dict(
      cfg.model, published.random(cfg), mom=False)
  tensors['model.layers.9.attn.x'] = tensors.pop('model.norm.weight')
  with pytest.raises(config.UserError, match=(
      r"missing tensors \['model.norm.weight'\], unknown tensors"
      r" \['model.layers.9.attn.x'\]")):
    hf.tensors.from_state_dict(cfg.model, tensors, mom=False)


@pytest.mark.parametrize(
    ('kind', 'more', 'message'),
    [
        ('rwkv4', {}, "model_type='rwkv4'; convert reads delta_net, gated_de"),
        ('gla', dict(feature_map='relu'), "feature_map='relu'; only None"),
        ('gla', dict(num_kv_heads=1), 'num_kv_heads=1; here each'),
        ('gated_deltanet', dict(allow_neg_eigval=True), 'only False is supp'),
        ('rwkv7', dict(value_dim=[16, 32, 16]), 'layers have values of one'),
        ('mamba2', dict(n_groups=3), 'n_groups=3; only 1'),
        ('mamba2', dict(dt_limit=[0.0, 1.0]), 'dt_limit=.0.0, 1.0.; only'),
        ('gsa', dict(num_slots=32), 'num_slots=32; only 64'),
        ('linear_attn', dict(feature_map='dpfp'), "feature_map='dpfp'; known"),
        ('transformer', dict(qk_norm=True), 'qk_norm=True, whose epsilon'),
        ('mamba2', dict(time_step_limit=[0.1, 9.0]), r'time_step_limit=\[0.1'),
        ('mamba2', dict(num_heads=9), 'num_heads=9, but expand, hidden_size'),
        ('gla', dict(gate_power=2), 'has gate_power=2, unknown here; if the'),
        ('retnet', dict(use_short_conv=True), 'use_short_conv=True; only'),
        ('gla', dict(attn=dict(layers=[1], num_heads=2, head_dim=4)),
         'has attn.head_dim=4, unknown here'),
        ('gla', dict(attn=dict(layers=[7], num_heads=2)), 'layers with 7; a l'),
        ('gla', dict(attn=7), 'attn=7; it must be an object'),
        ('gla', dict(attn=[dict(layers=[0], num_heads=2),
                           dict(layers=[1], num_heads=1)]), 'of different se'),
        ('gla', dict(hidden_size='16'), "hidden_size='16'; it must be a whole"),
        ('gla', dict(num_heads=0), 'num_heads=0; it must be a whole number'),
        ('gla', dict(norm_eps=float('nan')), 'norm_eps=nan; it must be a fin'),
        ('gla', dict(tie_word_embeddings='no'), 'must be true or false'),
        ('gla', dict(hidden_size=None), 'hidden_size=None; it must be'),
        ('gla', dict(num_heads=None), 'settings that do not fit together'),
    ],
)
def test_settings_without_a_counterpart_are_refused(kind, more, message):
  settings = published.config_of(kind if kind in PUBLISHED else 'gla', **more)
  with pytest.raises(config.UserError, match=message):
    hf_settings.config_from_hf(settings | {'model_type': kind})


@each
def test_any_value_is_read_or_refused_in_one_line(kind):
  base = published.config_of(kind)
  for key in base:
    for value in (None, -1, 0, 1.5, 'x', [], {}, True, 10**30, float('nan'),
                  [1], {'a': 1}):
      try:
        hf_settings.config_from_hf(base | {key: value})
      except config.UserError as e:
        assert '\n' not in str(e)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (['model.mixer.rule=kda'], "no published format holds .*rule='kda'"),
        (['model.mixer.output_norm=group'], "'gla' cannot hold config.m"),
        (['model.channel_norm=post'], "cannot hold config.model.channel_norm"),
    ],
)
def test_models_without_a_format_are_refused(changes, message):
  cfg = config.override(
      hf_settings.config_from_hf(published.config_of('gla')), changes)
  with pytest.raises(config.UserError, match=message):
    hf_settings.config_to_hf(cfg)


def test_what_is_known_and_changes_nothing_is_read():
  """Misspelt arguments of GSA, one attention in two parts, the loss of MoM."""
  gsa = hf_settings.config_from_hf(published.config_of(
      'gsa', exapnd_k=0.5, use_l2warp=True, transformers_version='4.50.0'))
  assert gsa.model.mixer.key_dim == D // 4
  one = dict(num_heads=2, window_size=7)
  cfg = hf_settings.config_from_hf(published.config_of(
      'gla', attn=[dict(one, layers=[0]), dict(one, layers=[2])]))
  assert cfg.model.pattern == 'attention/mlp mom/mlp attention/mlp'
  cfg = config.override(config.Config(), [
      'model.pattern=mom/mlp', 'model.image_side=0', 'loss.balance=0.003'])
  written = hf_settings.config_to_hf(cfg)
  assert hf_settings.config_from_hf(written).loss.balance == 0.003


@pytest.mark.parametrize('first', [4000, hf.files.SHARD])
def test_a_save_replaces_an_earlier_one(first, tmp_path):
  cfg = hf_settings.config_from_hf(published.config_of('gla'))
  second = hf.files.SHARD if first == 4000 else 4000
  hf.files.save(tmp_path, cfg, published.random(cfg, 0), shard=first)
  hf.files.save(tmp_path, cfg, published.random(cfg, 1), shard=second)
  _, params = convert.load_hf(tmp_path)
  jax.tree.map(
      np.testing.assert_array_equal, params, published.random(cfg, 1))
  files = {p.name for p in tmp_path.iterdir()}
  whole = {'config.json', 'model.safetensors'}
  assert (files == whole) == (second == hf.files.SHARD)
  assert second != 4000 or 'model.safetensors' not in files


def test_files_of_two_saves_are_refused(tmp_path):
  cfg = hf_settings.config_from_hf(published.config_of('gla'))
  params = published.random(cfg)
  hf.files.save(tmp_path, cfg, params, shard=4000)
  hf.files.save(tmp_path / 'other', cfg, params)
  (tmp_path / 'other' / 'model.safetensors').rename(
      tmp_path / 'model.safetensors')
  with pytest.raises(config.UserError, match='and an index of other files'):
    convert.load_hf(tmp_path)


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('config.json', b'[]', 'must hold a JSON object'),
        ('config.json', b'{"a"', 'config.json cannot be read'),
        ('model.safetensors', b'', 'model.safetensors cannot be read'),
        ('model.safetensors', b'\xff' * 99, 'model.safetensors cannot be read'),
        ('model.safetensors.index.json', b'{}', 'must have a "weight_map"'),
        ('model.safetensors.index.json', b'{"weight_map": {"a": "../x"}}',
         'files of this folder'),
    ],
)
def test_damaged_files_are_named(name, content, message, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(published.config_of('gla')))
  (tmp_path / name).write_bytes(content)
  with pytest.raises(config.UserError, match=message):
    convert.load_hf(tmp_path)


def test_files_are_written_as_umask_says(tmp_path):
  cfg = hf_settings.config_from_hf(published.config_of('gla'))
  old = os.umask(0o027)
  try:
    hf.files.save(tmp_path, cfg, published.random(cfg))
  finally:
    os.umask(old)
  assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def test_each_tensor_keeps_its_type(tmp_path):
  """bfloat16 with A_log in float32, as trainers write it."""
  import safetensors.flax
  cfg = hf_settings.config_from_hf(published.config_of('gated_deltanet'))
  cfg = config.override(cfg, ['model.dtype=bfloat16'])
  tensors = hf.tensors.to_state_dict(
      cfg.model, published.random(cfg), mom=False)
  kinds = {name: 'float32' if name.endswith('A_log') else 'bfloat16'
           for name in tensors}
  hf.files.save(
      tmp_path / 'a', cfg, published.random(cfg), types=kinds)
  read, params = convert.load_hf(tmp_path / 'a')
  assert read.model.dtype == 'bfloat16'
  found = hf.files.stored_types(tmp_path / 'a')
  assert found == kinds
  hf.files.save(tmp_path / 'b', read, params, types=found)
  a, b = (safetensors.flax.load_file(tmp_path / x / 'model.safetensors')
          for x in 'ab')
  for name, kind in kinds.items():
    assert a[name].dtype == b[name].dtype == kind
    np.testing.assert_array_equal(
        np.asarray(a[name], np.float32), np.asarray(b[name], np.float32))


def test_rwkv7_is_read_in_its_older_form():
  """x_x [6, D] held the mixing coefficients of all projections."""
  cfg = hf_settings.config_from_hf(published.config_of('rwkv7'))
  tensors = hf.tensors.to_state_dict(
      cfg.model, published.random(cfg), mom=False)
  older = dict(tensors)
  for layer in range(LAYERS):
    at = f'model.layers.{layer}.attn.x_'
    older[f'{at}x'] = np.concatenate(
        [older.pop(at + x)[0] for x in 'rwkvag'])
  again = hf.tensors.present_form(older, 'rwkv7')
  assert again.keys() == tensors.keys()
  jax.tree.map(np.testing.assert_array_equal, again, tensors)
  kinds = hf.tensors.present_form(dict.fromkeys(older, 'bfloat16'), 'rwkv7')
  assert kinds == dict.fromkeys(tensors, 'bfloat16')
  older['model.layers.1.attn.x_x'] = np.zeros((5, D))
  with pytest.raises(config.UserError, match='x_x has shape .* 6 rows'):
    hf.tensors.present_form(older, 'rwkv7')
  older = hf.tensors.present_form(
      {'backbone.embedding.weight': 1, 'lm_head.weight': 2}, 'mamba2')
  assert older == {'backbone.embeddings.weight': 1, 'lm_head.weight': 2}


def test_pickles_are_not_read(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(published.config_of('gla')))
  (tmp_path / 'pytorch_model.bin').write_bytes(b'cos\nsystem\n')
  with pytest.raises(config.UserError, match='pytorch_model.bin are not read'):
    convert.load_hf(tmp_path)
