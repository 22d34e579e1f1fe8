"""What several rules are made of: decays, unit keys, first values."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import rule


def silu(*arrays: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(map(jax.nn.silu, arrays))


def full(value: float):
  """First values that are all the same."""
  return lambda key, shape, depth: jnp.full(shape, value, jnp.float32)


def normal(deviation: float):
  """First values drawn around 0."""
  return lambda key, shape, depth: deviation * jax.random.normal(key, shape)


def a_log(low: float):
  """log A with A ~ U(low, 16)."""
  return lambda key, shape, depth: jnp.log(
      jax.random.uniform(key, shape, minval=low, maxval=16))


def dt_bias(key, shape, depth):
  """Inverse softplus of dt, log-uniform in [1e-3, 0.1]."""
  del depth
  low, high = jnp.log(1e-3), jnp.log(0.1)
  dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))


def log_decay(gates: rule.Gates, constants: rule.Constants) -> jax.Array:
  """-exp(A_log) softplus(x W + dt_bias); per head, or per key channel."""
  dt = jax.nn.softplus(gates['decay'] + constants['dt_bias'][None])
  a_H = jnp.exp(constants['A_log'])
  return -a_H.reshape(1, -1, *[1] * (dt.ndim - 2)) * dt


HEAD_DECAY = {
    'A_log': rule.Constant('head', a_log(1e-4)),
    'dt_bias': rule.Constant('head', dt_bias),
}
KEY_DECAY = {
    'A_log': rule.Constant('head', a_log(1.0)),
    'dt_bias': rule.Constant('key', dt_bias),
}
