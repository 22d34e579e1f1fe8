"""Memories that take gradient steps on their own loss, by mini-batch.

The tokens of a document in a memory form mini-batches of b. All gradients of a
mini-batch are taken at the weights where it began, so a mini-batch is a few
matrix products. A row costs 6 K V (ttt_linear) or 8 K V (titans) operations per
head with its state and 4 b (K + V) within its mini-batch.

Mini-batches start at any row of a chunk. A window of b rows therefore holds the
end of one mini-batch, the beginning of the next, which needs the result of the
first, and documents that begin inside the window, whose state is zero. Two
steps compute it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax import pallas
from mom_jax.rules import context_parallel, initializers
from mom_jax.rules.rule import Constant, Gate, Rule

BATCH = 16  # b, tokens per mini-batch
EXACT = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class WindowMasks(NamedTuple):
  """Masks over a window of b rows, float32 0 or 1."""

  real_b: jax.Array  # not padding
  current_b: jax.Array  # in the mini-batch that was under way
  next_b: jax.Array  # in the mini-batch after it, in the same document
  causal_bb: jax.Array  # j <= i in the same document
  mini_batch_ended: jax.Array  # the next mini-batch began
  new_document: jax.Array  # the last row's document began in the window
  last_b: jax.Array  # the last real row


def _window_masks(real_b, begin_b, position_b) -> WindowMasks:
  document_b = jnp.cumsum(begin_b * real_b)
  continued_b = (document_b == 0) & (real_b > 0)
  starts_b = continued_b & (jnp.mod(position_b, BATCH) == 0)
  next_b = continued_b & (jnp.cumsum(starts_b) > 0)
  i = jnp.arange(len(real_b))
  causal_bb = (document_b[:, None] == document_b[None]) & (
      i[:, None] >= i[None]) & (real_b[None] > 0) & (real_b[:, None] > 0)
  last = jnp.max(jnp.where(real_b > 0, i, -1))
  as_float = lambda mask: mask.astype(jnp.float32)
  return WindowMasks(
      as_float(real_b), as_float(continued_b & ~next_b), as_float(next_b),
      as_float(causal_bb), as_float(starts_b.any()),
      as_float(document_b[last] > 0), as_float(i == last),
  )


def _fold(chunk_step, params, inputs, memory, state, state_shape, arrays):
  """Fold `chunk_step` over the chunks of every group."""
  chunk = memory.options['chunk']
  if state is None:
    heads = inputs.q_RHK.shape[1]
    state = jnp.zeros(
        (memory.options['num_groups'], heads, *state_shape), jnp.float32)
  begin_R = pallas.document_starts(memory.segment_R, memory.group_N)
  rows = [memory.real_R, begin_R, inputs.position_R]
  by_chunk = lambda x: x.reshape(-1, chunk, *x.shape[1:]).astype(jnp.float32)
  xs = jax.tree.map(by_chunk, (rows, arrays))
  fold = functools.partial(
      pallas.chunk_fold, chunk_step, params, xs, group_N=memory.group_N)
  if memory.continues_G is not None:
    state = context_parallel.chained(
        lambda state: fold(state)[1], state, memory.continues_G)
  o_NCHV, state = fold(state)
  o_RHV = o_NCHV.reshape(-1, *o_NCHV.shape[2:])
  return o_RHV.astype(inputs.v_RHV.dtype), state


def _chunk(window_step, params, state_HXY, x_C):
  """Run `window_step` over the windows of b rows of a chunk, in order."""
  b = min(BATCH, len(x_C[0][0]))
  split = lambda x: x.reshape(-1, b, *x.shape[1:])

  def step(state_HXY, x_b):
    (real_b, begin_b, position_b), arrays = x_b
    masks = _window_masks(real_b, begin_b, position_b)
    heads = [jnp.swapaxes(a, 0, 1) for a in arrays]  # [b, H, ...]: heads first
    state_HXY, o_HbV = window_step(
        params, state_HXY, masks, position_b, *heads)
    return state_HXY, jnp.swapaxes(o_HbV, 0, 1)

  state_HXY, o_WbHV = jax.lax.scan(
      step, state_HXY, jax.tree.map(split, x_C))
  return state_HXY, o_WbHV.reshape(-1, *o_WbHV.shape[2:])


def _t(x):
  return jnp.swapaxes(x, -1, -2)


# ttt_linear: f(x) = x + LN(x W + c), loss |f(k) - v|^2 / 2, its gradients taken
# where the mini-batch began:
#
#   (W_t, c_t) = (W_0, c_0) - tau_i sum_{s <= t} eta_s grad_s;  o_t = f_t(q_t)
#
# for the i-th token of a mini-batch, eta = sigmoid(x W_eta) / K and
# tau_i = max(1 / i + tau_offset_i, 0); at its end (W_b, c_b) becomes (W_0,
# c_0). Initial W ~ N(0, 0.02^2), initial c = 0, tau_offset and the scale and
# offset of LN are learned per head. K = V (TTT-Linear, arXiv 2407.04620,
# section 2 and its published code).


def _ttt_window(
    params, state_HXV, masks, position_b, q_HbK, k_HbK, v_HbV, eta_Hb1):
  scale_H1V, offset_H1V, initial_HXV, tau_offset_Hb = params
  K = q_HbK.shape[-1]
  with_one = lambda x: jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
  keys, queries = with_one(k_HbK), with_one(q_HbK)
  start_HXV, sum_HXV = state_HXV[:, : K + 1], state_HXV[:, K + 1 :]
  index_b = jnp.mod(position_b, BATCH)
  tau_offset_Hb1 = tau_offset_Hb[:, index_b.astype(int), None]
  tau_Hb1 = jnp.maximum(1 / (1 + index_b)[None, :, None] + tau_offset_Hb1, 0)

  def descent(weights_HXV):
    """-eta times the gradient in k W + c."""
    hat, inv_std = _centre(EXACT(keys, weights_HXV + initial_HXV))
    error = scale_H1V * (hat * scale_H1V + offset_H1V - (v_HbV - k_HbK))
    slope = inv_std * (error - error.mean(-1, keepdims=True)
                       - hat * (error * hat).mean(-1, keepdims=True))
    return -eta_Hb1 * slope

  as_rows = lambda mask_b: mask_b[None, :, None]
  current, later = as_rows(masks.current_b), as_rows(masks.next_b)
  y = jnp.where(
      current > 0, descent(start_HXV), descent(jnp.zeros_like(start_HXV)))
  current_sum_HXV = sum_HXV + EXACT(_t(keys), y * current)
  # The mini-batch under way ends with its b-th row.
  tau_H11 = jnp.maximum(1 / BATCH + tau_offset_Hb[:, -1:, None], 0)
  next_start_HXV = jnp.where(
      masks.mini_batch_ended > 0, start_HXV + tau_H11 * current_sum_HXV,
      start_HXV)
  y = jnp.where(later > 0, descent(next_start_HXV), y) * as_rows(masks.real_b)
  # Pairs of rows of the same mini-batch.
  pairs_bb = masks.causal_bb * (
      1 - masks.next_b[:, None] * masks.current_b[None])
  inside = EXACT(EXACT(queries, _t(keys)) * pairs_bb[None], y)
  base = (EXACT(queries, start_HXV) + tau_Hb1 * EXACT(queries, sum_HXV)
          ) * current + EXACT(queries, next_start_HXV) * later
  z = base + tau_Hb1 * inside + EXACT(queries, initial_HXV)
  o_HbV = q_HbK + _centre(z)[0] * scale_H1V + offset_H1V
  new = (masks.last_b @ pairs_bb)[None, :, None] * y
  carried = (1 - masks.mini_batch_ended) * (1 - masks.new_document)
  any_real = masks.last_b.sum()
  state = jnp.concatenate([
      next_start_HXV * (1 - masks.new_document),
      sum_HXV * carried + EXACT(_t(keys), new)], 1)
  return jnp.where(any_real > 0, state, state_HXV), o_HbV


def _centre(z):
  """(z - mean) / std over the last axis, and 1 / std."""
  z = z - z.mean(-1, keepdims=True)
  inv_std = jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-6)
  return z * inv_std, inv_std


_ttt_chunk = functools.partial(_chunk, _ttt_window)


def _ttt_linear(rule, inputs, memory, state):
  c = inputs.constants
  K, V = inputs.k_RHK.shape[-1], inputs.v_RHV.shape[-1]
  if K != V:
    raise ValueError(
        f'config.model.mixer.value_dim={V} must equal key_dim={K} under'
        " rule='ttt_linear', whose memory maps keys to values.")
  initial_HXV = jnp.concatenate([c['weight'], c['weight_bias'][:, None]], 1)
  params = (c['scale'][:, None], c['offset'][:, None], initial_HXV,
            c['tau_offset'])
  eta_RH1 = jax.nn.sigmoid(inputs.gates['eta'])[..., None] / K
  return _fold(
      _ttt_chunk, params, inputs, memory, state, rule.state_shape(K, V),
      [inputs.q_RHK, inputs.k_RHK, inputs.v_RHV, eta_RH1])


TTT_LINEAR = Rule(
    {'eta': Gate()},
    {'weight': Constant(('key', 'value'), initializers.normal(0.02)),
     'weight_bias': Constant('value', initializers.full(0.0)),
     'scale': Constant('value', initializers.full(1.0)),
     'offset': Constant('value', initializers.full(0.0)),
     'tau_offset': Constant(BATCH, initializers.full(0.0))},
    None, silu='', single_update=True,
    state_shape=lambda K, V: (2 * (K + 1), V), macs=lambda K, V: 3 * K * V,
    update=_ttt_linear,
)

# titans: a linear memory with momentum and forgetting, its loss |k M - v|^2:
#
#   Z_t = eta_t Z_{t-1} + theta_t k_t^T (v_t - k_t M_0);
#   M_t = (1 - alpha_t) M_{t-1} + Z_t;  o_t = q_t M_t
#
# M_0 where the mini-batch began; alpha, eta, theta = sigmoid(x W), theta over
# b so that a mini-batch steps along its mean gradient (the paper leaves the
# step size open); keys and queries go through SiLU and are l2-normalised
# (Titans, arXiv 2501.00663, eq. 8 to 14 and section 3.2).


def _titans_window(
    params, state_HXV, masks, position_b, q_HbK, k_HbK, v_HbV, theta_Hb1,
    momentum_Hb1, keep_Hb1):
  del params, position_b
  K = q_HbK.shape[-1]
  start_HKV, now_HKV, z_HKV = (
      state_HXV[:, :K], state_HXV[:, K : 2 * K], state_HXV[:, 2 * K :])
  continued_b = masks.current_b + masks.next_b
  as_rows = lambda mask_b: mask_b[None, :, None]

  def decays(log_Hb1):
    """Decay from row j to row i of a document, and from before the window."""
    i = jnp.arange(len(continued_b))
    steps = jnp.where((i[:, None] > i[None])[None], log_Hb1, 0)
    return masks.causal_bb[None] * jnp.exp(jnp.cumsum(steps, 1)), as_rows(
        continued_b) * jnp.exp(jnp.cumsum(log_Hb1, 1))

  keep_Hbb, keep_Hb1 = decays(keep_Hb1)
  momentum_Hbb, momentum_Hb1 = decays(momentum_Hb1)
  both_Hbb = EXACT(keep_Hbb, momentum_Hbb)
  both_Hb1 = EXACT(keep_Hbb, momentum_Hb1)

  def after(row_b, y):
    """M and Z after a row, zero if there is none."""
    pick = lambda x: EXACT(row_b[None, None], x)  # [H, 1, ...]
    add = lambda w_Hbb: EXACT(_t(k_HbK), _t(pick(w_Hbb)) * y)
    return (
        pick(keep_Hb1) * now_HKV + pick(both_Hb1) * z_HKV + add(both_Hbb),
        pick(momentum_Hb1) * z_HKV + add(momentum_Hbb))

  def descent(weights):
    """-theta times the gradient in M."""
    return theta_Hb1 * (v_HbV - EXACT(k_HbK, weights))

  y = jnp.where(
      as_rows(masks.current_b) > 0, descent(start_HKV),
      descent(jnp.zeros_like(start_HKV)))
  index_b = jnp.arange(1.0, 1 + len(continued_b))
  current_last = jnp.max(index_b * masks.current_b)
  current_last_b = (index_b == current_last) * masks.current_b
  ended_HKV = jnp.where(current_last > 0, after(current_last_b, y)[0], now_HKV)
  next_start_HKV = jnp.where(masks.mini_batch_ended > 0, ended_HKV, start_HKV)
  y = jnp.where(
      as_rows(masks.next_b) > 0, descent(next_start_HKV), y
  ) * as_rows(masks.real_b)
  o_HbV = (keep_Hb1 * EXACT(q_HbK, now_HKV) + both_Hb1 * EXACT(q_HbK, z_HKV)
           + EXACT(EXACT(q_HbK, _t(k_HbK)) * both_Hbb, y))
  now, z = after(masks.last_b, y)
  state = jnp.concatenate(
      [next_start_HKV * (1 - masks.new_document), now, z], 1)
  return jnp.where(masks.last_b.sum() > 0, state, state_HXV), o_HbV


_titans_chunk = functools.partial(_chunk, _titans_window)


def _titans(rule, inputs, memory, state):
  K, V = inputs.k_RHK.shape[-1], inputs.v_RHV.shape[-1]

  def gate(name, activation):
    return activation(inputs.gates[name])[..., None]

  return _fold(
      _titans_chunk, (), inputs, memory, state, rule.state_shape(K, V),
      [inputs.q_RHK, inputs.k_RHK, inputs.v_RHV,
       gate('theta', jax.nn.sigmoid) / BATCH, gate('eta', jax.nn.log_sigmoid),
       jax.nn.log_sigmoid(-inputs.gates['alpha'])[..., None]])


TITANS = Rule(
    {'alpha': Gate(), 'eta': Gate(), 'theta': Gate()}, {}, None,
    l2_normalised='qk', single_update=True, state_shape=lambda K, V: (3 * K, V),
    macs=lambda K, V: 4 * K * V, update=_titans,
)
