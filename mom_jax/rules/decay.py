"""The decay of Mamba-2, shared by several rules."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import initializers, rule


def log_decay(gates: rule.Gates, constants: rule.Constants) -> jax.Array:
  """-exp(A_log) softplus(x W + dt_bias), per head or per key channel."""
  dt = jax.nn.softplus(gates['decay'] + constants['dt_bias'][None])
  a_H = jnp.exp(constants['A_log'])
  return -a_H.reshape(1, -1, *[1] * (dt.ndim - 2)) * dt


# Constants of the decay: one per head, or one per key channel.
PER_HEAD = {
    'A_log': rule.Constant('head', initializers.a_log(1e-4)),
    'dt_bias': rule.Constant('head', initializers.dt_bias),
}
PER_KEY = {
    'A_log': rule.Constant('head', initializers.a_log(1.0)),
    'dt_bias': rule.Constant('key', initializers.dt_bias),
}
