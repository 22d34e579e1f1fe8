"""Memories that take gradient steps on their own loss, by mini-batch.

Tokens of a memory come in mini-batches of b, counted from their document's
start; each takes its gradient where the mini-batch began, so that a mini-batch
is a few matrix products. A row costs 6 K V (ttt_linear) or 8 K V (titans)
operations a head with its state and 4 b (K + V) within its mini-batch.

Mini-batches lie anywhere between the rows of a chunk. In a window of b rows
there are the end of a mini-batch, the beginning of the next, which needs that
end, and documents that begin in the window and so know their state: two steps.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax import pallas
from mom_jax.pallas.chunk_memory import schedule
from mom_jax.rules import context_parallel
from mom_jax.rules import gates as parts
from mom_jax.rules.rule import Constant, Gate, Rule

BATCH = 16  # tokens of a mini-batch, b
EXACT = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Window(NamedTuple):
  """Masks of b rows, float32 0 or 1."""

  real_b: jax.Array
  old_b: jax.Array  # of the mini-batch that was under way
  next_b: jax.Array  # of the one after it, in the same document
  same_bb: jax.Array  # j is not after i, in i's document
  ended: jax.Array  # another mini-batch began
  other: jax.Array  # the last row's document began in the window
  last_b: jax.Array  # the last real row


def _window(real_b, begin_b, place_b) -> Window:
  document_b = jnp.cumsum(begin_b * real_b)
  going_b = (document_b == 0) & (real_b > 0)
  starts_b = going_b & (jnp.mod(place_b, BATCH) == 0)
  next_b = going_b & (jnp.cumsum(starts_b) > 0)
  i = jnp.arange(len(real_b))
  both_bb = (document_b[:, None] == document_b[None]) & (
      i[:, None] >= i[None]) & (real_b[None] > 0) & (real_b[:, None] > 0)
  last = jnp.max(jnp.where(real_b > 0, i, -1))
  at_b = lambda b: b.astype(jnp.float32)
  return Window(
      at_b(real_b), at_b(going_b & ~next_b), at_b(next_b), at_b(both_bb),
      starts_b.any().astype(jnp.float32),
      (document_b[last] > 0).astype(jnp.float32), at_b(i == last),
  )


def _fold(window, params, rows, memory, state, shape, arrays):
  """Runs `window` over windows of b rows of every chunk."""
  chunk = memory.how['chunk']
  if state is None:
    heads = rows.q_RHK.shape[1]
    state = jnp.zeros((memory.how['num_groups'], heads, *shape), jnp.float32)
  begin_R = schedule.begins(memory.segment_R, memory.group_N)
  masks = [memory.real_R, begin_R, rows.place_R]
  chunks = lambda x: x.reshape(-1, chunk, *x.shape[1:]).astype(jnp.float32)
  xs = jax.tree.map(chunks, (masks, arrays))
  fold = functools.partial(
      pallas.chunk_fold, window, params, xs, group_N=memory.group_N)
  if memory.continues_G is not None:
    state = context_parallel.chained(
        lambda state: fold(state)[1], state, memory.continues_G)
  o_NCHV, state = fold(state)
  o_RHV = o_NCHV.reshape(-1, *o_NCHV.shape[2:])
  return o_RHV.astype(rows.v_RHV.dtype), state


def _chunk(window, params, state_HXY, x_C):
  """A chunk as windows of b rows, one after another."""
  b = min(BATCH, len(x_C[0][0]))
  split = lambda x: x.reshape(-1, b, *x.shape[1:])

  def step(state_HXY, x_b):
    masks, arrays = x_b
    heads = [jnp.swapaxes(a, 0, 1) for a in arrays]  # [b, H, ...]: heads first
    state_HXY, o_HbV = window(params, state_HXY, _window(*masks), masks[2],
                              *heads)
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
# tau_i = max(1 / i + learnt_i, 0); at its end (W_b, c_b) becomes (W_0, c_0).
# The first W ~ N(0, 0.02^2), the first c = 0 and the scale and offset of LN are
# learnt for each head. K = V (TTT-Linear, arXiv 2407.04620, section 2 and its
# published code).


def _ttt_window(params, state_HXV, m, place_b, q_HbK, k_HbK, v_HbV, eta_Hb1):
  scale_H1V, offset_H1V, first_HXV, share_Hb = params
  K = q_HbK.shape[-1]
  with_one = lambda x: jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1)
  keys, queries = with_one(k_HbK), with_one(q_HbK)
  start_HXV, sum_HXV = state_HXV[:, : K + 1], state_HXV[:, K + 1 :]
  index_b = jnp.mod(place_b, BATCH)
  share_Hb1 = share_Hb[:, index_b.astype(int), None]
  tau_Hb1 = jnp.maximum(1 / (1 + index_b)[None, :, None] + share_Hb1, 0)

  def write(weights_HXV):
    """-eta times the gradient in k W + c."""
    hat, rate = _centre(EXACT(keys, weights_HXV + first_HXV))
    error = scale_H1V * (hat * scale_H1V + offset_H1V - (v_HbV - k_HbK))
    slope = rate * (error - error.mean(-1, keepdims=True)
                    - hat * (error * hat).mean(-1, keepdims=True))
    return -eta_Hb1 * slope

  mine = lambda mask_b: mask_b[None, :, None]
  old, later = mine(m.old_b), mine(m.next_b)
  y = jnp.where(old > 0, write(start_HXV), write(jnp.zeros_like(start_HXV)))
  old_sum_HXV = sum_HXV + EXACT(_t(keys), y * old)
  # The mini-batch under way ends with its b-th row.
  tau_H11 = jnp.maximum(1 / BATCH + share_Hb[:, -1:, None], 0)
  next_start_HXV = jnp.where(
      m.ended > 0, start_HXV + tau_H11 * old_sum_HXV, start_HXV)
  y = jnp.where(later > 0, write(next_start_HXV), y) * mine(m.real_b)
  apart_bb = m.same_bb * (1 - m.next_b[:, None] * m.old_b[None])
  inside = EXACT(EXACT(queries, _t(keys)) * apart_bb[None], y)
  base = (EXACT(queries, start_HXV) + tau_Hb1 * EXACT(queries, sum_HXV)
          ) * old + EXACT(queries, next_start_HXV) * later
  z = base + tau_Hb1 * inside + EXACT(queries, first_HXV)
  o_HbV = q_HbK + _centre(z)[0] * scale_H1V + offset_H1V
  new = (m.last_b @ apart_bb)[None, :, None] * y
  carried = (1 - m.ended) * (1 - m.other)
  some = m.last_b.sum()
  state = jnp.concatenate([
      next_start_HXV * (1 - m.other),
      sum_HXV * carried + EXACT(_t(keys), new)], 1)
  return jnp.where(some > 0, state, state_HXV), o_HbV


def _centre(z):
  """(z - mean) / deviation over the last axis, and 1 / deviation."""
  z = z - z.mean(-1, keepdims=True)
  rate = jax.lax.rsqrt(jnp.square(z).mean(-1, keepdims=True) + 1e-6)
  return z * rate, rate


_ttt_chunk = functools.partial(_chunk, _ttt_window)


def _ttt_linear(rule, rows, memory, state):
  c, (K, V) = rows.constants, (rows.k_RHK.shape[-1], rows.v_RHV.shape[-1])
  if K != V:
    raise ValueError(
        f'config.model.mixer.value_dim={V} must equal key_dim={K} under'
        " rule='ttt_linear', whose memory maps keys to values.")
  first_HXV = jnp.concatenate([c['weight'], c['weight_bias'][:, None]], 1)
  params = (c['scale'][:, None], c['offset'][:, None], first_HXV,
            c['share'])
  eta_RH1 = jax.nn.sigmoid(rows.gates['eta'])[..., None] / K
  return _fold(
      _ttt_chunk, params, rows, memory, state, rule.state(K, V),
      [rows.q_RHK, rows.k_RHK, rows.v_RHV, eta_RH1])


TTT_LINEAR = Rule(
    {'eta': Gate()},
    {'weight': Constant(('key', 'value'), parts.normal(0.02)),
     'weight_bias': Constant('value', parts.full(0.0)),
     'scale': Constant('value', parts.full(1.0)),
     'offset': Constant('value', parts.full(0.0)),
     'share': Constant(BATCH, parts.full(0.0))},
    None, silu='', one_write=True, state=lambda K, V: (2 * (K + 1), V),
    macs=lambda K, V: 3 * K * V, update=_ttt_linear,
)

# titans: a linear memory with momentum and forgetting, its loss |k M - v|^2:
#
#   Z_t = eta_t Z_{t-1} + theta_t k_t^T (v_t - k_t M_0);
#   M_t = (1 - alpha_t) M_{t-1} + Z_t;  o_t = q_t M_t
#
# M_0 where the mini-batch began; alpha, eta, theta = sigmoid(x W), theta over
# b so that a mini-batch steps along its mean gradient (the paper leaves
# the size of steps open); keys and queries of unit length, SiLU before them
# (Titans, arXiv 2501.00663, eq. 8 to 14 and section 3.2).


def _titans_window(params, state_HXV, m, place_b, q_HbK, k_HbK, v_HbV,
                   theta_Hb1, momentum_Hb1, keep_Hb1):
  del params, place_b
  K = q_HbK.shape[-1]
  start_HKV, now_HKV, z_HKV = (
      state_HXV[:, :K], state_HXV[:, K : 2 * K], state_HXV[:, 2 * K :])
  going_b = m.old_b + m.next_b
  mine = lambda mask_b: mask_b[None, :, None]

  def decays(log_Hb1):
    """Decay from row j to row i of a document, and from before the window."""
    i = jnp.arange(len(going_b))
    steps = jnp.where((i[:, None] > i[None])[None], log_Hb1, 0)
    return m.same_bb[None] * jnp.exp(jnp.cumsum(steps, 1)), mine(
        going_b) * jnp.exp(jnp.cumsum(log_Hb1, 1))

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

  write = lambda weights: theta_Hb1 * (v_HbV - EXACT(k_HbK, weights))
  y = jnp.where(
      mine(m.old_b) > 0, write(start_HKV), write(jnp.zeros_like(start_HKV)))
  index_b = jnp.arange(1.0, 1 + len(going_b))
  old_last = jnp.max(index_b * m.old_b)
  old_row_b = (index_b == old_last) * m.old_b
  ended_HKV = jnp.where(old_last > 0, after(old_row_b, y)[0], now_HKV)
  next_start_HKV = jnp.where(m.ended > 0, ended_HKV, start_HKV)
  y = jnp.where(mine(m.next_b) > 0, write(next_start_HKV), y) * mine(m.real_b)
  o_HbV = (keep_Hb1 * EXACT(q_HbK, now_HKV) + both_Hb1 * EXACT(q_HbK, z_HKV)
           + EXACT(EXACT(q_HbK, _t(k_HbK)) * both_Hbb, y))
  now, z = after(m.last_b, y)
  state = jnp.concatenate([next_start_HKV * (1 - m.other), now, z], 1)
  return jnp.where(m.last_b.sum() > 0, state, state_HXV), o_HbV


_titans_chunk = functools.partial(_chunk, _titans_window)


def _titans(rule, rows, memory, state):
  K, V = rows.k_RHK.shape[-1], rows.v_RHV.shape[-1]
  gate = lambda name, function: function(rows.gates[name])[..., None]
  return _fold(
      _titans_chunk, (), rows, memory, state, rule.state(K, V),
      [rows.q_RHK, rows.k_RHK, rows.v_RHV,
       gate('theta', jax.nn.sigmoid) / BATCH, gate('eta', jax.nn.log_sigmoid),
       jax.nn.log_sigmoid(-rows.gates['alpha'])[..., None]])


TITANS = Rule(
    {'alpha': Gate(), 'eta': Gate(), 'theta': Gate()}, {}, None, unit='qk',
    one_write=True, state=lambda K, V: (3 * K, V), macs=lambda K, V: 4 * K * V,
    update=_titans,
)
