"""chunk_memory token by token in float32: the definition."""

import jax
import jax.numpy as jnp

from mom_jax.pallas import common


def chunk_memory_ref(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N, *,
    scale, chunk, exclusive,
):
  """Visit every row in turn; arguments are those of `api.chunk_memory`.

    S' = exp(g_t) S              g: log_decay, or by column value_decay
    u  = beta_t (v_t - k_t S')   v_t if beta is None; with e, the removal_key,
                                 v_t - e_t S'
    S  = S' + k_t^T u
    o_t = scale q_t S            the S before S' if exclusive

  `api.py` has set the decay so that the state restarts where a new document
  begins inside a group.
  """
  exact = jax.lax.Precision.HIGHEST
  group_R = jnp.repeat(group_N, chunk)

  def look_up(x_HK, s_HKV):
    return jnp.einsum('hk,hkv->hv', x_HK, s_HKV, precision=exact)

  def step(state_GHKV, row):
    q_HK, k_HK, v_HV, g, beta_H, e_HK, h_HV, group = row
    before_HKV = s_HKV = state_GHKV[group]
    if g is not None:
      s_HKV *= jnp.exp(g.reshape(*g.shape, *[1] * (3 - g.ndim)))
    if h_HV is not None:
      s_HKV *= jnp.exp(h_HV[:, None, :])
    u_HV = v_HV
    if beta_H is not None:
      u_HV = beta_H[:, None] * (v_HV - look_up(k_HK, s_HKV))
    if e_HK is not None:
      u_HV = v_HV - look_up(e_HK, s_HKV)
    s_HKV += k_HK[:, :, None] * u_HV[:, None, :]
    o_HV = scale * look_up(q_HK, before_HKV if exclusive else s_HKV)
    used = group >= 0
    state_GHKV = state_GHKV.at[jnp.where(used, group, len(state_GHKV))].set(
        s_HKV, mode='drop'
    )
    return state_GHKV, jnp.where(used, o_HV, 0)

  rows = [x if x is None else x.astype(jnp.float32)
          for x in (q, k, v, log_decay, beta, removal_key, value_decay)]
  state, o_RHV = jax.lax.scan(step, state, (*rows, group_R))
  return o_RHV.astype(v.dtype), state


def _fwd(*operands, keep, **static):
  del keep
  return chunk_memory_ref(*operands, **static), None


def _bwd(*args, **static):
  *operands, group_N, _, do_RHV, dstate_GHKV = args
  run = lambda *xs: chunk_memory_ref(*xs, group_N, **static)
  return jax.vjp(run, *operands)[1]((do_RHV, dstate_GHKV))


BACKEND = common.Backend('reference', common.anywhere, _fwd, _bwd)
