"""chunk_memory in chunk form, in plain XLA, on any device.

Per head and chunk, with Gamma_ij the decay from row j to row i (0 for j > i):

  A  = strict_lower(E K^T * Gamma),   T = (I + A)^-1,   E = diag(beta) K
  U  = T diag(beta) V,   W = T (decay to the row * E)
  Y  = U - W S                                        written values
  P  = Q K^T * Gamma                                  scores
  O  = scale (decay to the row * Q S + P Y)
  S' = chunk decay * S + (decay to the end * K)^T Y

In flash-linear-attention T is `A` (after `solve_tril`), U and W are `u` and
`w`, Y is `v_new`, S is `h` and g summed within a chunk is `g`.

A removal key replaces E (and V comes without beta). An exclusive output is the
output of the row before: queries shift up by a row, and what they give shifts
down again. Where value channels decay, the decay to the row scales O and that
to the end scales Y, and no Gamma can be split off: (Q K^T) Y is summed block by
block.

Everything but S is computed for all chunks at once; S runs through a loop in
which several groups advance side by side (`schedule.parallel_groups`). A decay
between two rows is a product of exponentials of sums over the rows in between,
never the exponential of a difference of sums: nothing cancels, overflows or
needs clamping, however strong the decay. The backward pass keeps the state
before every chunk, K V floats for C rows, and recomputes the rest.

Source: arXiv 2406.06484 (delta rule), 2412.06464 (with decay), 2510.26692
(decay per key channel).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import schedule

EXACT = jax.lax.Precision.HIGHEST
PARALLEL_GROUPS = 16  # groups that advance side by side
BLOCK = 8  # rows of the smallest blocks of a chunk


class ChunkTerms(NamedTuple):
  """The terms of a chunk that do not depend on its incoming state."""

  score_NHCC: jax.Array | None  # P, scaled
  query_NHCK: jax.Array  # decayed from the chunk's start, scaled
  key_NHCK: jax.Array  # decayed to the chunk's end
  chunk_decay_NHX1: jax.Array | None  # X is 1 or K; [N, H, 1, V] for values
  a_NHCC: jax.Array | None  # A of the delta rule
  value_NHCV: jax.Array  # V, times beta, or decayed to the end
  removal_NHCK: jax.Array | None  # E, decayed from the start
  value_decay_NHCV: jax.Array | None  # of value channels, from the start
  local_NHCV: jax.Array | None  # output from the same chunk, if values decay


def chunk_terms(
    q, k, v, log_decay, beta, removal_key, value_decay, *, scale, chunk,
    exclusive,
):
  q_NHCK, k_NHCK, v_NHCV, g, beta_NHC, e_NHCK, h_NHCV = (
      None if x is None else _chunked(x, chunk)
      for x in (q, k, v, log_decay, beta, removal_key, value_decay)
  )
  q_NHCK *= scale
  if beta is not None:
    e_NHCK = k_NHCK * beta_NHC[..., None]
    v_NHCV *= beta_NHC[..., None]
  from_start, to_end, chunk_decay = _edge_decays(g)
  mul = lambda x, decay: x if decay is None else x * decay
  rows = [_shift_up(q_NHCK) if exclusive else q_NHCK]
  if e_NHCK is not None:
    rows.append(e_NHCK)
  score_NHCC, *a_NHCC = _pairs(rows, k_NHCK, g)
  to_query = _decay_to_previous(from_start) if exclusive else from_start
  value_decay_NHCV = local_NHCV = None
  if h_NHCV is not None:
    local_NHCV = _local_outputs(score_NHCC, v_NHCV, h_NHCV)
    value_decay_NHCV, to_end_NHCV, chunk_decay = _edge_decays(h_NHCV)
    chunk_decay, v_NHCV = chunk_decay.swapaxes(-1, -2), v_NHCV * to_end_NHCV
    if exclusive:
      local_NHCV = _shift_down(local_NHCV)
      value_decay_NHCV = _decay_to_previous(value_decay_NHCV)
    score_NHCC = None
  elif exclusive:
    score_NHCC = _shift_down(score_NHCC)
  return ChunkTerms(
      score_NHCC, mul(q_NHCK, to_query), mul(k_NHCK, to_end), chunk_decay,
      jnp.tril(a_NHCC[0], -1) if a_NHCC else None, v_NHCV,
      None if e_NHCK is None else mul(e_NHCK, from_start), value_decay_NHCV,
      local_NHCV,
  )


def _shift_up(x_NHCX):
  """Move every row to the row before it; the last becomes 0."""
  return jnp.pad(x_NHCX[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))


def _shift_down(x_NHCX, first=0):
  return jnp.pad(x_NHCX[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)),
                 constant_values=first)


def _decay_to_previous(from_start):
  """Decay up to the row before each row, from decay up to each row."""
  return None if from_start is None else _shift_down(from_start, 1)


def _chunked(x_R, chunk):
  """[R, H, ...] to [N, H, C, ...] in float32."""
  x_NCH = x_R.reshape(-1, chunk, *x_R.shape[1:])
  return x_NCH.swapaxes(1, 2).astype(jnp.float32)


def _flat(x_NHC):
  """[N, H, C, ...] to [R, H, ...]."""
  x_NCH = x_NHC.swapaxes(1, 2)
  return x_NCH.reshape(-1, *x_NCH.shape[2:])


def _edge_decays(g):
  """Decay from the chunk's start to each row, from each row to its end, total.

  Shapes [N, H, C, X] twice and [N, H, X, 1], X = 1 or K.
  """
  if g is None:
    return None, None, None
  if g.ndim == 3:
    g = g[..., None]
  to_row = _to_row(g)
  end = to_row[:, :, -1, :, None]
  return jnp.exp(to_row), jnp.exp(_after_row(g)), jnp.exp(end)


def _to_row(g):
  """Sum over the rows up to each row; rows lie on the last axis but one."""
  return _row_sums(jnp.tri(g.shape[-2]), g)


def _after_row(g):
  """Sum over the rows after each row."""
  return _row_sums(1 - jnp.tri(g.shape[-2]), g)


def _row_sums(mask_CC, g):
  """Sum over the rows j that `mask_CC` marks with 1 for each row i.

  A product, because XLA takes a dozen operations for a cumulative sum.
  """
  return jnp.einsum('ij,...jx->...ix', mask_CC, g, precision=EXACT)


def _pair_decay(g_NHC):
  """Decay from row j to row i, exp(g_{j+1} + ... + g_i), 0 for j > i."""
  C = g_NHC.shape[-1]
  i, j, t = (jnp.arange(C).reshape(shape) for shape in (
      (1, C, 1), (1, 1, C), (C, 1, 1)))
  between_CCC = ((j < t) & (t <= i)).astype(jnp.float32)
  sum_NHCC = jnp.einsum(
      'nht,tij->nhij', g_NHC, between_CCC, precision=EXACT)
  return jnp.tril(jnp.exp(sum_NHCC))


def _pairs(rows, k_NHCK, g):
  """Compute x_i . k_j times the decay from j to i, 0 for j > i, for each x.
  """
  dot = functools.partial(
      jnp.einsum, '...ik,...jk->...ij', precision=EXACT
  )
  if g is None:
    return [jnp.tril(dot(x, k_NHCK)) for x in rows]
  if g.ndim == 3:
    gamma_NHCC = _pair_decay(g)
    return [dot(x, k_NHCK) * gamma_NHCC for x in rows]
  C = g.shape[2]
  c = min(BLOCK, C)
  split = lambda x: x.reshape(*x.shape[:2], C // c, c, x.shape[-1])
  decay, kb = _block_decay(split(g)), split(k_NHCK)
  out = []
  for x in rows:
    block = (split(x)[..., :, None, :] * kb[..., None, :, :] * decay).sum(-1)
    out.append(_merge(block, g, x, k_NHCK))
  return out


def _local_outputs(score_NHCC, v_NHCV, h_NHCV):
  """sum_j score_ij exp(h_{j+1} + ... + h_i) v_j, in each value channel."""
  N, H, C, V = v_NHCV.shape
  c = min(BLOCK, C)
  split = lambda x: x.reshape(N, H, C // c, c, V)
  block = jnp.stack([
      score_NHCC[..., n : n + c, n : n + c] for n in range(0, C, c)
  ], 2)
  output = jnp.einsum(
      '...ij,...ijv,...jv->...iv', block, _block_decay(split(h_NHCV)),
      split(v_NHCV), precision=EXACT).reshape(N, H, C, V)
  while c < C:
    (first_h, second_h), (first_v, _) = _halves(h_NHCV, c), _halves(v_NHCV, c)
    below = jnp.stack([
        score_NHCC[..., n + c : n + 2 * c, n : n + c]
        for n in range(0, C, 2 * c)
    ], 2)
    more = jnp.exp(_to_row(second_h)) * _exact(
        below, first_v * jnp.exp(_after_row(first_h)))
    output += jnp.stack([jnp.zeros_like(more), more], 3).reshape(N, H, C, V)
    c *= 2
  return output


def _block_decay(g):
  """Decay per channel from row j to row i of a block, [..., i, j, X]."""
  c = g.shape[-2]
  i, j = jnp.arange(c)[:, None], jnp.arange(c)[None]
  between = jnp.cumsum(
      jnp.where((i > j)[..., None], g[..., :, None, :], 0), -3
  )
  return jnp.where((i >= j)[..., None], jnp.exp(between), 0)


def _merge(block, g, row_NHCK, col_NHCK):
  """Merge lower-triangular diagonal blocks into one [N, H, C, C] matrix.

  Two neighbours a, b become [[a, 0], [corner, b]], where corner holds the
  products of b's rows and a's columns, each decayed to the end of a.
  """
  C, h = g.shape[2], block.shape[-1]
  while h < C:
    first, second = _halves(g, h)
    row = _halves(row_NHCK, h)[1] * jnp.exp(_to_row(second))
    col = _halves(col_NHCK, h)[0] * jnp.exp(_after_row(first))
    corner = _exact(row, col.swapaxes(-1, -2))
    block = _join(block[:, :, 0::2], corner, block[:, :, 1::2])
    h *= 2
  return block[:, :, 0]


def _halves(x_NHCX, h):
  """Even and odd runs of h rows, [N, H, C / 2h, h, X] each."""
  N, H, C, X = x_NHCX.shape
  x = x_NHCX.reshape(N, H, C // (2 * h), 2, h, X)
  return x[:, :, :, 0], x[:, :, :, 1]


def _inverse(a_NHCC):
  """(I + A)^-1 for strictly lower A, exact however close keys are.

  Forward substitution inside blocks of BLOCK rows, then neighbours merge:
  [[P, 0], [A, Q]]^-1 = [[P^-1, 0], [-Q^-1 A P^-1, Q^-1]]. Doubling powers of A
  over the whole chunk would be shorter, but cancels badly for equal keys.
  """
  C = a_NHCC.shape[-1]
  c = min(BLOCK, C)
  block = jnp.stack([
      a_NHCC[..., n : n + c, n : n + c] for n in range(0, C, c)
  ], 2)

  def substitute(i, inverse):
    row = jax.lax.dynamic_index_in_dim(block, i, 3, keepdims=False)
    unit = jax.nn.one_hot(jnp.full(row.shape[:-1], i), c)
    row = unit - (row[..., None] * inverse).sum(-2)
    return inverse.at[..., i, :].set(row)

  # A loop, because unrolled XLA would recompute every row in all later ones.
  inverse = jax.lax.fori_loop(0, c, substitute, jnp.zeros_like(block))
  while c < C:
    first, second = inverse[:, :, 0::2], inverse[:, :, 1::2]
    below = jnp.stack([
        a_NHCC[..., n + c : n + 2 * c, n : n + c] for n in range(0, C, 2 * c)
    ], 2)
    corner = -_exact(second, _exact(below, first))
    inverse = _join(first, corner, second)
    c *= 2
  return inverse[:, :, 0]


def _exact(a, b):
  return jnp.matmul(a, b, precision=EXACT)


def _join(a, corner, b):
  """[[a, 0], [corner, b]]."""
  return jnp.concatenate([
      jnp.concatenate([a, jnp.zeros_like(a)], -1),
      jnp.concatenate([corner, b], -1),
  ], -2)


def _solve(terms):
  """T, U and W of the delta rule."""
  inverse_NHCC = _inverse(terms.a_NHCC)
  u_NHCV = _exact(inverse_NHCC, terms.value_NHCV)
  return inverse_NHCC, u_NHCV, _exact(inverse_NHCC, terms.removal_NHCK)


def _queues(group_N, state_GHKV):
  return schedule.parallel_groups(
      group_N, min(PARALLEL_GROUPS, len(group_N), len(state_GHKV)))


def _fwd(*operands, keep, **static):
  *rows, state_GHKV, group_N = operands
  terms = chunk_terms(*rows, **static)
  u, w = terms.value_NHCV, None
  if terms.a_NHCC is not None:
    _, u, w = _solve(terms)
  before_NHKV, y_NHCV, state_GHKV = _forward_scan(
      _queues(group_N, state_GHKV), group_N, state_GHKV, u, w, terms)
  o_NHCV = terms.query_NHCK @ before_NHKV
  if terms.local_NHCV is None:
    o_NHCV += terms.score_NHCC @ y_NHCV
  else:
    o_NHCV = o_NHCV * terms.value_decay_NHCV + terms.local_NHCV
  o_RHV = _flat(_mask_unused(o_NHCV, group_N)).astype(rows[2].dtype)
  return (o_RHV, state_GHKV), before_NHKV if keep else None


def _mask_unused(x_N, group_N):
  return jnp.where((group_N >= 0).reshape(-1, *[1] * (x_N.ndim - 1)), x_N, 0)


def _wide(mask_Q):
  return mask_Q[:, None, None, None]


def _forward_scan(queues, group_N, state_GHKV, u_NHCV, w_NHCK, terms):
  """Run the states through the chunks.

  Returns:
    State before each chunk, Y of each chunk, last states.
  """
  N, H, _, V = u_NHCV.shape
  key_NHCK, chunk_decay_NHX1 = terms.key_NHCK, terms.chunk_decay_NHX1
  G, K, Q = len(state_GHKV), key_NHCK.shape[-1], len(queues.start_Q)

  def body(j, carry):
    s_QHKV, before_NHKV, y_NHCV, final_GHKV = carry
    at = schedule.queue_step(queues, group_N, j)
    s_QHKV = jnp.where(_wide(at.first_Q), state_GHKV[at.group_Q], s_QHKV)
    before_NHKV = before_NHKV.at[at.write_Q].set(s_QHKV, mode='drop')
    y_QHCV = u_NHCV[at.chunk_Q]
    if w_NHCK is not None:
      y_QHCV -= w_NHCK[at.chunk_Q] @ s_QHKV
      y_NHCV = y_NHCV.at[at.write_Q].set(y_QHCV, mode='drop')
    if chunk_decay_NHX1 is not None:
      s_QHKV = s_QHKV * chunk_decay_NHX1[at.chunk_Q]
    s_QHKV += key_NHCK[at.chunk_Q].swapaxes(-1, -2) @ y_QHCV
    done_Q = jnp.where(at.valid_Q & at.last_Q, at.group_Q, G)
    final_GHKV = final_GHKV.at[done_Q].set(s_QHKV, mode='drop')
    return s_QHKV, before_NHKV, y_NHCV, final_GHKV

  zeros = functools.partial(common.zeros, dtype=jnp.float32, like=state_GHKV)
  carry = (zeros((Q, H, K, V)), zeros((N, H, K, V)), u_NHCV, state_GHKV)
  _, before, y, final = jax.lax.fori_loop(0, queues.steps, body, carry)
  return before, y, final


def _bwd(*args, chunk, **static):
  *rows, _, group_N, before_NHKV, do_RHV, dstate_GHKV = args
  run = functools.partial(chunk_terms, chunk=chunk, **static)
  terms, pull = jax.vjp(run, *rows)
  do_NHCV = _mask_unused(_chunked(do_RHV, chunk), group_N)
  t = lambda x: x.swapaxes(-1, -2)
  w_NHCK = dvalue_decay = dlocal = None
  y_NHCV = terms.value_NHCV
  if terms.a_NHCC is not None:
    inverse_NHCC, u_NHCV, w_NHCK = _solve(terms)
    y_NHCV = u_NHCV - w_NHCK @ before_NHKV
  if terms.local_NHCV is None:
    dy_NHCV, dscore = t(terms.score_NHCC) @ do_NHCV, do_NHCV @ t(y_NHCV)
  else:
    dy_NHCV, dscore, dlocal = jnp.zeros_like(do_NHCV), None, do_NHCV
    dvalue_decay = do_NHCV * (terms.query_NHCK @ before_NHKV)
    do_NHCV = do_NHCV * terms.value_decay_NHCV
  dbefore_NHKV = t(terms.query_NHCK) @ do_NHCV
  dafter_NHKV, dy_NHCV, dstate_GHKV = _backward_scan(
      _queues(group_N, dstate_GHKV), group_N, dstate_GHKV, dy_NHCV,
      dbefore_NHKV, w_NHCK, terms)
  dchunk_decay = da = dremoval = None
  if terms.chunk_decay_NHX1 is not None:
    shape = terms.chunk_decay_NHX1.shape
    axes = [axis for axis in (-1, -2) if shape[axis] == 1]
    dchunk_decay = (dafter_NHKV * before_NHKV).sum(axes, keepdims=True)
  dvalue = dy_NHCV
  if terms.a_NHCC is not None:
    dw_NHCK = -dy_NHCV @ t(before_NHKV)
    dvalue = _exact(t(inverse_NHCC), dy_NHCV)
    dremoval = _exact(t(inverse_NHCC), dw_NHCK)
    da = -jnp.tril(dvalue @ t(u_NHCV) + dremoval @ t(w_NHCK), -1)
  grads = pull(ChunkTerms(
      dscore, do_NHCV @ t(before_NHKV), y_NHCV @ t(dafter_NHKV), dchunk_decay,
      da, dvalue, dremoval, dvalue_decay, dlocal,
  ))
  return *grads, dstate_GHKV


def _backward_scan(
    queues, group_N, dstate_GHKV, dy_NHCV, dbefore_NHKV, w_NHCK, terms):
  """Run the states' cotangents back through the chunks.

  Returns:
    Cotangent of the state after each chunk, of Y, of the initial states.
  """
  N, H, K, V = dbefore_NHKV.shape
  key_NHCK, chunk_decay_NHX1 = terms.key_NHCK, terms.chunk_decay_NHX1
  G, Q = len(dstate_GHKV), len(queues.start_Q)

  def body(j, carry):
    ds_QHKV, dafter_NHKV, dy_NHCV, dinitial_GHKV = carry
    at = schedule.queue_step(queues, group_N, queues.steps - 1 - j)
    ds_QHKV = jnp.where(_wide(at.last_Q), dstate_GHKV[at.group_Q], ds_QHKV)
    dafter_NHKV = dafter_NHKV.at[at.write_Q].set(ds_QHKV, mode='drop')
    dy_QHCV = dy_NHCV[at.chunk_Q] + key_NHCK[at.chunk_Q] @ ds_QHKV
    dy_NHCV = dy_NHCV.at[at.write_Q].set(dy_QHCV, mode='drop')
    if chunk_decay_NHX1 is not None:
      ds_QHKV = ds_QHKV * chunk_decay_NHX1[at.chunk_Q]
    ds_QHKV += dbefore_NHKV[at.chunk_Q]
    if w_NHCK is not None:
      ds_QHKV -= w_NHCK[at.chunk_Q].swapaxes(-1, -2) @ dy_QHCV
    done_Q = jnp.where(at.valid_Q & at.first_Q, at.group_Q, G)
    dinitial_GHKV = dinitial_GHKV.at[done_Q].set(ds_QHKV, mode='drop')
    return ds_QHKV, dafter_NHKV, dy_NHCV, dinitial_GHKV

  zeros = functools.partial(common.zeros, dtype=jnp.float32, like=dbefore_NHKV)
  carry = (zeros((Q, H, K, V)), zeros((N, H, K, V)), dy_NHCV, dstate_GHKV)
  _, dafter, dy, dinitial = jax.lax.fori_loop(0, queues.steps, body, carry)
  return dafter, dy, dinitial


BACKEND = common.Backend('xla', common.anywhere, _fwd, _bwd)
