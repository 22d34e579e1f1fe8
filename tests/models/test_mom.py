"""Laws of the Mixture-of-Memories layer, and parity with the official one."""

import dataclasses
import functools

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, rules
from mom_jax.models import memories, mom
from mom_jax.training import optimizer

B, T, D = 3, 29, 16


def _cfg(**mixer):
  mixer = dict(num_heads=2, key_dim=8, value_dim=8, chunk=8) | mixer
  return dataclasses.replace(
      config.Config().model, width=D, mixer=config.Mixer(**mixer)
  )


@functools.cache
def _layer(cfg):
  """The layer, compiled, and parameters large enough for outputs of order 1."""
  layer = mom.Mom(cfg)
  x = jnp.zeros((1, T, cfg.width))
  params = nn.meta.unbox(
      jax.jit(layer.init)(
          jax.random.key(0), x, None, jnp.ones((1, T), jnp.int32))
  )['params']
  kept = optimizer.NOT_DECAYED | {'weight', 'map_q', 'map_k', 'shift_out'}
  params |= {name: np.asarray(p) + 0.3 for name, p in params.items()
             if name.startswith('conv_') and name.endswith('_bias')}
  grow = lambda path, p: p if path[-1].key in kept or path[
      -1].key.startswith('conv') else jnp.asarray(np.asarray(p) * 15)
  return jax.jit(layer.apply), jax.tree_util.tree_map_with_path(grow, params)


def _apply(layer, params, x, cache=None, segment=None):
  if segment is None:
    segment = np.ones(x.shape[:2], np.int32)
  y, cache, aux = layer(
      {'params': params}, jnp.asarray(x), cache, jnp.asarray(segment))
  # Slices of numpy arrays are not compiled.
  traced = isinstance(y, jax.core.Tracer)
  return y if traced else np.asarray(y), cache, aux


def _x(rows, seed=1):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(rows, T, D)).astype(np.float32)


VARIANTS = {
    'no_shared': dict(shared=False),
    'single_kv': dict(single_kv_proj=True),
    'one_choice': dict(top_k=1),
    'all': dict(num_memories=3, top_k=3),
    'many': dict(num_memories=16),
    'plain': dict(num_memories=1, top_k=1, shared=False),
    'no_gate': dict(output_gate='none'),
    'sigmoid_gate': dict(output_gate='sigmoid', gate_rank=4),
    'gate_first': dict(output_gate='silu_first', output_norm='all'),
    'group_norm': dict(output_norm='group', rule='linear', conv_width=0),
    'features': dict(rule='linear', feature_map='hedgehog', normaliser=True),
    'decayed_features': dict(
        rule='decay', feature_map='elu', normaliser=True),
    'raw': dict(router='softmax_topk_raw', top_k=1),
    'sigmoid': dict(router='sigmoid_topk'),
    'biased': dict(router='softmax_topk_bias'),
    'token_choice': dict(router='token_choice'),
    'plain_shift': dict(
        rule='rwkv7', num_memories=1, top_k=1, shared=False, conv_width=0,
        output_gate='inner_sigmoid', gate_rank=4),
    'wide_values': dict(value_dim=16),
    'one_key': dict(rule='mamba2', key_heads=1, conv_bias=True),
    'low_ranks': dict(rule='kda', low_ranks=(3,)),
    'one_tap': dict(conv_width=1),
    'no_conv': dict(conv_width=0),
    'two_writes': dict(rule='gated_delta_product', num_householder=2),
    'single_kv_low_rank': dict(rule='kda', single_kv_proj=True),
}
ALL = [dict(rule=r) for r in sorted(rules.RULES)] + list(VARIANTS.values())
IDS = sorted(rules.RULES) + list(VARIANTS)


@pytest.fixture(scope='module', params=ALL, ids=IDS)
def variant(request):
  """All laws of a variant run one after another, on the same programs.

  They use the shapes (1, T), (B, T) and, with a cache, (B, 13) and (B, 1). What
  was compiled goes with the variant, or the process runs out of memory maps.
  """
  yield request.param
  _layer.cache_clear()
  jax.clear_caches()


@pytest.mark.parametrize('rows', [1, B])
def test_changing_the_future_leaves_the_past_bit_equal(variant, rows):
  layer, params = _layer(_cfg(**variant))
  x = _x(rows)
  y, _, _ = _apply(layer, params, x)
  for t in (1, 11, T - 1):
    other = np.concatenate([x[:, :t], _x(rows, 2)[:, t:]], 1)
    z, _, _ = _apply(layer, params, other)
    np.testing.assert_array_equal(y[:, :t], z[:, :t])
    assert not np.array_equal(y[:, t:], z[:, t:])


def test_a_sample_alone_equals_the_sample_in_company(variant):
  layer, params = _layer(_cfg(**variant))
  x = _x(B)
  y, _, _ = _apply(layer, params, x)
  for b in range(B):
    alone, _, _ = _apply(layer, params, x[b : b + 1])
    contract.outputs_agree(alone[0], y[b])


def test_packed_documents_equal_documents_alone(variant):
  """States, convolution windows and decay all stop at a document's end."""
  layer, params = _layer(_cfg(**variant))
  x = _x(B)
  segment = np.asarray(
      [[1] * 3 + [2] * 17 + [3] * 9, [4] * 20 + [0] * 9, [1] * 29], np.int32)
  y, _, _ = _apply(layer, params, x, segment=segment)
  for b, start, end in ((0, 0, 3), (0, 3, 20), (0, 20, 29), (1, 0, 20)):
    length = end - start
    padded = np.pad(
        x[b : b + 1, start:end], ((0, 0), (0, T - length), (0, 0)))
    own = (np.arange(T) < length).astype(np.int32)[None]
    alone, _, _ = _apply(layer, params, padded, segment=own)
    contract.outputs_agree(y[b, start:end], alone[0, :length])
  np.testing.assert_array_equal(y[1, 20:], 0)


def _steps(layer, params, cache, x, start, stop):
  """Outputs of x[:, start:stop], a token a call, and the cache after them."""
  outs = []
  for t in range(start, stop):
    one, cache, _ = _apply(layer, params, x[:, t : t + 1], cache)
    outs.append(one)
  return outs, cache


def test_prefill_and_decode_equal_the_whole(variant):
  """13 tokens, 10 more with padding among them, then one at a time."""
  cfg = _cfg(**variant)
  layer, params = _layer(cfg)
  x = _x(B)
  y, _, _ = _apply(layer, params, x)
  first, cache, _ = _apply(layer, params, x[:, :13], mom.init_cache(cfg, B))
  holes = np.array([0, 5, 5])
  padded = np.insert(x[:, 13:23], holes, 7.0, axis=1)
  real = np.insert(np.ones((B, 10), np.int32), holes, 0, axis=1)
  more, cache, _ = _apply(layer, params, padded, cache, real)
  last, _ = _steps(layer, params, cache, x, 23, T)
  got = np.concatenate([first, more[:, real[0] > 0], *last], 1)
  contract.outputs_agree(got, y)


@pytest.mark.parametrize('split', [0, 1, 2, 28])
def test_any_split_of_prefill_and_decode_is_the_same(split):
  cfg = _cfg()
  layer, params = _layer(cfg)
  x = _x(B)
  y, _, _ = _apply(layer, params, x)
  got, cache = [], mom.init_cache(cfg, B)
  if split:
    first, cache, _ = _apply(layer, params, x[:, :split], cache)
    got.append(first)
  rest, _ = _steps(layer, params, cache, x, split, T)
  contract.outputs_agree(jnp.concatenate(got + rest, 1), y)


def test_one_memory_is_the_plain_rule():
  """K = M = 1 with weight 1 is gated delta, token by token."""
  cfg = _cfg(num_memories=1, top_k=1, shared=False)
  layer, params = _layer(cfg)
  x = _x(1)
  y, _, aux = _apply(layer, params, x)
  assert 'router' not in params and aux.stats is None
  want = _plain_gated_delta(params, np.asarray(x[0], np.float64), cfg)
  contract.outputs_agree(y[0], want)


def _plain_gated_delta(params, x_TD, cfg):
  """The layer in float64, one token at a time."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  silu = lambda z: z / (1 + np.exp(-z))
  sigmoid = lambda z: 1 / (1 + np.exp(-z))

  def conv(u_TX, w):
    w_WX = w.reshape(w.shape[0], -1)
    padded = np.concatenate([np.zeros((3, u_TX.shape[1])), u_TX])
    return silu(sum(padded[j : j + len(u_TX)] * w_WX[j] for j in range(4)))

  heads = lambda u: u.reshape(len(u), 2, -1)
  q = heads(conv(x_TD @ p['query'].reshape(D, -1), p['conv_query']))
  k = heads(conv(x_TD @ p['key'][0].reshape(D, -1), p['conv_key']))
  v = heads(conv(x_TD @ p['value'][0].reshape(D, -1), p['conv_value']))
  norm = lambda u: u / np.sqrt((u**2).sum(-1, keepdims=True) + 1e-6)
  q, k = norm(q), norm(k)
  beta = sigmoid(x_TD @ p['beta'][0])
  g = -np.exp(p['A_log']) * np.log1p(
      np.exp(x_TD @ p['decay'][0] + p['dt_bias'])
  )
  S, out = np.zeros((2, 8, 8)), []
  for t in range(len(x_TD)):
    S = np.exp(g[t])[:, None, None] * S
    u = beta[t][:, None] * (v[t] - np.einsum('hk,hkv->hv', k[t], S))
    S = S + np.einsum('hk,hv->hkv', k[t], u)
    out.append(np.einsum('hk,hkv->hv', q[t] * 8**-0.5, S))
  o = np.stack(out)
  o = o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-6) * p['norm']['scale']
  gate = np.einsum('td,dhv->thv', x_TD, p['gate']['kernel'])
  return np.einsum('thv,hvd->td', o * silu(gate), p['output']['kernel'])


def test_every_map_begins_as_its_matrix_would():
  """Xavier of each memory's own matrix, gates of few outputs included."""
  cfg = _cfg(rule='kda', num_memories=2, top_k=1, gate_rank=4)
  cfg = dataclasses.replace(cfg, width=256)
  params = nn.meta.unbox(jax.jit(mom.Mom(cfg).init)(
      jax.random.key(0), jnp.zeros((1, 2, 256)), None,
      jnp.ones((1, 2), jnp.int32)))['params']
  H, K, D, rank = 2, 8, 256, memories.ranks(cfg.mixer, 256)['decay']
  for name, fans in (
      ('query', D + H * K), ('key', D + H * K), ('value', D + H * K),
      ('beta', D + H), ('decay_in', D + rank), ('decay_out', rank + H * K),
      ('gate_in', D + 4), ('gate', 4 + H * K), ('output', H * K + D)):
    values = params[name]
    values = values['kernel'] if isinstance(values, dict) else values
    bound, largest = 2**-2.5 * (6 / fans) ** 0.5, float(jnp.abs(values).max())
    assert 0.9 * bound < largest <= bound, name


def test_order_of_memories_does_not_matter():
  layer, params = _layer(_cfg())
  x = _x(2)
  y, _, _ = _apply(layer, params, x)
  order = np.asarray([2, 0, 3, 1])
  moved = dict(params)
  moved['router'] = {'kernel': params['router']['kernel'][:, order]}
  for name in ('key', 'value', 'beta', 'decay'):
    moved[name] = params[name][np.append(order, 4)]
  z, _, _ = _apply(layer, moved, x)
  contract.outputs_agree(z, y)


def test_router_learns_from_the_loss_only_with_two_choices():
  """With one choice its weight is the constant 1, unless left as it is."""
  for top_k, router, learns in (
      (1, 'softmax_topk', False), (2, 'softmax_topk', True),
      (1, 'softmax_topk_raw', True), (1, 'sigmoid_topk', False),
      (1, 'softmax_topk_bias', False), (1, 'token_choice', True)):
    layer, params = _layer(_cfg(top_k=top_k, router=router))
    loss = lambda p: (_apply(layer, p, _x(B))[0] ** 2).sum()  # noqa: B023
    grad = jax.jit(jax.grad(loss))(params)['router']['kernel']
    assert (np.abs(grad).max() > 1e-3) == learns


@pytest.mark.parametrize('router', ['softmax_topk_bias', 'token_choice'])
def test_bias_moves_towards_memories_with_few_tokens(router):
  """It picks, and is moved against the load without touching gradients."""
  cfg = _cfg(router=router, top_k=1, balance_rate=0.1)
  layer, params = _layer(cfg)
  _, _, aux = _apply(layer, params, _x(B))
  step = aux.state['balance_bias'] - params['balance_bias']
  load = aux.stats.load_E
  assert (np.sign(step)[np.argmax(load)] < 0 < np.sign(step)[np.argmin(load)])
  forced = params | {'balance_bias': jnp.asarray([0, 5.0, 0, 0])}
  _, _, aux = _apply(layer, forced, _x(B))
  np.testing.assert_allclose(aux.stats.load_E, [0, 1, 0, 0])


def test_routers_that_pick_tokens_are_refused():
  with pytest.raises(ValueError, match="router='threshold' picks tokens for a"):
    _layer(_cfg(router='threshold'))


def test_gradients_equal_those_of_every_memory_reading_every_token():
  """Grouped rows against a dense form that masks instead of sorting."""
  layer, params = _layer(_cfg(conv_width=1, num_memories=3))
  x = _x(2)

  def dense(params, x):
    total = 0
    scores = x @ params['router']['kernel']
    p = jax.nn.softmax(scores)
    _, index = jax.lax.top_k(p, 2)
    chosen = jax.nn.one_hot(index, 3).sum(-2)
    w = p * chosen
    w /= w.sum(-1, keepdims=True)
    one = mom.Mom(_cfg(conv_width=1, num_memories=1, top_k=1, shared=False))
    for m in range(4):
      # A token that memory m does not take is padding to it.
      own = {k: v for k, v in params.items() if k != 'router'}
      own |= {k: v[m : m + 1] for k, v in params.items()
              if k in ('key', 'value', 'beta', 'decay')}
      taken = chosen[..., m] > 0 if m < 3 else jnp.ones(x.shape[:2], bool)
      read = _reads(one, own, x, taken)
      total += read * w[..., m, None, None] if m < 3 else read
    o = total * jax.lax.rsqrt((total**2).mean(-1, keepdims=True) + 1e-6)
    o *= params['norm']['scale'][None, None, None]
    gate = jnp.einsum('btd,dhv->bthv', x, params['gate']['kernel'])
    return jnp.einsum(
        'bthv,hvd->btd', o * jax.nn.silu(gate), params['output']['kernel']
    )

  ours = lambda params, x: _apply(layer, params, x)[0]
  results = [
      jax.jit(jax.value_and_grad(
          lambda p, x, f=f: (jnp.sin(y := f(p, x)).sum(), y), (0, 1),
          has_aux=True))(params, x)
      for f in (ours, dense)
  ]
  ((_, got_y), got), ((_, want_y), want) = results
  contract.outputs_agree(got_y, want_y)
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      got, want)


def _reads(layer, params, x, taken):
  """Reads of one memory before norm and gate."""
  reads = []
  old = memories.Read.__call__

  def spy(self, batched, weights):
    out = old(self, batched, weights)
    reads.append(out[0])
    return out

  memories.Read.__call__ = spy
  try:
    layer.apply({'params': params}, x, None, taken.astype(jnp.int32))
  finally:
    memories.Read.__call__ = old
  return reads[0]


