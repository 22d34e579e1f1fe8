"""Rows go to the device that owns their group, and back.

Groups (memories, experts) are owned by the devices along `sharding.OWNERS`, as
`place` says. Where there are several, the rows of each device, brought together
by `dispatch` in the order of owners, are exchanged all to all, worked on by the
owners and returned. Nothing is dropped: buffers have room for the worst case,
and `at_owners` takes the rows in as many rounds as there are owners, so that
this is no more than one device would need alone.

Where owners lie in several slices, an exchange takes two steps. Over the slow
network (DCN) a device sends to one device of each other slice, the one that has
its own place there, all rows for that slice; inside the slice (ICI) that one
passes them on to their owners. The way back is the same in reverse. So a row
crosses the network once, if its owner is in another slice, and else not at all,
in messages as many times fewer and larger as a slice has owners. Those numbers
are the same if rows first go, inside their slice, to the device with the place
of the owner. But then all rows of a slice for one owner would leave it by one
device's share of the network; so each device sends its own rows, however uneven
the load, and between the steps has those of as many devices as there are
slices, at most as many as have room at an owner. A token that goes to two
groups is two rows, and crosses twice.

On TPU and GPU an exchange moves the rows that there are
(`jax.lax.ragged_all_to_all`); XLA on CPUs has no such collective and moves
whole buffers. To be called inside `sharding.batch_local`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped
import numpy as np

from mom_jax.pallas import common
from mom_jax.parallel import sharding
from mom_jax.routing import dispatch


class Places(NamedTuple):
  """Which groups each owner has: owner o those in order_OG[o], -1 for none."""

  order_OG: np.ndarray

  @property
  def each(self) -> int:
    """Most groups of an owner."""
    return self.order_OG.shape[1]

  @property
  def natural(self) -> bool:
    """Whether owners have equal shares of the groups, in order."""
    order = self.order_OG.ravel()
    return bool((order == np.arange(len(order))).all())

  def slots(self, group: Int[Array, '*R']) -> Int[Array, '*R']:
    """owner * each + place there, of each group; -1 stays."""
    slot_G = np.argsort(self.order_OG.ravel(), kind='stable')
    slot_G = slot_G[(self.order_OG < 0).sum():]
    slot = jnp.asarray(slot_G, jnp.int32)[jnp.maximum(group, 0)]
    return jnp.where(group < 0, -1, slot)

  def lay(self, w_G: Shaped[Array, 'G ...']) -> Shaped[Array, 'S ...']:
    """Parameters of the groups by slot; an empty slot has those of any."""
    if self.natural:
      return w_G
    return w_G[np.maximum(self.order_OG.ravel(), 0)]


def place(loads: Sequence[float], owners: int) -> Places:
  """Deals groups to owners so that the largest load is small.

  Equal shares in order, which parameters are stored in, are kept where no other
  way is better.

  Args:
    loads: rows that each group is expected to get, in any unit.
  """
  each = -(-len(loads) // owners)
  shares = [list(range(len(loads)))[o * each:(o + 1) * each]
            for o in range(owners)]
  heaviest = lambda shares: max(sum(loads[g] for g in s) for s in shares)
  dealt: list[list[int]] = [[] for _ in range(owners)]
  for g in sorted(range(len(loads)), key=lambda g: -loads[g]):
    min(dealt, key=lambda s: (sum(loads[i] for i in s), len(s))).append(g)
  if heaviest(dealt) < heaviest(shares) - 1e-9:
    shares = [sorted(s) for s in dealt]
  each = max(map(len, shares))
  return Places(np.array([s + [-1] * (each - len(s)) for s in shares]))


class Hop(NamedTuple):
  """One collective on the way of rows: to devices along an axis, and back.

  In K parts, as many for each device; those that go to a device, or come from
  one, are neighbours.

  Attributes:
    start_K, size_K: where the parts lie here, and their rows.
    there_K: where they come to lie.
    came_K, got_K: where those that come lie then, and their rows.
    home_K: where they lay.
    axis: mesh axis.
    room: for rows that come.
  """

  start_K: jax.Array
  size_K: jax.Array
  there_K: jax.Array
  came_K: jax.Array
  got_K: jax.Array
  home_K: jax.Array
  axis: str
  room: int


jax.tree_util.register_pytree_node(
    Hop, lambda hop: (hop[:-2], hop[-2:]),
    lambda static, arrays: Hop(*arrays, *static))


class Route(NamedTuple):
  """Who sends how many rows to whom; O owners, g groups of each.

  Attributes:
    slot_P: slot of each row here, ascending, -1 past the last row.
    start_O, size_O: rows here that each owner gets.
    got_Og: rows that come from each device for each group here.
    hops: how rows that there are go, each hop from where the one before ends.
    most: room for the rows of one device at one owner.
  """

  slot_P: jax.Array
  start_O: jax.Array
  size_O: jax.Array
  got_Og: jax.Array
  hops: tuple[Hop, ...]
  most: int

  @property
  def arrived(self) -> int:
    """Rows that an owner has room for."""
    return len(self.size_O) * self.most

  def groups(self) -> Int[Array, 'Q']:
    """Group [0, g) of each place for a row that arrived, -1 for none."""
    end_Og = jnp.cumsum(self.got_Og, 1)
    find = jax.vmap(functools.partial(
        jnp.searchsorted, side='right', method='sort'), (0, None))
    group_OQ = find(end_Og, jnp.arange(self.most))
    g = end_Og.shape[1]
    return jnp.where(group_OQ < g, group_OQ, -1).astype(jnp.int32).reshape(-1)


jax.tree_util.register_pytree_node(
    Route, lambda r: (r[:-1], r.most), lambda most, r: Route(*r, most))


def route(
    slot_P: Int[Array, 'P'], owners: int, each: int, most: int
) -> Route:
  """Tells the owners what comes.

  Args:
    slot_P: slots of groups in [0, owners * each), ascending, then -1.
    most: at most so many rows have one owner.
  """
  key_P = jnp.where(slot_P < 0, owners * each, slot_P)
  bound = jnp.searchsorted(
      key_P, jnp.arange(owners * each + 1), side='left', method='sort')
  bound = bound.astype(jnp.int32)
  count_Og = jnp.diff(bound).reshape(owners, each)
  start_O = bound[:-1].reshape(owners, each)[:, 0]
  size_O, sizes = count_Og.sum(1), sharding.owner_axes()
  if len(sizes) == 1:
    axis, = sizes
    got_Og = _tell(count_Og, axis)
    hops = (_hop(axis, start_O[:, None], size_O[:, None],
                 got_Og.sum(1)[:, None], most),)
    return Route(slot_P, start_O, size_O, got_Og, hops, most)
  # S slices of N owners each.
  (slices, S), (inside, N) = sizes.items()
  count_SNg = _tell(count_Og.reshape(S, N, each), slices)
  size_SN = count_SNg.sum(2)  # of each slice, for the owners of this one
  between = min(len(slot_P), N * most)
  first = _hop(
      slices, start_O[::N, None], size_O.reshape(S, N).sum(1, keepdims=True),
      size_SN.sum(1, keepdims=True), between)
  start_SN = jnp.arange(S, dtype=jnp.int32)[:, None] * between + (
      jnp.cumsum(size_SN, 1) - size_SN)
  got_SNg = _tell(count_SNg, inside, 1)
  second = _hop(inside, start_SN.T, size_SN.T, got_SNg.sum(2).T, most)
  got_Og = got_SNg.reshape(owners, each)
  return Route(slot_P, start_O, size_O, got_Og, (first, second), most)


def _hop(
    axis: str,
    start_NC: Int[Array, 'N C'],
    size_NC: Int[Array, 'N C'],
    got_NC: Int[Array, 'N C'],
    most: int,
) -> Hop:
  """C parts from each of N devices to each.

  They come to lie part by part, and of a part device by device.

  Args:
    most: room for each.
  """
  N, C = start_NC.shape
  block_1C = jnp.arange(C, dtype=jnp.int32)[None] * (N * most)
  device_N1 = jnp.arange(N, dtype=jnp.int32)[:, None]
  there_NC = jnp.broadcast_to(
      block_1C + jax.lax.axis_index(axis) * most, (N, C))
  came_NC = block_1C + device_N1 * most
  start_K, *others_K = (a.reshape(-1) for a in (
      start_NC, size_NC, there_NC, came_NC, got_NC))
  return Hop(start_K, *others_K, _tell(start_K, axis), axis, N * C * most)


def send(x_P: Shaped[Array, 'P ...'], way: Route) -> Shaped[Array, 'Q ...']:
  """Rows at their owners, device by device; zeros where none came."""
  if not jnp.issubdtype(x_P.dtype, jnp.inexact):
    return _to_owners(x_P, way)
  return _send(x_P, way)


def back(y_Q: Float[Array, 'Q ...'], way: Route) -> Float[Array, 'P ...']:
  """What owners made of the rows, where these came from; else zeros."""
  return _back(y_Q, way)


class Rows(NamedTuple):
  """Rows where they are worked on.

  Attributes:
    layout: their slots P, on this device.
    send: arrays of this device's tokens [N, ...] -> of those that `layout`
      takes rows of.
    ungroup: (slots [P, ...], weights of the assignment's rows [R]) -> weighted
      sums over the rows of each of this device's tokens.
  """

  layout: dispatch.Layout
  send: Callable[[jax.Array], jax.Array]
  ungroup: Callable[[jax.Array, jax.Array], jax.Array]

  def take(
      self, x_N: Float[Array, 'N ...'], zeros: bool = True
  ) -> Float[Array, 'P ...']:
    """This device's tokens in their slots, as `dispatch.take`."""
    return dispatch.take(self.send(x_N), self.layout, zeros)


def rows(
    row_R: Int[Array, 'R'],
    slot_R: Int[Array, 'R'],
    *,
    num_tokens: int,
    samples: int,
    places: Places,
    align: int,
    choices: int | None,
    most: int,
    numbers: Sequence[Int[Array, 'N']] = (),
) -> Rows:
  """Rows of every group and sample together, at the owner of the group.

  There the groups of the layout are group * n + sample, for its `places.each`
  groups and the n samples of all devices.

  Args:
    row_R: token of each row.
    slot_R: slot of the group * samples + sample, or -1 for none.
    num_tokens, align, choices, numbers: as of `dispatch.group`.
    most: at most so many rows have one owner.
  """
  owners, each = len(places.order_OG), places.each
  if owners == 1:
    layout = dispatch.group(
        row_R, slot_R, num_tokens=num_tokens, num_groups=each * samples,
        align=align, choices=choices, numbers=numbers)
    return Rows(
        layout, lambda x_N: x_N,
        lambda y_P, weight_R: dispatch.ungroup(
            y_P, layout, weight_R, num_tokens))
  home = dispatch.group(
      row_R, slot_R, num_tokens=num_tokens,
      num_groups=owners * each * samples, choices=choices, numbers=numbers)
  way = route(home.group_P, owners, each * samples, most)
  Q = way.arrived
  group_Q = way.groups()
  sample_Q = jnp.arange(Q) // most * samples + group_Q % samples
  group_Q = jnp.where(
      group_Q < 0, -1, group_Q // samples * (owners * samples) + sample_Q)
  away = dispatch.group(
      jnp.arange(Q), group_Q, num_tokens=Q,
      num_groups=each * owners * samples, align=align, choices=1,
      numbers=[send(x_P, way) for x_P in home.numbers])
  sent = lambda x_N: send(dispatch.take(x_N, home), way)
  ungroup = lambda y_P, weight_R: dispatch.ungroup(
      back(dispatch.ungroup(y_P, away, jnp.ones(Q), Q), way), home, weight_R,
      num_tokens)
  return Rows(away, sent, ungroup)


def at_owners(
    fn: Callable[[jax.Array, jax.Array], jax.Array],
    x_PD: Float[Array, 'P D'],
    layout: dispatch.Layout,
    owners: int,
    room: int | None = None,
) -> Float[Array, 'P D']:
  """y = fn(x) with every row worked on by the owner of its group.

  Args:
    fn: (rows [R, D] group by group, their numbers for each of an owner's
      groups) -> rows, each by itself.
    layout: of the rows, by slots of `Places`.
    room: as of `dispatch.group`: all groups have as many rows.
  """
  groups = len(layout.count_G) // owners
  if owners == 1:
    return fn(x_PD, layout.count_G)
  if room is not None:
    shape = (owners, groups, room, -1)
    x_gOPD = _swap(x_PD.reshape(shape)).swapaxes(0, 1)
    y_RD = fn(
        x_gOPD.reshape(groups * owners * room, -1),
        jnp.full(groups, owners * room, jnp.int32))
    y_OgPD = y_RD.reshape(groups, owners, room, -1).swapaxes(0, 1)
    return _swap(y_OgPD).reshape(len(x_PD), -1)

  # Every owners-th row, so that each round has rows of all groups.
  P = len(x_PD)
  split = lambda x, fill: jnp.pad(
      x, ((0, -P % owners), *[(0, 0)] * (x.ndim - 1)), constant_values=fill,
  ).reshape(-1, owners, *x.shape[1:]).swapaxes(0, 1)

  @jax.checkpoint
  def part(both):
    x_RD, slot_R = both
    way = route(slot_R, owners, groups, len(slot_R))
    inner = dispatch.group(
        jnp.arange(way.arrived), way.groups(), num_tokens=way.arrived,
        num_groups=groups, choices=1)
    y_QD = fn(dispatch.take(send(x_RD, way), inner), inner.count_G)
    y_QD = dispatch.ungroup(y_QD, inner, jnp.ones(way.arrived), way.arrived)
    return back(y_QD, way)

  y_ORD = jax.lax.map(part, (split(x_PD, 0), split(layout.group_P, -1)))
  return y_ORD.swapaxes(0, 1).reshape(-1, y_ORD.shape[-1])[:P]


def _tell(x: jax.Array, axis: str, dim: int = 0) -> jax.Array:
  """Part i of x goes to device i; what comes is device by device."""
  return jax.lax.all_to_all(x, axis, dim, dim, tiled=True)


def _swap(x_Q: Shaped[Array, 'Q ...']) -> Shaped[Array, 'Q ...']:
  """Part o of x goes to owner o; what comes is device by device."""
  sizes = sharding.owner_axes()
  x = x_Q.reshape(*[*sizes.values()][:-1], -1, *x_Q.shape[1:])
  for dim, axis in enumerate(sizes):
    x = _tell(x, axis, dim)
  return x.reshape(x_Q.shape)


def _to_owners(x_P, way):
  owners, most = len(way.size_O), way.most
  if _ragged(x_P, way):
    for hop in way.hops:
      x_P = jax.lax.ragged_all_to_all(
          x_P, jnp.zeros((hop.room, *x_P.shape[1:]), x_P.dtype), hop.start_K,
          hop.size_K, hop.there_K, hop.got_K, axis_name=hop.axis)
    return x_P
  i = jnp.arange(most)[None]
  index_OQ = jnp.where(
      i < way.size_O[:, None], way.start_O[:, None] + i, len(x_P))
  x_OQ = x_P.at[index_OQ].get(mode='fill', fill_value=0)
  return _swap(x_OQ).reshape(owners * most, *x_P.shape[1:])


def _from_owners(y_Q, way):
  owners, most = len(way.size_O), way.most
  P = len(way.slot_P)
  if _ragged(y_Q, way):
    rooms = (P, *(hop.room for hop in way.hops))
    for hop, room in reversed(list(zip(way.hops, rooms))):
      y_Q = jax.lax.ragged_all_to_all(
          y_Q, jnp.zeros((room, *y_Q.shape[1:]), y_Q.dtype), hop.came_K,
          hop.got_K, hop.home_K, hop.size_K, axis_name=hop.axis)
    return y_Q
  y_Q = _swap(y_Q)
  owner_P = jnp.maximum(way.slot_P, 0) // way.got_Og.shape[1]
  index_P = owner_P * most + jnp.arange(P) - way.start_O[owner_P]
  index_P = jnp.where(way.slot_P < 0, owners * most, index_P)
  return y_Q.at[index_P].get(mode='fill', fill_value=0)


def _ragged(x: jax.Array, way: Route) -> bool:
  """Whether the devices exchange as many rows as there are.

  Not of a number a row between slices: libtpu makes 1024 of each there, more
  than whole buffers have with fewer owners.
  """
  number = x.ndim == 1 and way.hops[0].axis == sharding.OWNERS[0]
  return common.platform() in ('tpu', 'gpu') and not number


# Each way is the other's transpose.


@jax.custom_vjp
def _send(x_P, way):
  return _to_owners(x_P, way)


@jax.custom_vjp
def _back(y_Q, way):
  return _from_owners(y_Q, way)


_send.defvjp(
    lambda x_P, way: (_to_owners(x_P, way), way),
    lambda way, dx_Q: (_from_owners(dx_Q, way), None))
_back.defvjp(
    lambda y_Q, way: (_from_owners(y_Q, way), way),
    lambda way, dy_P: (_to_owners(dy_P, way), None))
