"""Every memory rule against its recurrence, token by token in float64."""

import functools
import pathlib
import re

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import rules

DOCS = pathlib.Path(__file__).parents[1] / 'docs'
H, K, V, CHUNK = 2, 8, 12, 64
LENGTHS = (1, 63, 64, 65, 200)
every = pytest.mark.parametrize('name', sorted(rules.RULES))


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


def _linear(S, q, writes, gates, constants):
  for k, v in writes:
    S = _add(S, k, v)
  return S, _look(q * K**-0.5, S)


def _retention(S, q, writes, gates, constants):
  gamma = 1 - 2.0 ** (-5 - np.arange(H))
  return _linear(gamma[:, None, None] * S, q, writes, gates, constants)


def _decayed(S, q, writes, gates, constants):
  S = _wide(_decay(gates, constants)) * S
  return _linear(S, q, writes, gates, constants)


def _mamba2(S, q, writes, gates, constants):
  (k, v), = writes
  dt = _softplus(gates['decay'] + constants['dt_bias'])[:, None]
  S = _add(_wide(_decay(gates, constants)) * S, k, dt * v)
  return S, _look(q, S) + constants['D'][:, None] * v


def _gla(S, q, writes, gates, constants):
  g = -_softplus(-(gates['decay'] + constants['bias'])) / 16
  return _linear(_wide(g) * S, q, writes, gates, constants)


def _hgrn2(S, q, writes, gates, constants):
  (k, v), = writes
  S = _sigmoid(k)[:, :, None] * S
  return _linear(S, q * _sigmoid(q), [(1 - _sigmoid(k), v)], gates, constants)


def _gated(S, q, writes, gates, constants, most=1.0):
  if 'A_log' in constants:
    S = _wide(_decay(gates, constants)) * S
  for i, (k, v) in enumerate(writes):
    k, beta = _unit(k), most * _sigmoid(gates['beta'][:, i])[:, None]
    S = _add(S, k, beta * (v - _look(k, S)))
  return S, _look(_unit(q) * K**-0.5, S)


def _gated_delta_2(S, q, writes, gates, constants):
  S = _wide(_decay(gates, constants)) * S
  for i, (k, v) in enumerate(writes):
    k = _unit(k)
    erase, write = (_sigmoid(gates[n][:, i]) for n in ('erase', 'write'))
    S = _add(S, k, write * v - _look(erase * k, S))
  return S, _look(_unit(q) * K**-0.5, S)


TOKEN = {
    'linear': _linear, 'retention': _retention, 'decay': _decayed,
    'mamba2': _mamba2, 'gla': _gla, 'hgrn2': _hgrn2, 'delta': _gated,
    'gated_delta': _gated, 'kda': _gated,
    'gated_delta_product': functools.partial(_gated, most=2.0),
    'gated_delta_2': _gated_delta_2,
}


def _writes(name):
  return 2 if name == 'gated_delta_product' else 1


def _inputs(name, lengths, seed=0, heads=H):
  """Differentiable inputs, and which rows are real; groups in order."""
  rng = np.random.default_rng(seed)
  rule, n = rules.RULES[name], _writes(name)
  chunks = [-(-length // CHUNK) for length in lengths]
  R = sum(chunks) * CHUNK
  real = np.concatenate([
      np.arange(c * CHUNK) < length for c, length in zip(chunks, lengths)])
  draw = lambda *shape: np.where(
      real.reshape(R, *[1] * (len(shape))), rng.normal(size=(R, *shape)), 0)
  gates = {}
  for gate_name, gate in rule.gates.items():
    own = (heads, n) if gate.every_write else (heads,)
    gates[gate_name] = draw(*own, *gate.size(K, V))
  keys = iter(jax.random.split(jax.random.key(seed), 8))
  inputs = {
      'q': draw(heads, K), 'k': draw(heads, n, K), 'v': draw(heads, n, V),
      'gates': gates,
      'constants': {
          name: constant.init(next(keys), constant.shape(heads, K, V))
          for name, constant in rule.constants.items()},
      'state': rng.normal(size=(len(lengths), heads, K, V)),
  }
  inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs)
  return inputs, real, np.repeat(np.arange(len(lengths)), chunks)


def _run(name, x, real, group_N, backend='auto'):
  return rules.run(
      rules.RULES[name], x['q'], x['k'], x['v'], x['gates'], x['constants'],
      jnp.asarray(real), group_N=jnp.asarray(group_N, jnp.int32),
      segment_R=jnp.asarray(real, jnp.int32), chunk=CHUNK,
      initial_state_GHKV=x['state'], backend=backend)


def _value_and_grads(name, x, real, group_N, backend):
  rng = np.random.default_rng(5)
  weight = jnp.asarray(
      rng.normal(size=(len(real), *x['v'].shape[1:2], V)) * real[:, None, None],
      jnp.float32)

  def loss(x):
    o, last = _run(name, x, real, group_N, backend)
    return (o * weight).sum() + jnp.sin(last).sum(), (o, last)

  return jax.jit(jax.grad(loss, has_aux=True))(x)


def test_every_rule_has_its_recurrence_here():
  assert TOKEN.keys() == rules.RULES.keys()


@every
def test_chunks_are_the_recurrence(name):
  """All lengths at once, each a group of its own with an initial state."""
  x, real, group_N = _inputs(name, LENGTHS)
  grads, (o, last) = _value_and_grads(name, x, real, group_N, 'xla')
  wide = jax.tree.map(lambda a: np.asarray(a, np.float64), x)
  group_R = np.repeat(group_N, CHUNK)
  for g in range(len(LENGTHS)):
    S, reads = wide['state'][g], []
    for r in np.flatnonzero((group_R == g) & real):
      writes = [(wide['k'][r, :, i], wide['v'][r, :, i])
                for i in range(_writes(name))]
      S, read = TOKEN[name](
          S, wide['q'][r], writes, {n: a[r] for n, a in wide['gates'].items()},
          wide['constants'])
      reads.append(read)
    contract.outputs_agree(o[(group_R == g) & real], np.stack(reads))
    contract.outputs_agree(last[g], S)
  want, _ = _value_and_grads(name, x, real, group_N, 'reference')
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      grads, want)


@every
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
  x['gates']['write'] = jnp.broadcast_to(beta, (*beta.shape[:3], V))
  other, other_last = _run('gated_delta_2', x, real, group_N)
  contract.outputs_agree(other, o)
  contract.outputs_agree(other_last, last)


def test_the_rule_of_the_documentation_works(monkeypatch):
  """As written there; against its recurrence, in chunks."""
  text = (DOCS / 'own_rule.md').read_text()
  (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
  assert len(code.splitlines()) < 40
  monkeypatch.setattr(rules, 'RULES', dict(rules.RULES))
  exec(code, dict(vars(rules)))
  x, real, group_N = _inputs('tied', (150,))
  o, last = _run('tied', x, real, group_N)
  f = _sigmoid(np.asarray(x['gates']['forget'], np.float64))
  S, (q, k, v) = np.asarray(x['state'][0], np.float64), (x[n] for n in 'qkv')
  for t in range(150):
    S = _add(f[t][:, :, None] * S, (1 - f[t]) * k[t, :, 0], v[t, :, 0])
    contract.outputs_agree(o[t], _look(q[t] * K**-0.5, S))
  contract.outputs_agree(last[0], S)


def test_unknown_rules_are_named():
  with pytest.raises(ValueError, match="rule='gated' must be one of decay"):
    rules.get('gated')
