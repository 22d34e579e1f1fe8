"""Random inputs of routers, and their assignments as arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import routing

EXPERTS = (3, 2)
E = sum(EXPERTS)


def random_inputs(seed, B=2, T=12, padding=0.2):
  """Logits, allowed experts of random modalities, and a random router state."""
  rng = np.random.default_rng(seed)
  logits_BTE = jnp.asarray(rng.normal(size=(B, T, E)), jnp.float32)
  modality_BT = rng.integers(0, len(EXPERTS), (B, T))
  modality_BT[rng.random((B, T)) < padding] = -1
  state_E = jnp.asarray(rng.uniform(0.3, 0.6, E), jnp.float32)
  return routing.RouterInputs(logits_BTE, allowed(modality_BT), state_E)


def allowed(modality_BT):
  modality_E = np.repeat(np.arange(len(EXPERTS)), EXPERTS)
  return jnp.asarray(np.asarray(modality_BT)[..., None] == modality_E)


def settings(**changes):
  return routing.RouterSettings(
      **{'top_k': 2, 'experts': EXPERTS, 'update_rate': 0.1} | changes)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _route(name, inputs, settings):
  if routing.get(name).needs_aux_logits:  # of the token alone, as they must be
    inputs = inputs._replace(aux_logits_BTE=jnp.sin(3 * inputs.logits_BTE))
  return routing.get(name).route(inputs, settings)


def route(name, inputs, **changes):
  """The assignment of a router with changes of its settings."""
  return _route(name, inputs, settings(**changes))


@jax.jit
def dense(assignment):
  """The assignment as a [B, T, E] array of weights."""
  shape = assignment.probs_BTE.shape
  group_R = assignment.group_R
  column_R = jnp.where(group_R < 0, shape[-1], group_R)
  weight_NE = jnp.zeros((shape[0] * shape[1], shape[-1]))
  weight_NE = weight_NE.at[assignment.token_R, column_R].add(
      assignment.weight_R, mode='drop')
  return weight_NE.reshape(shape)
