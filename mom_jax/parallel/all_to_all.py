"""Expert parallelism: rows travel to the rank that owns their group, and back.

Groups are memories or experts. Ranks are the devices along
`sharding.EXPERT_AXES`; each owns the groups that its `Placement` says and keeps
their parameters and, of memories, states. A token that group g takes:

  rank of the token                                    rank that owns g
  tokens --> rows by rank, group -- SendPlan.send ---> rows by sender
               (dispatch.group)                          --> rows by group
                                                         --> memory or expert
                                                         --> rows by sender
  tokens <-- rows by rank, group <- SendPlan.send_back ----'
      (weighted sum: dispatch.ungroup)

With two slices of two devices, from device 0 of slice 0 to device 1 of slice 1:

  slice 0    device 0    device 1
                |                      1. over DCN, to the device of that index
  slice 1    device 0 -> device 1      2. over ICI, to the rank; back in reverse

Memories call `plan_rows_on_ranks`, which sends metadata only, and then move
rows with `RowsOnRanks.gather` and `ungroup`; experts use `on_owning_ranks`,
which does all of it. Both run inside `per_device.batch_local`, ask `plan_sends`
for the number of rows that each device sends to each, and with one rank move
nothing. No row is dropped: buffers have room for the worst case, and
`on_owning_ranks` moves the rows in as many rounds as there are ranks, so that
this is no more than one device would need for all groups.

Why DCN first: a row crosses the network at most once each way, in messages as
many times larger and fewer as a slice has ranks. ICI first, to the device with
the rank's index, would move as much, but all rows of a slice for one rank would
leave through one device. A token that two groups of a slice take is two rows
and crosses twice.

On TPU and GPU only the rows that exist move (`jax.lax.ragged_all_to_all`); XLA
on CPUs has no such collective and moves whole buffers.

Axes are those of the glossary, and here S: slots, in `plan_sends` slices; in
hops N: devices, C: parts that each of them gets, K = N C; g: groups of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped
import numpy as np

from mom_jax import pallas
from mom_jax.parallel import sharding
from mom_jax.routing import dispatch


class Placement(NamedTuple):
  """The groups that each rank owns.

  Each group has a slot, counted in the order of ranks: rank o has the slots
  [o * groups_per_rank, (o + 1) * groups_per_rank), some of which may be empty.

  Attributes:
    group_OS: group in each slot of each rank, -1 for none.
  """

  group_OS: np.ndarray

  @property
  def num_ranks(self) -> int:
    """Number of ranks."""
    return self.group_OS.shape[0]

  @property
  def groups_per_rank(self) -> int:
    """Slots of a rank."""
    return self.group_OS.shape[1]

  @property
  def num_slots(self) -> int:
    """Slots of all ranks."""
    return self.group_OS.size

  @property
  def is_identity(self) -> bool:
    """True if each group's slot is its index."""
    group_S = self.group_OS.ravel()
    return bool((group_S == np.arange(len(group_S))).all())

  def rank_slot(self, group: Int[Array, '*R']) -> Int[Array, '*R']:
    """Return the slot of each group in the order of ranks; -1 stays."""
    slot_G = np.argsort(self.group_OS.ravel(), kind='stable')
    slot_G = slot_G[(self.group_OS < 0).sum():]
    slot = jnp.asarray(slot_G, jnp.int32)[jnp.maximum(group, 0)]
    return jnp.where(group < 0, -1, slot)

  def to_rank_order(
      self, w_G: Shaped[Array, 'G ...']
  ) -> Shaped[Array, 'S ...']:
    """Reorder parameters of the groups by slot; empty slots have any."""
    if self.is_identity:
      return w_G
    return w_G[np.maximum(self.group_OS.ravel(), 0)]


def place_groups(loads: Sequence[float], num_ranks: int) -> Placement:
  """Place groups on ranks so that the largest load of a rank is small.

  Equal numbers of groups in order, as parameters are stored, or else the
  heaviest group first to the rank with the smallest load, if that is better.

  Args:
    loads: rows that each group is expected to get, in any unit.
  """
  per_rank = -(-len(loads) // num_ranks)
  in_order = [list(range(len(loads)))[o * per_rank:(o + 1) * per_rank]
              for o in range(num_ranks)]
  balanced: list[list[int]] = [[] for _ in range(num_ranks)]

  def load(groups):
    return sum(loads[g] for g in groups)

  for g in sorted(range(len(loads)), key=lambda g: -loads[g]):
    min(balanced, key=lambda groups: (load(groups), len(groups))).append(g)
  placed = in_order
  if max(map(load, balanced)) < max(map(load, in_order)) - 1e-9:
    placed = [sorted(groups) for groups in balanced]
  per_rank = max(map(len, placed))
  return Placement(np.array(
      [groups + [-1] * (per_rank - len(groups)) for groups in placed]))


class Hop(NamedTuple):
  """One ragged all-to-all along a mesh axis, and its reverse.

  Each device sends K / N consecutive parts to each of N devices, and receives
  as many from each. Offsets and sizes are those of `ragged_all_to_all`.

  Attributes:
    send_offset_K, send_size_K: parts that this device sends.
    remote_offset_K: offsets of sent parts in the receiver's buffer.
    recv_offset_K, recv_size_K: parts that this device receives.
    home_offset_K: offsets of received parts in the sender's array.
    axis: mesh axis.
    buffer_rows: rows of the receive buffer.
  """

  send_offset_K: jax.Array
  send_size_K: jax.Array
  remote_offset_K: jax.Array
  recv_offset_K: jax.Array
  recv_size_K: jax.Array
  home_offset_K: jax.Array
  axis: str
  buffer_rows: int


jax.tree_util.register_pytree_node(
    Hop, lambda hop: (hop[:-2], hop[-2:]),
    lambda static, arrays: Hop(*arrays, *static))


class SendPlan(NamedTuple):
  """Counts and offsets of the rows that each device sends to each rank.

  There are O ranks with g groups each.

  Attributes:
    slot_P: slot of the group of each row here, ascending, -1 past the last row.
    send_offset_O, send_size_O: rows here that each rank gets.
    recv_size_Og: rows that each rank sends for each group of this one.
    hops: ragged all-to-alls, each from where the one before ends.
    max_rows: the most rows that one device may send to one rank.
  """

  slot_P: jax.Array
  send_offset_O: jax.Array
  send_size_O: jax.Array
  recv_size_Og: jax.Array
  hops: tuple[Hop, ...]
  max_rows: int

  @property
  def num_ranks(self) -> int:
    """Number of ranks."""
    return len(self.send_size_O)

  @property
  def buffer_rows(self) -> int:
    """Rows of the receive buffer, `max_rows` of each rank."""
    return self.num_ranks * self.max_rows

  def received_groups(self) -> Int[Array, ' Q']:
    """Return the group in [0, g) of each received row, -1 for no row."""
    end_Og = jnp.cumsum(self.recv_size_Og, 1)
    count_ends = jax.vmap(functools.partial(
        jnp.searchsorted, side='right', method='sort'), (0, None))
    group_OQ = count_ends(end_Og, jnp.arange(self.max_rows))
    g = end_Og.shape[1]
    return jnp.where(group_OQ < g, group_OQ, -1).astype(jnp.int32).reshape(-1)

  def send(self, x_P: Shaped[Array, 'P ...']) -> Shaped[Array, 'Q ...']:
    """Send rows to the owning ranks; they receive them by sender, then zeros.
    """
    if not jnp.issubdtype(x_P.dtype, jnp.inexact):
      return _to_ranks(x_P, self)
    return _send(x_P, self)

  def send_back(self, y_Q: Float[Array, 'Q ...']) -> Float[Array, 'P ...']:
    """Send results of the owning ranks back to the rows' positions, else 0."""
    return _send_back(y_Q, self)


jax.tree_util.register_pytree_node(
    SendPlan, lambda plan: (plan[:-1], plan.max_rows),
    lambda max_rows, arrays: SendPlan(*arrays, max_rows))


def plan_sends(
    slot_P: Int[Array, ' P'],
    num_ranks: int,
    groups_per_rank: int,
    max_rows: int,
) -> SendPlan:
  """Tell every rank how many rows it gets from each device.

  Args:
    slot_P: slots of groups, in [0, num_ranks * groups_per_rank), ascending,
      then -1.
    max_rows: the most rows that one device may send to one rank.
  """
  num_slots = num_ranks * groups_per_rank
  key_P = jnp.where(slot_P < 0, num_slots, slot_P)
  bound = jnp.searchsorted(
      key_P, jnp.arange(num_slots + 1), side='left', method='sort')
  bound = bound.astype(jnp.int32)
  count_Og = jnp.diff(bound).reshape(num_ranks, groups_per_rank)
  offset_O = bound[:-1].reshape(num_ranks, groups_per_rank)[:, 0]
  size_O, axes = count_Og.sum(1), sharding.expert_axes()
  if len(axes) == 1:
    axis, = axes
    recv_Og = _all_to_all(count_Og, axis)
    hops = (_hop(axis, offset_O[:, None], size_O[:, None],
                 recv_Og.sum(1)[:, None], max_rows),)
    return SendPlan(slot_P, offset_O, size_O, recv_Og, hops, max_rows)
  # S slices of N ranks each.
  (dcn, S), (ici, N) = axes.items()
  count_SNg = _all_to_all(count_Og.reshape(S, N, groups_per_rank), dcn)
  size_SN = count_SNg.sum(2)  # from each slice, for the ranks of this one
  rows_per_slice = min(len(slot_P), N * max_rows)
  over_dcn = _hop(
      dcn, offset_O[::N, None], size_O.reshape(S, N).sum(1, keepdims=True),
      size_SN.sum(1, keepdims=True), rows_per_slice)
  offset_SN = jnp.arange(S, dtype=jnp.int32)[:, None] * rows_per_slice + (
      jnp.cumsum(size_SN, 1) - size_SN)
  recv_SNg = _all_to_all(count_SNg, ici, 1)
  over_ici = _hop(ici, offset_SN.T, size_SN.T, recv_SNg.sum(2).T, max_rows)
  recv_Og = recv_SNg.reshape(num_ranks, groups_per_rank)
  return SendPlan(
      slot_P, offset_O, size_O, recv_Og, (over_dcn, over_ici), max_rows)


def _hop(
    axis: str,
    send_offset_NC: Int[Array, 'N C'],
    send_size_NC: Int[Array, 'N C'],
    recv_size_NC: Int[Array, 'N C'],
    max_rows: int,
) -> Hop:
  """Plan the hop of C parts from each of N devices to each.

  Received rows are ordered by part, then by sending device.

  Args:
    max_rows: the most rows of a part.
  """
  N, C = send_offset_NC.shape
  part_1C = jnp.arange(C, dtype=jnp.int32)[None] * (N * max_rows)
  device_N1 = jnp.arange(N, dtype=jnp.int32)[:, None]
  remote_offset_NC = jnp.broadcast_to(
      part_1C + jax.lax.axis_index(axis) * max_rows, (N, C))
  recv_offset_NC = part_1C + device_N1 * max_rows
  send_offset_K, *others_K = (a.reshape(-1) for a in (
      send_offset_NC, send_size_NC, remote_offset_NC, recv_offset_NC,
      recv_size_NC))
  return Hop(send_offset_K, *others_K, _all_to_all(send_offset_K, axis), axis,
             N * C * max_rows)


class RowsOnRanks(NamedTuple):
  """Rows on the ranks that own their groups.

  Attributes:
    layout: of the rows that this rank works on.
    num_tokens: of this device.
    home: layout of this device's rows, in the order in which they are sent.
    plan: how they travel. With one rank they do not: home and plan are None.
  """

  layout: dispatch.Layout
  num_tokens: int
  home: dispatch.Layout | None = None
  plan: SendPlan | None = None

  def send(self, x_N: Float[Array, 'N ...']) -> Float[Array, 'Q ...']:
    """Send token arrays to the owning ranks; `layout` indexes the result."""
    if self.plan is None:
      return x_N
    return self.plan.send(dispatch.gather(x_N, self.home))

  def gather(
      self, x_N: Float[Array, 'N ...'], zeros: bool = True
  ) -> Float[Array, 'P ...']:
    """Move token arrays into `layout`, as `dispatch.gather` does."""
    return dispatch.gather(self.send(x_N), self.layout, zeros)

  def ungroup(
      self, y_P: Float[Array, 'P ...'], weight_R: Float[Array, ' R']
  ) -> Float[Array, 'N ...']:
    """Sum results, with weights, over the rows of each token of this device.

    Args:
      y_P: by position of `layout`.
      weight_R: of this device's rows.
    """
    if self.plan is None:
      return dispatch.ungroup(y_P, self.layout, weight_R, self.num_tokens)
    y_Q = _by_row(y_P, self.layout, self.plan.buffer_rows)
    return dispatch.ungroup(
        self.plan.send_back(y_Q), self.home, weight_R, self.num_tokens)


jax.tree_util.register_pytree_node(
    RowsOnRanks, lambda rows: ((rows.layout, *rows[2:]), rows.num_tokens),
    lambda num_tokens, rows: RowsOnRanks(rows[0], num_tokens, *rows[1:]))


def plan_rows_on_ranks(
    token_R: Int[Array, ' R'],
    slot_R: Int[Array, ' R'],
    *,
    num_tokens: int,
    num_samples: int,
    placement: Placement,
    align: int,
    rows_per_token: int | None,
    max_rows: int,
    metadata: Sequence[Int[Array, ' N']] = (),
) -> RowsOnRanks:
  """Plan how rows reach the ranks that own their groups; lay them out there.

  Only counts and `metadata` are sent now. Samples stay apart: the groups of the
  resulting layout are group * n + sample, for the `groups_per_rank` groups of
  this rank and the n samples of all devices.

  Args:
    token_R: token of each row.
    slot_R: slot of the row's group * num_samples + sample, -1 for none.
    num_tokens, align, rows_per_token, metadata: as for `dispatch.group`.
    max_rows: the most rows that one device may send to one rank.
  """
  num_ranks, per_rank = placement.num_ranks, placement.groups_per_rank
  if num_ranks == 1:
    return RowsOnRanks(dispatch.group(
        token_R, slot_R, num_tokens=num_tokens,
        num_groups=per_rank * num_samples, align=align,
        rows_per_token=rows_per_token, metadata=metadata), num_tokens)
  home = dispatch.group(
      token_R, slot_R, num_tokens=num_tokens,
      num_groups=placement.num_slots * num_samples,
      rows_per_token=rows_per_token, metadata=metadata)
  plan = plan_sends(home.group_P, num_ranks, per_rank * num_samples, max_rows)
  Q = plan.buffer_rows
  group_Q = plan.received_groups()
  sample_Q = jnp.arange(Q) // max_rows * num_samples + group_Q % num_samples
  group_Q = jnp.where(
      group_Q < 0, -1,
      group_Q // num_samples * (num_ranks * num_samples) + sample_Q)
  layout = dispatch.group(
      jnp.arange(Q), group_Q, num_tokens=Q,
      num_groups=per_rank * num_ranks * num_samples, align=align,
      rows_per_token=1, metadata=[plan.send(x_P) for x_P in home.metadata])
  return RowsOnRanks(layout, num_tokens, home, plan)


def on_owning_ranks(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    x_PD: Float[Array, 'P D'],
    layout: dispatch.Layout,
    num_ranks: int,
    capacity: int | None = None,
) -> Float[Array, 'P D']:
  """Compute y = fn(x), each row on the rank that owns its group.

  Args:
    fn: (rows [R, D] group by group, rows of each of a rank's groups) -> rows,
      each computed from itself alone.
    layout: of the rows, whose groups are slots of a `Placement`.
    capacity: as for `dispatch.group`: all groups have as many rows.
  """
  if num_ranks == 1:
    return fn(x_PD, layout.count_G)
  per_rank = len(layout.count_G) // num_ranks
  if capacity is not None:
    return _equal_groups(fn, x_PD, num_ranks, per_rank, capacity)

  @jax.checkpoint
  def one_round(rows):
    x_RD, slot_R = rows
    plan = plan_sends(slot_R, num_ranks, per_rank, len(slot_R))
    Q = plan.buffer_rows
    received = dispatch.group(
        jnp.arange(Q), plan.received_groups(), num_tokens=Q,
        num_groups=per_rank, rows_per_token=1)
    y_PD = fn(dispatch.gather(plan.send(x_RD), received), received.count_G)
    return plan.send_back(_by_row(y_PD, received, Q))

  y_ORD = jax.lax.map(one_round, (
      _rounds(x_PD, num_ranks, 0), _rounds(layout.group_P, num_ranks, -1)))
  return y_ORD.swapaxes(0, 1).reshape(-1, y_ORD.shape[-1])[:len(x_PD)]


def _equal_groups(fn, x_PD, num_ranks, per_rank, capacity):
  """`on_owning_ranks` for groups that all have `capacity` rows."""
  x_OgPD = _all_to_all_rows(x_PD.reshape(num_ranks, per_rank, capacity, -1))
  y_RD = fn(
      x_OgPD.swapaxes(0, 1).reshape(per_rank * num_ranks * capacity, -1),
      jnp.full(per_rank, num_ranks * capacity, jnp.int32))
  y_gOPD = y_RD.reshape(per_rank, num_ranks, capacity, -1)
  return _all_to_all_rows(y_gOPD.swapaxes(0, 1)).reshape(len(x_PD), -1)


def _rounds(x_P, num_rounds, fill):
  """Split rows into rounds, every num_rounds-th to one: each has all groups.
  """
  padding = [(0, -len(x_P) % num_rounds)] + [(0, 0)] * (x_P.ndim - 1)
  x_P = jnp.pad(x_P, padding, constant_values=fill)
  return x_P.reshape(-1, num_rounds, *x_P.shape[1:]).swapaxes(0, 1)


def _by_row(y_P, layout, num_rows):
  """Undo a layout whose rows are its tokens."""
  return dispatch.ungroup(y_P, layout, jnp.ones(num_rows), num_rows)


def _all_to_all(x: jax.Array, axis: str, dim: int = 0) -> jax.Array:
  """Send part i of x to device i; the result has a part of each device."""
  return jax.lax.all_to_all(x, axis, dim, dim, tiled=True)


def _all_to_all_rows(x_O: Shaped[Array, 'O ...']) -> Shaped[Array, 'O ...']:
  """Send part o of x to rank o; the result has a part of each rank."""
  axes = sharding.expert_axes()
  x = x_O.reshape(*[*axes.values()][:-1], -1, *x_O.shape[1:])
  for dim, axis in enumerate(axes):
    x = _all_to_all(x, axis, dim)
  return x.reshape(x_O.shape)


def _to_ranks(x_P: jax.Array, plan: SendPlan) -> jax.Array:
  if _is_ragged(x_P, plan):
    for hop in plan.hops:
      x_P = jax.lax.ragged_all_to_all(
          x_P, jnp.zeros((hop.buffer_rows, *x_P.shape[1:]), x_P.dtype),
          hop.send_offset_K, hop.send_size_K, hop.remote_offset_K,
          hop.recv_size_K, axis_name=hop.axis)
    return x_P
  i = jnp.arange(plan.max_rows)[None]
  index_OQ = jnp.where(
      i < plan.send_size_O[:, None], plan.send_offset_O[:, None] + i, len(x_P))
  x_OQ = x_P.at[index_OQ].get(mode='fill', fill_value=0)
  return _all_to_all_rows(x_OQ).reshape(plan.buffer_rows, *x_P.shape[1:])


def _from_ranks(y_Q: jax.Array, plan: SendPlan) -> jax.Array:
  P = len(plan.slot_P)
  if _is_ragged(y_Q, plan):
    rows_before = (P, *(hop.buffer_rows for hop in plan.hops))
    for hop, rows in reversed(list(zip(plan.hops, rows_before))):
      y_Q = jax.lax.ragged_all_to_all(
          y_Q, jnp.zeros((rows, *y_Q.shape[1:]), y_Q.dtype),
          hop.recv_offset_K, hop.recv_size_K, hop.home_offset_K,
          hop.send_size_K, axis_name=hop.axis)
    return y_Q
  y_Q = _all_to_all_rows(y_Q)
  rank_P = jnp.maximum(plan.slot_P, 0) // plan.recv_size_Og.shape[1]
  index_P = rank_P * plan.max_rows + jnp.arange(P) - plan.send_offset_O[rank_P]
  index_P = jnp.where(plan.slot_P < 0, plan.buffer_rows, index_P)
  return y_Q.at[index_P].get(mode='fill', fill_value=0)


def _is_ragged(x: jax.Array, plan: SendPlan) -> bool:
  """True where only the rows that exist move.

  Rows of one scalar move padded between slices: libtpu makes 1024 of each
  there, more than whole buffers have with fewer ranks.
  """
  padded = x.ndim == 1 and plan.hops[0].axis == sharding.EXPERT_AXES[0]
  return pallas.platform() in ('tpu', 'gpu') and not padded


# Each direction is the other's transpose.


@jax.custom_vjp
def _send(x_P, plan):
  return _to_ranks(x_P, plan)


def _send_fwd(x_P, plan):
  return _to_ranks(x_P, plan), plan


def _send_bwd(plan, dx_Q):
  return _from_ranks(dx_Q, plan), None


@jax.custom_vjp
def _send_back(y_Q, plan):
  return _from_ranks(y_Q, plan)


def _send_back_fwd(y_Q, plan):
  return _from_ranks(y_Q, plan), plan


def _send_back_bwd(plan, dy_P):
  return _to_ranks(dy_P, plan), None


_send.defvjp(_send_fwd, _send_bwd)
_send_back.defvjp(_send_back_fwd, _send_back_bwd)
