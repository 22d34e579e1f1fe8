"""Laws of the Mixture-of-Memories layer, and parity with the official one."""

import dataclasses
import functools

import contract
import flax.linen as nn
import jax
import jax.numpy as jnp
from mom_cases import ALL, IDS
import numpy as np
import pytest

from mom_jax import config
from mom_jax.models import block, memory_params
from mom_jax.training import optimizer

B, T, D = 3, 29, 16


def _cfg(**mixer):
  mixer = dict(num_heads=2, key_dim=8, value_dim=8, chunk=8) | mixer
  return dataclasses.replace(
      config.Config().model, width=D, mixer=config.Mixer(**mixer)
  )


def _mom(cfg):
  return block.MIXERS['mom'].make(cfg)


def _init_cache(cfg):
  return block.MIXERS['mom'].init_cache(cfg, B, None)


@functools.cache
def _layer(cfg):
  """The layer, compiled, and parameters large enough for outputs of order 1."""
  layer = _mom(cfg)
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
  first, cache, _ = _apply(layer, params, x[:, :13], _init_cache(cfg))
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
  got, cache = [], _init_cache(cfg)
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
  params = nn.meta.unbox(jax.jit(_mom(cfg).init)(
      jax.random.key(0), jnp.zeros((1, 2, 256)), None,
      jnp.ones((1, 2), jnp.int32)))['params']
  H, K, D, rank = 2, 8, 256, memory_params.ranks(cfg.mixer, 256)['decay']
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


@pytest.mark.slow_law
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
