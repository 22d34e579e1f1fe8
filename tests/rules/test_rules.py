"""Every memory rule against its recurrence, token by token in float64."""

import dataclasses
import functools
import pathlib
import re
import textwrap

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, rules
from mom_jax.models import block, mom, token_shift

DOCS = pathlib.Path(__file__).parents[2] / 'docs'
H, K, CHUNK = 2, 8, 64
DEPTH, LAYERS = 1, 3  # tested is a layer in the middle
LENGTHS = (1, 63, 64, 65, 200)
every = pytest.mark.parametrize('name', sorted(rules.RULES))
SLOW = ('gsa', 'titans', 'ttt_linear')  # of 16,384 tokens


def _softplus(x):
  return np.logaddexp(0, x)


def _sigmoid(x):
  return np.exp(-_softplus(-x))


def _unit(x):
  return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def _wide(x):
  """A decay per head or key channel, to scale [H, K, V]."""
  return np.exp(x).reshape(*x.shape, *[1] * (3 - x.ndim))


def _decay(gates, constants):
  a = np.exp(constants['A_log'])
  dt = _softplus(gates['decay'] + constants['dt_bias'])
  return -a.reshape(-1, *[1] * (dt.ndim - 1)) * dt


def _add(S, k, v):
  return S + k[:, :, None] * v[:, None, :]


def _look(k, S):
  return np.einsum('hk,hkv->hv', k, S)


# One token each: (S, q, [(k, v)], gates, constants) -> (S, read). A gate of
# every write is [H, n, ...].


def _linear(S, q, writes, gates, constants, t):
  for k, v in writes:
    S = _add(S, k, v)
  return S, _look(q * K**-0.5, S)


def _turn(x, t):
  half = x.shape[-1] // 2
  angle = t * 10000.0 ** (-np.arange(half) / half)
  a, b = x[..., :half], x[..., half:]
  return np.concatenate([
      a * np.cos(angle) - b * np.sin(angle),
      b * np.cos(angle) + a * np.sin(angle)], -1)


def _retention(S, q, writes, gates, constants, t):
  (k, v), = writes
  gamma = 1 - 2.0 ** (-5 - np.arange(H))
  return _linear(
      gamma[:, None, None] * S, _turn(q, t), [(_turn(k, t), v)], gates,
      constants, t)


def _silu(x):
  return x * _sigmoid(x)


def _lightning(S, q, writes, gates, constants, t):
  (k, v), = writes
  slope = 8 / H * np.arange(H) * (1 - constants['layer_fraction'])
  return _linear(
      np.exp(-slope)[:, None, None] * S, _silu(q), [(_silu(k), _silu(v))],
      gates, constants, t)


def _normalised(S, q, k, v, eps):
  S = _add(S, k, np.concatenate([v, np.ones((len(v), 1))], 1))
  read = _look(q, S)
  return S, read[:, :-1] / (read[:, -1:] + eps)


def _squares(x, factor):
  i, j = np.triu_indices(K)
  return x[:, i] * x[:, j] * np.sqrt(factor * np.where(i == j, 1, 2) / K)


def _based(S, q, writes, gates, constants, t):
  (k, v), = writes
  phi = lambda x: np.concatenate(
      [np.ones((len(x), 1)), x * K**-0.25, _squares(x, 0.5)], 1)
  return _normalised(S, phi(q), phi(k), v, 1e-12)


def _rebased(S, q, writes, gates, constants, t):
  (k, v), = writes

  def phi(x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-5)
    return _squares(x * constants['gain'] + constants['offset'], 1.0)

  return _normalised(S, phi(q), phi(k), v, 1e-5)


def _decayed(S, q, writes, gates, constants, t):
  S = _wide(_decay(gates, constants)) * S
  return _linear(S, q, writes, gates, constants, t)


def _mamba2(S, q, writes, gates, constants, t):
  (k, v), = writes
  dt = _softplus(gates['decay'] + constants['dt_bias'])[:, None]
  S = _add(_wide(_decay(gates, constants)) * S, k, dt * v)
  return S, _look(q, S) + constants['D'][:, None] * v


def _gla(S, q, writes, gates, constants, t):
  g = -_softplus(-(gates['decay'] + constants['bias'])) / 16
  return _linear(_wide(g) * S, q, writes, gates, constants, t)


def _hgrn2(S, q, writes, gates, constants, t):
  (k, v), = writes
  bound = constants['bound']
  f = bound + (1 - bound) * _sigmoid(k)
  # 1 - f, without cancellation
  write = (1 - bound) * _sigmoid(-k)
  return _linear(f[:, :, None] * S, _silu(q), [(write, v)], gates, constants, t)


def _gated(S, q, writes, gates, constants, t, most=1.0):
  if 'A_log' in constants:
    S = _wide(_decay(gates, constants)) * S
  for i, (k, v) in enumerate(writes):
    k, beta = _unit(k), most * _sigmoid(gates['beta'][:, i])[:, None]
    S = _add(S, k, beta * (v - _look(k, S)))
  return S, _look(_unit(q) * K**-0.5, S)


def _gated_delta_2(S, q, writes, gates, constants, t):
  S = _wide(_decay(gates, constants)) * S
  for i, (k, v) in enumerate(writes):
    k = _unit(k)
    erase, write = (_sigmoid(gates[n][:, i]) for n in ('erase', 'write'))
    S = _add(S, k, write * v - _look(erase * k, S))
  return S, _look(_unit(q) * K**-0.5, S)


def _gsa(S, q, writes, gates, constants, t):
  (k, v), = writes
  f = np.exp(-_softplus(-gates['forget']) / 8)
  q, k, v = _silu(q), _silu(k), _silu(v)
  A, B = S[:, :K] * f[:, None], S[:, K:].swapaxes(1, 2) * f[:, :, None]
  A, B = _add(A, k, 1 - f), _add(B, 1 - f, v)
  score = np.exp(_look(q, A))
  read = _look(score / score.sum(-1, keepdims=True), B)
  return np.concatenate([A, B.swapaxes(1, 2)], 1), read


def _rwkv6(S, q, writes, gates, constants, t):
  (k, v), = writes
  read = _look(q, _add(S, constants['bonus'] * k, v))
  return _add(_wide(-np.exp(gates['decay'] + constants['w0'])) * S, k, v), read


def _rwkv7(S, q, writes, gates, constants, t):
  (k, v), = writes
  c = constants
  w = np.exp(-np.exp(-0.5) * _sigmoid(gates['decay'] + c['w0']))
  a = _sigmoid(gates['rate'] + c['a0'])
  erased = _unit(k * c['k_k'])
  k = k * (1 + (a - 1) * c['k_a'])
  S = w[:, :, None] * S - (a * erased)[:, :, None] * _look(
      erased, S)[:, None] + k[:, :, None] * v[:, None]
  own = (q * c['r_k'] * k).sum(-1, keepdims=True) * v
  return S, np.concatenate([_look(q, S), own], 1)


def _ttt_linear(S, q, writes, gates, constants, t):
  """W, c and the gradients' sum since the mini-batch began."""
  (k, v), = writes
  c, i = constants, t % 16
  one = lambda x: np.concatenate([x, np.ones((len(x), 1))], 1)
  first = np.concatenate([c['weight'], c['weight_bias'][:, None]], 1)
  start, total = S[:, : K + 1], S[:, K + 1 :]
  tau = lambda i: np.maximum(
      1 / (1 + i) + c['tau_offset'][:, i], 0)[:, None, None]
  if i == 0:
    start, total = start + tau(15) * total, 0 * total

  def norm(z):
    rate = 1 / np.sqrt(z.var(-1, keepdims=True) + 1e-6)
    return (z - z.mean(-1, keepdims=True)) * rate, rate

  hat, rate = norm(_look(one(k), start + first))
  error = (hat * c['scale'] + c['offset'] - (v - k)) * c['scale']
  slope = rate * (error - error.mean(-1, keepdims=True)
                  - hat * (error * hat).mean(-1, keepdims=True))
  total = _add(total, one(k), -_sigmoid(gates['eta'])[:, None] / K * slope)
  hat, _ = norm(_look(one(q), start + first + tau(i) * total))
  return np.concatenate([start, total], 1), (
      q + hat * c['scale'] + c['offset'])


def _titans(S, q, writes, gates, constants, t):
  (k, v), = writes
  start, now, Z = S[:, :K], S[:, K : 2 * K], S[:, 2 * K :]
  if t % 16 == 0:
    start = now
  gate = lambda name: _sigmoid(gates[name])[:, None]
  q, k = _unit(q), _unit(k)
  Z = _add(gate('eta')[:, None] * Z, k,
           gate('theta') / 16 * (v - _look(k, start)))
  now = (1 - gate('alpha'))[:, None] * now + Z
  return np.concatenate([start, now, Z], 1), _look(q, now)


TOKEN = {
    'linear': _linear, 'based': _based, 'rebased': _rebased,
    'retention': _retention, 'lightning': _lightning, 'decay': _decayed,
    'mamba2': _mamba2, 'gla': _gla, 'hgrn2': _hgrn2, 'gsa': _gsa,
    'delta': _gated, 'gated_delta': _gated, 'kda': _gated,
    'gated_delta_product': functools.partial(_gated, most=2.0),
    'gated_delta_2': _gated_delta_2, 'rwkv6': _rwkv6, 'rwkv7': _rwkv7,
    'ttt_linear': _ttt_linear, 'titans': _titans,
}


def _num_householder(name):
  return 2 if name == 'gated_delta_product' else 1


def _inputs(name, lengths, seed=0, heads=H):
  """Differentiable inputs, and which rows are real; groups in order."""
  rng = np.random.default_rng(seed)
  rule, n = rules.RULES[name], _num_householder(name)
  V = K if name == 'ttt_linear' else 12
  chunks = [-(-length // CHUNK) for length in lengths]
  R = sum(chunks) * CHUNK
  real = np.concatenate([
      np.arange(c * CHUNK) < length for c, length in zip(chunks, lengths)])
  draw = lambda *shape: np.where(
      real.reshape(R, *[1] * (len(shape))), rng.normal(size=(R, *shape)), 0)
  gates = {}
  for gate_name, gate in rule.gates.items():
    own = (heads, n) if gate.per_update else (heads,)
    gates[gate_name] = draw(*own, *gate.size(K, V))
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  depth = jnp.asarray(DEPTH / LAYERS)
  stacked = {
      name: jnp.asarray(rng.normal(size=(LAYERS, *c.shape(heads, K, V))))
      for name, c in rule.cross_layer.items()}
  layer = rules.layer_values(rule, stacked, LAYERS)
  state = rng.normal(size=(len(lengths), heads, *rule.state_shape(K, V)))
  if name in ('based', 'rebased'):  # a sum of weights is not just any number
    state *= 0
  inputs = {
      'q': draw(heads, K), 'k': draw(heads, n, K), 'v': draw(heads, n, V),
      'gates': gates,
      'constants': {
          name: constant.init(next(keys), constant.shape(heads, K, V), depth)
          for name, constant in rule.constants.items()
      } | {name: x[DEPTH] for name, x in layer.items()},
      'state': state,
  }
  inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs)
  return inputs, real, np.repeat(np.arange(len(lengths)), chunks)


def _places(real, group_N):
  group_R = np.repeat(group_N, CHUNK)
  first = np.searchsorted(group_R, group_R)
  return np.where(real, np.arange(len(real)) - first, 0).astype(np.int32)


def _run(name, x, real, group_N, backend='auto'):
  return rules.run(
      rules.RULES[name], x['q'], x['k'], x['v'], x['gates'], x['constants'],
      jnp.asarray(real), position_in_memory=jnp.asarray(_places(real, group_N)),
      group_N=jnp.asarray(group_N, jnp.int32),
      segment_R=jnp.asarray(real, jnp.int32), chunk=CHUNK,
      initial_state_GHKV=x['state'], backend=backend)


def _weight(shape):
  return np.random.default_rng(5).normal(size=shape).astype(np.float32)


def _value_and_grads(name, x, real, group_N, backend):
  def loss(x):
    o, last = _run(name, x, real, group_N, backend)
    o = o * real[:, None, None]
    return (o * _weight(o.shape)).sum() + jnp.sin(last).sum(), (o, last)

  return jax.jit(jax.grad(loss, has_aux=True))(x)


def test_every_rule_has_its_recurrence_here():
  assert TOKEN.keys() == rules.RULES.keys()


def _loop(name, x, real, group_N):
  """The results of `_run`, from the recurrence, in float64."""
  group_R, place_R = np.repeat(group_N, CHUNK), _places(real, group_N)
  reads, last = {}, []
  for g, S in enumerate(x['state']):
    for r in np.flatnonzero((group_R == g) & real):
      writes = [(x['k'][r, :, i], x['v'][r, :, i])
                for i in range(_num_householder(name))]
      S, reads[r] = TOKEN[name](
          S, x['q'][r], writes, {n: a[r] for n, a in x['gates'].items()},
          x['constants'], place_R[r])
    last.append(S)
  empty = np.zeros_like(reads[0])
  return np.stack(
      [reads.get(r, empty) for r in range(len(real))]), np.stack(last)


@every
def test_chunks_are_the_recurrence(name):
  """All lengths at once, each a group of its own with an initial state."""
  x, real, group_N = _inputs(name, LENGTHS)
  grads, (o, last) = _value_and_grads(name, x, real, group_N, 'xla')
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), x)
  want_o, want_last = _loop(name, wide, real, group_N)
  contract.outputs_agree(o, want_o)
  contract.outputs_agree(last, want_last)
  want, _ = _value_and_grads(name, x, real, group_N, 'reference')
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      grads, want)


@pytest.mark.parametrize('name', ['ttt_linear', 'titans', 'gsa', 'rwkv7'])
def test_gradients_are_slopes_of_the_recurrence(name):
  """Rules beside one pass of chunk_memory, whose gradients have a reference.

  A step along a random direction of each input, in float64.
  """
  x, real, group_N = _inputs(name, (70, 3))
  grads, _ = _value_and_grads(name, x, real, group_N, 'auto')
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), x)

  def loss(x):
    o, last = _loop(name, x, real, group_N)
    return (o * _weight(o.shape)).sum() + np.sin(last).sum()

  leaves, treedef = jax.tree.flatten(wide)
  for i, grad in enumerate(jax.tree.leaves(grads)):
    along = np.random.default_rng(i).normal(size=leaves[i].shape)
    ahead, back = (
        loss(jax.tree.unflatten(
            treedef, leaves[:i] + [leaves[i] + e * along] + leaves[i + 1 :]))
        for e in (1e-5, -1e-5))
    slope = (ahead - back) / 2e-5
    size = np.linalg.norm(grad) * np.linalg.norm(along) + 1e-3
    assert abs((np.asarray(grad) * along).sum() - slope) < 1e-4 * size, i


T = 40  # tokens of the laws below


@functools.cache
def _program(name):
  """One program for T + 1 groups of a chunk each."""
  def run(x, real, segment_R, place):
    return rules.run(
        rules.RULES[name], x['q'], x['k'], x['v'], x['gates'], x['constants'],
        real, position_in_memory=place, group_N=jnp.arange(T + 1),
        segment_R=segment_R, chunk=CHUNK, initial_state_GHKV=x['state'])
  return jax.jit(run)


def _groups(name, x, source_GC, place_GC, segment_GC, state):
  """Outputs [G, C, ...] and states of groups made of rows of `x`, -1 is none.
  """
  source_R = source_GC.reshape(-1)
  real = source_R >= 0
  rows = lambda a: jnp.where(
      real.reshape(-1, *[1] * (a.ndim - 1)), a[source_R], 0)
  made = x | {n: rows(x[n]) for n in 'qkv'} | {
      'gates': jax.tree.map(rows, x['gates']), 'state': state}
  o, last = _program(name)(
      made, jnp.asarray(real), jnp.asarray(segment_GC.reshape(-1), jnp.int32),
      jnp.asarray(place_GC.reshape(-1), jnp.int32))
  return np.asarray(o).reshape(T + 1, CHUNK, *o.shape[1:]), last


@every
def test_every_split_every_prefix_every_boundary(name):
  """Group s holds s tokens, then the rest from its state; then two documents.
  """
  x, _, _ = _inputs(name, (T, T))
  A, B = np.arange(T), CHUNK + np.arange(T)  # rows of two sequences
  s_G1, i_1C = np.arange(T + 1)[:, None], np.arange(CHUNK)[None]
  at = lambda keep, rows, index: np.where(
      keep, np.take(rows, index, mode='clip'), -1)
  same = lambda keep: np.where(keep, 1, 0)
  zero = jnp.zeros((T + 1, *x['state'].shape[1:]))
  head = i_1C < s_G1
  first, state = _groups(
      name, x, at(head, A, i_1C), i_1C * head, same(head), zero)
  whole = first[T, :T]
  tail = i_1C < T - s_G1
  rest, last = _groups(name, x, at(tail, A, s_G1 + i_1C),
                       (s_G1 + i_1C) * tail, same(tail), state)
  inside = i_1C < T
  begin = np.where(head, 0, s_G1)
  other = np.where(head, at(head, A, i_1C), at(inside, B, i_1C - s_G1))
  packed, _ = _groups(name, x, other, (i_1C - begin) * inside,
                      np.where(inside, 1 + (i_1C >= s_G1), 0), zero)
  for s in range(T + 1):
    np.testing.assert_array_equal(first[s, :s], whole[:s])  # causal
    contract.outputs_agree(rest[s, : T - s], whole[s:])
    contract.outputs_agree(last[s], last[0])
    contract.outputs_agree(packed[s, :s], whole[:s])
    contract.outputs_agree(packed[s, s:T], packed[0, : T - s])


@every
def test_one_memory_is_the_plain_rule(name):
  """A layer of one memory = its maps and the recurrence, in float64."""
  D, V = 12, K if name == 'ttt_linear' else 12
  mixer = config.Mixer(
      rule=name, num_memories=1, top_k=1, shared=False, num_heads=H, key_dim=K,
      value_dim=V, num_householder=_num_householder(name), conv_width=0,
      output_norm='none', output_gate='none', chunk=16)
  model = dataclasses.replace(config.Config().model, width=D, mixer=mixer)
  layer = block.MIXERS['mom'].make(model)
  segment = jnp.ones((1, 20), jnp.int32)
  x = jax.random.normal(jax.random.key(1), (1, 20, D))
  made = jax.eval_shape(layer.init, jax.random.key(0), x, None, segment)
  rng = np.random.default_rng(0)
  p = jax.tree.map(
      lambda s: 0.5 * rng.normal(size=s.shape), made['params'])
  y, _, _ = jax.jit(layer.apply)(
      {'params': jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)}, x,
      None, segment)
  x = np.asarray(x[0], np.float64)
  read = _shifted(rules.RULES[name], p, x)
  k, v = (np.einsum('td,dhk->thk', read(n), p[n][0]).reshape(
      len(x), H, _num_householder(name), -1) for n in ('key', 'value'))
  q = np.einsum('td,dhk->thk', read('query'), p['query'])
  gates = {}
  for n, gate in rules.RULES[name].gates.items():
    own = read(gate.input_of or n)
    if gate.rank:
      own = own @ p[f'{n}_in'][0]
      gates[n] = np.tensordot(
          np.tanh(own) if gate.activation else own, p[f'{n}_out'][0], 1)
    else:
      gates[n] = np.tensordot(own, p[n][0], 1)
    if gate.per_update:
      gates[n] = gates[n].reshape(
          len(x), H, _num_householder(name), *gate.size(K, V))
  layer = mom.layer_values(model.mixer, 1, None)
  constants = {n: p[n] for n in rules.RULES[name].constants} | {
      n: np.asarray(a[0], np.float64) for n, a in layer.items()}
  S, outs = np.zeros((H, *rules.RULES[name].state_shape(K, V))), []
  for t in range(len(x)):
    S, o = TOKEN[name](
        S, q[t],
        [(k[t, :, i], v[t, :, i]) for i in range(_num_householder(name))],
        {n: g[t] for n, g in gates.items()}, constants, t)
    outs.append(o[:, :V] + (o[:, V:] if o.shape[1] > V else 0))
  want = np.einsum('thv,hvd->td', np.stack(outs), p['output']['kernel'])
  contract.outputs_agree(y[0], want)


def _shifted(rule, p, x):
  """Returns the input of each map, by name."""
  if not rule.shift:
    return lambda name: x
  delta = np.concatenate([np.zeros_like(x[:1]), x[:-1]]) - x
  names = token_shift.projection_names(rule)

  def read(name):
    i = names.index(name)
    share = p['shift'][i]
    if rule.shift == 'data':
      low = np.tanh((x + delta * p['shift_query']) @ p['shift_in'][i])
      share = share + low @ p['shift_out'][i]
    return x + delta * share

  return read


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=pytest.mark.slow_law if name in SLOW else ())
    for name in sorted(rules.RULES)])
def test_16k_tokens_of_extreme_gates_and_equal_keys_stay_finite(name):
  """Gates shut, open and in between; keys that differ in the last digits."""
  x, real, group_N = _inputs(name, (1 << 14,), heads=1)
  rng = np.random.default_rng(2)
  extreme = lambda a: jnp.asarray(
      rng.choice([-30.0, 0.0, 30.0], a.shape), jnp.float32)
  x['gates'] = jax.tree.map(extreme, x['gates'])
  x['k'] = x['k'][:1] + 1e-6 * x['k']
  grads, out = _value_and_grads(name, x, real, group_N, 'auto')
  for leaf in jax.tree.leaves((grads, out)):
    assert np.isfinite(leaf).all()


def test_kda_is_gated_delta_2_with_equal_gates():
  x, real, group_N = _inputs('kda', (70,))
  o, last = _run('kda', x, real, group_N)
  beta = x['gates'].pop('beta')[..., None]
  x['gates']['erase'] = jnp.broadcast_to(beta, (*beta.shape[:3], K))
  x['gates']['write'] = jnp.broadcast_to(
      beta, (*beta.shape[:3], x['v'].shape[-1]))
  other, other_last = _run('gated_delta_2', x, real, group_N)
  contract.outputs_agree(other, o)
  contract.outputs_agree(other_last, last)


def test_the_rule_of_the_documentation_works(monkeypatch):
  """As written there; against its recurrence, in chunks."""
  text = (DOCS / 'own_rule.md').read_text()
  (code,) = re.findall(r'^```python\n(.*?)```', text, re.DOTALL | re.MULTILINE)
  (token,) = re.findall(r'(  def _tied\(S, .*?)  ```', text, re.DOTALL)
  assert len(code.splitlines()) < 40
  scope = {}
  exec(code, scope)
  monkeypatch.setitem(rules.RULES, 'tied', scope['TIED'])
  x, real, group_N = _inputs('tied', (150,))
  o, last = _run('tied', x, real, group_N)
  exec(textwrap.dedent(token), scope := dict(globals()))
  S, (q, k, v) = np.asarray(x['state'][0], np.float64), (x[n] for n in 'qkv')
  for t in range(150):
    S, read = scope['_tied'](
        S, q[t], [(k[t, :, 0], v[t, :, 0])],
        {'forget': np.asarray(x['gates']['forget'][t], np.float64)}, {}, t)
    contract.outputs_agree(o[t], read)
  contract.outputs_agree(last[0], S)


def test_unknown_rules_are_named():
  with pytest.raises(ValueError, match="rule='gated' must be one of based"):
    rules.get('gated')
