"""Initial values of constants: (key, shape, layer_fraction) -> array."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def full(value: float):
  """Constant values."""
  return lambda key, shape, layer_fraction: jnp.full(
      shape, value, jnp.float32)


def normal(deviation: float):
  """Normally distributed around 0."""
  return lambda key, shape, layer_fraction: deviation * jax.random.normal(
      key, shape)


def a_log(low: float):
  """log A with A ~ U(low, 16)."""
  return lambda key, shape, layer_fraction: jnp.log(
      jax.random.uniform(key, shape, minval=low, maxval=16))


def dt_bias(key, shape, layer_fraction):
  """Inverse softplus of dt, log-uniform in [1e-3, 0.1]."""
  del layer_fraction
  low, high = jnp.log(1e-3), jnp.log(0.1)
  dt = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
  dt = jnp.maximum(dt, 1e-4)
  return dt + jnp.log(-jnp.expm1(-dt))
