"""Laws of causal attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax.models import attention
from mom_jax.rules import rotary

T, D = 13, 16
VARIANTS = {
    'plain': dict(num_kv_heads=4, qk_norm=False),
    'qk_norm': dict(num_kv_heads=4),
    'grouped': dict(num_kv_heads=2),
    'one_kv_head': dict(num_kv_heads=1),
    'window': dict(window=3),
    'window_of_one': dict(window=1),
}
every = pytest.mark.parametrize('variant', VARIANTS.values(), ids=VARIANTS)


def _layer(**settings):
  return attention.Attention(
      D, **dict(num_heads=4, num_kv_heads=2, head_dim=4) | settings)


@functools.cache
def _compiled(layer):
  """The compiled layer and parameters large enough for uneven attention."""
  init = jax.jit(layer.init)
  params = init(jax.random.key(0), jnp.zeros((1, 2, D)))['params']
  keys = iter(jax.random.split(jax.random.key(1), 16))
  grow = lambda p: jax.random.normal(next(keys), p.shape) * 0.4
  return jax.jit(layer.apply), jax.tree.map(grow, params)


def _apply(apply, params, x, cache=None, segment=None):
  return apply({'params': params}, x, cache, segment)[:2]


def _x(B=2):
  return jax.random.normal(jax.random.key(2), (B, T, D))


@every
def test_equals_the_definition(variant):
  """Against a loop over tokens in float64."""
  layer = _layer(**variant)
  apply, params = _compiled(layer)
  x = _x(1)
  got, _ = _apply(apply, params, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  heads = lambda name: np.einsum('td,dhk->thk', x[0], p[name]['kernel'])

  def norm(u, name):
    if not layer.qk_norm:
      return u
    mean = (u**2).mean(-1, keepdims=True)
    return u / np.sqrt(mean + layer.norm_eps) * p[name]['scale']

  def turn(u, t):
    out = np.empty_like(u)
    for i in range(2):
      a = t * 10000.0 ** (-i / 2)
      out[:, i] = u[:, i] * np.cos(a) - u[:, i + 2] * np.sin(a)
      out[:, i + 2] = u[:, i + 2] * np.cos(a) + u[:, i] * np.sin(a)
    return out

  q = np.stack([turn(u, t) for t, u in enumerate(
      norm(heads('query'), 'query_norm'))])
  k = np.stack([turn(u, t) for t, u in enumerate(
      norm(heads('key'), 'key_norm'))])
  v = heads('value')
  for t in range(T):
    first = max(0, t + 1 - layer.window) if layer.window else 0
    y_HK = []
    for h in range(4):
      g = h // (4 // layer.num_kv_heads)
      score = k[first : t + 1, g] @ q[t, h] / 2
      weight = np.exp(score - score.max())
      y_HK.append(weight / weight.sum() @ v[first : t + 1, g])
    want = np.einsum('hk,hkd->d', np.stack(y_HK), p['output']['kernel'])
    np.testing.assert_allclose(got[0, t], want, atol=1e-5)


@every
def test_prefill_and_decode_equal_the_whole(variant):
  """At every split; what the prefill does not hold yet is padding in it."""
  layer = _layer(**variant)
  apply, params = _compiled(layer)
  x = _x()
  want, _ = _apply(apply, params, x)
  empty = layer.init_cache(2, T)
  for split in range(1, T):
    segment = jnp.where(jnp.arange(T) < split, 1, 0)[None].repeat(2, 0)
    got, cache = _apply(apply, params, x, empty, segment)
    outs = [got[:, :split]]
    for t in range(split, T):
      got, cache = _apply(apply, params, x[:, t : t + 1], cache)
      outs.append(got)
    np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5)
    np.testing.assert_array_equal(cache['length_B'], [T, T])


@pytest.mark.parametrize('split', [1, 6, T - 1])
def test_a_row_may_go_on_with_many_tokens(split):
  layer = _layer(window=5)
  apply, params = _compiled(layer)
  x = _x()
  want, _ = _apply(apply, params, x)
  cache = layer.init_cache(2, T + 2)
  a, cache = _apply(apply, params, x[:, :split], cache)
  b, cache = _apply(apply, params, x[:, split:], cache)
  np.testing.assert_allclose(jnp.concatenate([a, b], 1), want, atol=1e-5)


@every
def test_packed_documents_equal_documents_alone(variant):
  """Positions restart and nothing is read across; padding may stand inside."""
  apply, params = _compiled(_layer(**variant))
  x = _x()
  segment = jnp.asarray(
      [[1] * 3 + [2] * 7 + [3] * 3, [0, 4, 4, 0, 0, 4, 4, 5, 0, 5, 5, 5, 0]]
  )
  got, _ = _apply(apply, params, x, segment=segment)
  for b in range(2):
    for document in np.unique(segment[b]):
      where = np.flatnonzero(np.asarray(segment[b]) == document)
      if document == 0:
        np.testing.assert_array_equal(got[b, where], 0)
        continue
      own = x[b : b + 1, np.resize(where, T)]  # repeated: the past is alone
      alone, _ = _apply(apply, params, own)
      np.testing.assert_allclose(
          got[b, where], alone[0, : len(where)], atol=1e-5)


def test_changing_the_future_leaves_the_past_bit_equal():
  apply, params = _compiled(_layer())
  x = _x(1)
  got, _ = _apply(apply, params, x)
  for t in (1, 6, T - 1):
    other, _ = _apply(apply, params, x.at[:, t:].add(1.0))
    np.testing.assert_array_equal(got[:, :t], other[:, :t])
    assert not np.array_equal(got[:, t:], other[:, t:])


@every
def test_padding_may_stand_anywhere_in_front_of_a_cache(variant):
  """Rows padded differently, in prefill and decode, read as without it."""
  layer = _layer(**variant)
  apply, params = _compiled(layer)
  x = _x()
  want, _ = _apply(apply, params, x)
  steps = [
      [[1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 0]],
      [[0], [1]],
      [[1], [1]],
      [[0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]],
      [[1], [0]],
      [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]],
  ]
  cache = layer.init_cache(2, T)
  seen = np.zeros(2, int)
  for step in steps:
    segment = np.asarray(step, np.int32)
    padded = np.full((*segment.shape, D), 7.0, np.float32)
    for b in range(2):
      where = np.flatnonzero(segment[b])
      padded[b, where] = x[b, seen[b] : seen[b] + len(where)]
    got, cache = _apply(
        apply, params, jnp.asarray(padded), cache, jnp.asarray(segment))
    for b in range(2):
      where = np.flatnonzero(segment[b])
      np.testing.assert_allclose(
          got[b, where], want[b, seen[b] : seen[b] + len(where)], atol=1e-5)
      np.testing.assert_array_equal(got[b, segment[b] == 0], 0)
    seen += segment.sum(1)
  np.testing.assert_array_equal(cache['length_B'], [13, 13])


def test_a_full_cache_answers_not_a_number():
  layer = _layer()
  apply, params = _compiled(layer)
  cache = layer.init_cache(1, 4)
  got, _ = _apply(apply, params, _x(1), cache)
  assert np.isfinite(got[:, :4]).all() and np.isnan(got[:, 4:]).all()


def test_grouped_heads_equal_repeated_heads():
  grouped, params = _compiled(_layer(num_kv_heads=2))
  whole, _ = _compiled(_layer(num_kv_heads=4))
  repeated = dict(params)
  for name in ('key', 'value'):
    kernel = jnp.repeat(params[name]['kernel'], 2, axis=1)
    repeated[name] = {'kernel': kernel}
  got, _ = _apply(grouped, params, _x())
  want, _ = _apply(whole, repeated, _x())
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_rotary_scores_depend_on_distance_only():
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
  turned = lambda x, t: rotary.rotate(x, jnp.full((1, 1), t), 100.0)
  score = lambda t, s: (turned(q, t) * turned(k, s)).sum()
  np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
  assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_cudnn_by_name_says_why_it_cannot_run():
  mask = jnp.ones((1, 4, 4), bool)
  q = jnp.ones((1, 4, 2, 8))
  with pytest.raises(NotImplementedError, match='NVIDIA GPU'):
    attention.attend(q, q, q, mask, 'cudnn')


@pytest.mark.gpu
def test_cudnn_equals_xla():
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (
      jax.random.normal(key, (2, 64, heads, 32), jnp.bfloat16)
      for key, heads in zip(keys, (4, 2, 2))
  )
  segment = jnp.repeat(jnp.asarray([[1, 2], [3, 0]]), 32, axis=1)
  mask = attention._document_mask(segment)

  def run(backend):
    loss = lambda q, k, v: jnp.square(
        attention.attend(q, k, v, mask, backend).astype(jnp.float32)).sum()
    return jax.value_and_grad(loss, (0, 1, 2))(q, k, v)

  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          np.asarray(a, np.float32), np.asarray(b, np.float32),
          atol=3e-2, rtol=3e-2),
      run('cudnn'), run('xla'),
  )
