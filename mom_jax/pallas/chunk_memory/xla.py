"""chunk_memory in chunk form, in plain XLA, on any device.

Per head and chunk, with Gamma_ij the decay from row j to row i (0 for j > i):

  A  = strict_lower(E K^T * Gamma),   T = (I + A)^-1,   E = diag(beta) K
  U  = T diag(beta) V,   W = T (decay to the row * E)
  Y  = U - W S                                        what the rows write
  O  = scale (decay to the row * Q S + (Q K^T * Gamma) Y)
  S' = decay of the chunk * S + (decay to the end * K)^T Y

Erasing under keys of its own only changes E (and V comes without beta). A read
before the write is the read of the row before: Q moves up a row, and what it
gives moves down again. Where value channels decay, the decay to the row scales
O and that to the end scales Y, and no Gamma can be split off: (Q K^T) Y is
summed block by block.

Everything but S is computed for all chunks at once; S runs through a loop in
which several groups advance side by side (`schedule.lanes`). A decay between
two rows is a product of exponentials of sums over the rows in between, never
the exponential of a difference of sums: nothing cancels, overflows or needs
clamping, however strong the decay. The backward pass keeps the state before
every chunk, K V floats for C rows, and recomputes the rest.

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
LANES = 16  # groups that advance side by side
BLOCK = 8  # rows of the smallest blocks of a chunk


class Parts(NamedTuple):
  """What a chunk computes without its incoming state."""

  score_NHCC: jax.Array | None  # Q K^T * Gamma, scaled
  query_NHCK: jax.Array  # decayed from the chunk's start, scaled
  key_NHCK: jax.Array  # decayed to the chunk's end
  end_NHX1: jax.Array | None  # decay of the whole chunk, X is 1 or K, or 1V
  a_NHCC: jax.Array | None  # A of the delta rule
  write_NHCV: jax.Array  # V, times beta, or decayed to the end
  erase_NHCK: jax.Array | None  # E, decayed from the start
  read_NHCV: jax.Array | None  # decay of value channels from the start
  own_NHCV: jax.Array | None  # under it, what rows read of their own chunk


def parts(
    q, k, v, log_decay, beta, erase, value_decay, *, scale, chunk, read_before
):
  q_NHCK, k_NHCK, v_NHCV, g, beta_NHC, e_NHCK, h_NHCV = (
      None if x is None else _chunked(x, chunk)
      for x in (q, k, v, log_decay, beta, erase, value_decay)
  )
  q_NHCK *= scale
  if beta is not None:
    e_NHCK = k_NHCK * beta_NHC[..., None]
    v_NHCV *= beta_NHC[..., None]
  from_start, to_end, end = _edge_decays(g)
  mul = lambda x, decay: x if decay is None else x * decay
  rows = [_up(q_NHCK) if read_before else q_NHCK]
  if e_NHCK is not None:
    rows.append(e_NHCK)
  score_NHCC, *a_NHCC = _pairs(rows, k_NHCK, g)
  to_row = _from_before(from_start) if read_before else from_start
  read_NHCV = own_NHCV = None
  if h_NHCV is not None:
    own_NHCV = _own_reads(score_NHCC, v_NHCV, h_NHCV)
    read_NHCV, to_end_NHCV, end = _edge_decays(h_NHCV)
    end, v_NHCV = end.swapaxes(-1, -2), v_NHCV * to_end_NHCV
    if read_before:
      own_NHCV, read_NHCV = _down(own_NHCV), _from_before(read_NHCV)
    score_NHCC = None
  elif read_before:
    score_NHCC = _down(score_NHCC)
  return Parts(
      score_NHCC, mul(q_NHCK, to_row), mul(k_NHCK, to_end), end,
      jnp.tril(a_NHCC[0], -1) if a_NHCC else None, v_NHCV,
      None if e_NHCK is None else mul(e_NHCK, from_start), read_NHCV, own_NHCV,
  )


def _up(x_NHCX):
  """Every row takes the place of the one before it; the last becomes 0."""
  return jnp.pad(x_NHCX[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))


def _down(x_NHCX, first=0):
  return jnp.pad(x_NHCX[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)),
                 constant_values=first)


def _from_before(from_start):
  """Decay up to the row before each row, from decay up to each row."""
  return None if from_start is None else _down(from_start, 1)


def _chunked(x_R, chunk):
  """[R, H, ...] to [N, H, C, ...] in float32."""
  x_NCH = x_R.reshape(-1, chunk, *x_R.shape[1:])
  return x_NCH.swapaxes(1, 2).astype(jnp.float32)


def _flat(x_NHC):
  """[N, H, C, ...] to [R, H, ...]."""
  x_NCH = x_NHC.swapaxes(1, 2)
  return x_NCH.reshape(-1, *x_NCH.shape[2:])


def _edge_decays(g):
  """Decay from before the chunk to each row, from each row to its end, whole.

  Shapes [N, H, C, X] twice and [N, H, X, 1], X = 1 or K.
  """
  if g is None:
    return None, None, None
  if g.ndim == 3:
    g = g[..., None]
  from_start = jnp.cumsum(g, 2)
  end = from_start[:, :, -1, :, None]
  return jnp.exp(from_start), jnp.exp(_later(g)), jnp.exp(end)


def _later(g):
  """Sum over the rows after each row; rows lie on the last axis but one."""
  sums = jnp.cumsum(g[..., :0:-1, :], -2)[..., ::-1, :]
  return jnp.pad(sums, [(0, 0)] * (g.ndim - 2) + [(0, 1), (0, 0)])


def _pairs(rows, k_NHCK, g):
  """For each x of rows: x_i . k_j times the decay from j to i, 0 for j > i."""
  dot = functools.partial(
      jnp.einsum, '...ik,...jk->...ij', precision=EXACT
  )
  if g is None:
    return [jnp.tril(dot(x, k_NHCK)) for x in rows]
  if g.ndim == 3:
    gamma_NHCC = _merge(
        jnp.ones((*g.shape, 1, 1), jnp.float32), g[..., None],
        lambda to, after: to * after.swapaxes(-1, -2),
    )
    return [dot(x, k_NHCK) * gamma_NHCC for x in rows]
  C = g.shape[2]
  c = min(BLOCK, C)
  split = lambda x: x.reshape(*x.shape[:2], C // c, c, x.shape[-1])
  decay, kb = _block_decay(split(g)), split(k_NHCK)
  out = []
  for x in rows:
    block = (split(x)[..., :, None, :] * kb[..., None, :, :] * decay).sum(-1)
    out.append(_merge(
        block, g,
        lambda to, after, xs, ks: dot(xs * to, ks * after), x, k_NHCK,
    ))
  return out


def _own_reads(score_NHCC, v_NHCV, h_NHCV):
  """sum_j score_ij exp(h_{j+1} + ... + h_i) v_j, in each value channel."""
  N, H, C, V = v_NHCV.shape
  c = min(BLOCK, C)
  split = lambda x: x.reshape(N, H, C // c, c, V)
  block = jnp.stack([
      score_NHCC[..., n : n + c, n : n + c] for n in range(0, C, c)
  ], 2)
  read = jnp.einsum(
      '...ij,...ijv,...jv->...iv', block, _block_decay(split(h_NHCV)),
      split(v_NHCV), precision=EXACT).reshape(N, H, C, V)
  while c < C:
    (first_h, second_h), (first_v, _) = _halves(h_NHCV, c), _halves(v_NHCV, c)
    below = jnp.stack([
        score_NHCC[..., n + c : n + 2 * c, n : n + c]
        for n in range(0, C, 2 * c)
    ], 2)
    more = jnp.exp(jnp.cumsum(second_h, -2)) * _exact(
        below, first_v * jnp.exp(_later(first_h)))
    read += jnp.stack([jnp.zeros_like(more), more], 3).reshape(N, H, C, V)
    c *= 2
  return read


def _block_decay(g):
  """Decay from row j to row i of a block by channel, [..., i, j, X]."""
  c = g.shape[-2]
  i, j = jnp.arange(c)[:, None], jnp.arange(c)[None]
  between = jnp.cumsum(
      jnp.where((i > j)[..., None], g[..., :, None, :], 0), -3
  )
  return jnp.where((i >= j)[..., None], jnp.exp(between), 0)


def _merge(block, g, corner, row=None, col=None):
  """Joins lower-triangular diagonal blocks to one [N, H, C, C] matrix.

  Two neighbours a, b become [[a, 0], [corner, b]], where corner is a function
  of the decays from a's end to b's rows and from a's rows to its end (and of
  the rows of `row` in b and of `col` in a).
  """
  C, h = g.shape[2], block.shape[-1]
  while h < C:
    first, second = _halves(g, h)
    args = [jnp.exp(jnp.cumsum(second, -2)), jnp.exp(_later(first))]
    if row is not None:
      args += [_halves(row, h)[1], _halves(col, h)[0]]
    a, b = block[:, :, 0::2], block[:, :, 1::2]
    block = _join(a, corner(*args), b)
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


def _delta_writes(p):
  """T, U and W of the delta rule."""
  inverse_NHCC = _inverse(p.a_NHCC)
  u_NHCV = _exact(inverse_NHCC, p.write_NHCV)
  return inverse_NHCC, u_NHCV, _exact(inverse_NHCC, p.erase_NHCK)


def _num_lanes(group_N, state_GHKV):
  return min(LANES, len(group_N), len(state_GHKV))


def _fwd(*operands, keep, **static):
  *rows, state_GHKV, group_N = operands
  p = parts(*rows, **static)
  u, w = p.write_NHCV, None
  if p.a_NHCC is not None:
    _, u, w = _delta_writes(p)
  lane = schedule.lanes(group_N, _num_lanes(group_N, state_GHKV))
  before_NHKV, y_NHCV, state_GHKV = _advance(
      lane, group_N, state_GHKV, u, w, p.key_NHCK, p.end_NHX1
  )
  o_NHCV = p.query_NHCK @ before_NHKV
  if p.own_NHCV is None:
    o_NHCV += p.score_NHCC @ y_NHCV
  else:
    o_NHCV = o_NHCV * p.read_NHCV + p.own_NHCV
  o_RHV = _flat(_used(o_NHCV, group_N)).astype(rows[2].dtype)
  return (o_RHV, state_GHKV), before_NHKV if keep else None


def _used(x_N, group_N):
  return jnp.where((group_N >= 0).reshape(-1, *[1] * (x_N.ndim - 1)), x_N, 0)


def _visit(lane, group_N, j, num_groups):
  """What each lane does in step j: where it reads, where it may write."""
  N = len(group_N)
  place_L = lane.start_L + j
  valid_L = place_L < lane.end_L
  chunk_L = lane.order_N[jnp.minimum(place_L, N - 1)]
  group_L = jnp.maximum(group_N[chunk_L], 0)
  first_L = lane.first_N[chunk_L]
  last_L = lane.last_N[chunk_L]
  return (
      chunk_L, jnp.where(valid_L, chunk_L, N), group_L, valid_L,
      first_L, last_L,
  )


def _wide(mask_L):
  return mask_L[:, None, None, None]


def _advance(lane, group_N, state_GHKV, u_NHCV, w_NHCK, key_NHCK, end_NHX1):
  """Runs the states through the chunks.

  Returns:
    State before each chunk, what each chunk's rows write, last states.
  """
  N, H, _, V = u_NHCV.shape
  G, K, L = len(state_GHKV), key_NHCK.shape[-1], len(lane.start_L)

  def body(j, carry):
    s_LHKV, before_NHKV, y_NHCV, final_GHKV = carry
    read_L, write_L, group_L, valid_L, first_L, last_L = _visit(
        lane, group_N, j, G
    )
    s_LHKV = jnp.where(_wide(first_L), state_GHKV[group_L], s_LHKV)
    before_NHKV = before_NHKV.at[write_L].set(s_LHKV, mode='drop')
    y_LHCV = u_NHCV[read_L]
    if w_NHCK is not None:
      y_LHCV -= w_NHCK[read_L] @ s_LHKV
      y_NHCV = y_NHCV.at[write_L].set(y_LHCV, mode='drop')
    if end_NHX1 is not None:
      s_LHKV = s_LHKV * end_NHX1[read_L]
    s_LHKV += key_NHCK[read_L].swapaxes(-1, -2) @ y_LHCV
    done_L = jnp.where(valid_L & last_L, group_L, G)
    final_GHKV = final_GHKV.at[done_L].set(s_LHKV, mode='drop')
    return s_LHKV, before_NHKV, y_NHCV, final_GHKV

  zeros = functools.partial(common.zeros, dtype=jnp.float32, like=state_GHKV)
  carry = (zeros((L, H, K, V)), zeros((N, H, K, V)), u_NHCV, state_GHKV)
  _, before, y, final = jax.lax.fori_loop(0, lane.steps, body, carry)
  return before, y, final


def _bwd(*args, chunk, **static):
  *rows, _, group_N, before_NHKV, do_RHV, dstate_GHKV = args
  run = functools.partial(parts, chunk=chunk, **static)
  p, pull = jax.vjp(run, *rows)
  do_NHCV = _used(_chunked(do_RHV, chunk), group_N)
  t = lambda x: x.swapaxes(-1, -2)
  w_NHCK = dread = down = None
  y_NHCV = p.write_NHCV
  if p.a_NHCC is not None:
    inverse_NHCC, u_NHCV, w_NHCK = _delta_writes(p)
    y_NHCV = u_NHCV - w_NHCK @ before_NHKV
  if p.own_NHCV is None:
    dy_NHCV, dscore = t(p.score_NHCC) @ do_NHCV, do_NHCV @ t(y_NHCV)
  else:
    dy_NHCV, dscore, down = jnp.zeros_like(do_NHCV), None, do_NHCV
    dread = do_NHCV * (p.query_NHCK @ before_NHKV)
    do_NHCV = do_NHCV * p.read_NHCV
  dbefore_NHKV = t(p.query_NHCK) @ do_NHCV
  lane = schedule.lanes(group_N, _num_lanes(group_N, dstate_GHKV))
  dafter_NHKV, dy_NHCV, dstate_GHKV = _retreat(
      lane, group_N, dstate_GHKV, dy_NHCV, dbefore_NHKV, w_NHCK, p.key_NHCK,
      p.end_NHX1,
  )
  dend = da = derase = None
  if p.end_NHX1 is not None:
    over = [axis for axis in (-1, -2) if p.end_NHX1.shape[axis] == 1]
    dend = (dafter_NHKV * before_NHKV).sum(over, keepdims=True)
  dwrite = dy_NHCV
  if p.a_NHCC is not None:
    dw_NHCK = -dy_NHCV @ t(before_NHKV)
    dwrite = _exact(t(inverse_NHCC), dy_NHCV)
    derase = _exact(t(inverse_NHCC), dw_NHCK)
    da = -jnp.tril(dwrite @ t(u_NHCV) + derase @ t(w_NHCK), -1)
  grads = pull(Parts(
      dscore, do_NHCV @ t(before_NHKV), y_NHCV @ t(dafter_NHKV), dend, da,
      dwrite, derase, dread, down,
  ))
  return *grads, dstate_GHKV


def _retreat(
    lane, group_N, dstate_GHKV, dy_NHCV, dbefore_NHKV, w_NHCK, key_NHCK,
    end_NHX1,
):
  """Runs the states' cotangents back through the chunks.

  Returns:
    Cotangent after each chunk, of what its rows write, of the initial states.
  """
  N, H, K, V = dbefore_NHKV.shape
  G, L = len(dstate_GHKV), len(lane.start_L)

  def body(j, carry):
    ds_LHKV, dafter_NHKV, dy_NHCV, dinitial_GHKV = carry
    read_L, write_L, group_L, valid_L, first_L, last_L = _visit(
        lane, group_N, lane.steps - 1 - j, G
    )
    ds_LHKV = jnp.where(_wide(last_L), dstate_GHKV[group_L], ds_LHKV)
    dafter_NHKV = dafter_NHKV.at[write_L].set(ds_LHKV, mode='drop')
    dy_LHCV = dy_NHCV[read_L] + key_NHCK[read_L] @ ds_LHKV
    dy_NHCV = dy_NHCV.at[write_L].set(dy_LHCV, mode='drop')
    if end_NHX1 is not None:
      ds_LHKV = ds_LHKV * end_NHX1[read_L]
    ds_LHKV += dbefore_NHKV[read_L]
    if w_NHCK is not None:
      ds_LHKV -= w_NHCK[read_L].swapaxes(-1, -2) @ dy_LHCV
    done_L = jnp.where(valid_L & first_L, group_L, G)
    dinitial_GHKV = dinitial_GHKV.at[done_L].set(ds_LHKV, mode='drop')
    return ds_LHKV, dafter_NHKV, dy_NHCV, dinitial_GHKV

  zeros = functools.partial(common.zeros, dtype=jnp.float32, like=dbefore_NHKV)
  carry = (zeros((L, H, K, V)), zeros((N, H, K, V)), dy_NHCV, dstate_GHKV)
  _, dafter, dy, dinitial = jax.lax.fori_loop(0, lane.steps, body, carry)
  return dafter, dy, dinitial


BACKEND = common.Backend('xla', common.everywhere, _fwd, _bwd)
