"""Rows that a memory took before the rows at hand.

Memories continue where their earlier rows ended. Those lie nowhere (training on
one device), in a cache (prefill, decoding) or on other devices (context
parallelism). `Past` hides the difference from the layer.

Positions P of a layout hold each memory's rows in order (`routing.dispatch`). A
row of another document, or before a memory's first, counts as zero.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax.parallel import sharding
from mom_jax.routing import dispatch

# Decode cache of a layer's memories, see `Mom.init_cache`.
Cache = dict[str, jax.Array]


class Window(NamedTuple):
  """The last rows before those at hand, W of each group."""

  u_GWF: jax.Array
  segment_GW: jax.Array | None  # their documents; None is that of any row


@dataclasses.dataclass(frozen=True)
class Past:
  """Earlier rows of each memory: their counts, documents, last rows and state.

  Attributes:
    layout: of the rows at hand; its groups are memory * B + sample.
    segment_P: their documents, 0 for none. With a cache all rows continue one.
    count_G: rows of its newest document that a group took; None is an empty
      past.
    segment_G: that document; None is that of any row.
    continues_G: under context parallelism, True if a group's first local row
      belongs to the document of the rows before, or if it has no local rows, so
      that its state passes through; None otherwise.
    cache: if there is one, [B, G, ...] each, G = M + shared.
  """

  layout: dispatch.Layout
  segment_P: jax.Array
  count_G: jax.Array | None = None
  segment_G: jax.Array | None = None
  continues_G: jax.Array | None = None
  cache: Cache | None = None

  @property
  def is_empty(self) -> bool:
    """True if there are no earlier rows."""
    return self.count_G is None

  @functools.cached_property
  def position_in_memory(self) -> Int[Array, ' P']:
    """Number of rows of its document that its memory took before each row."""
    position_P = _position_here(self.layout, self.segment_P)
    if self.count_G is not None:
      group_P = jnp.maximum(self.layout.group_P, 0)
      count_P = self.count_G[group_P]
      if self.segment_G is not None:
        count_P = jnp.where(
            self.segment_P == self.segment_G[group_P], count_P, 0)
      position_P += count_P
    return jnp.where(self.segment_P > 0, position_P, 0)

  @property
  def state_GHKV(self) -> jax.Array | None:
    """States to continue from, of group sample * G + memory."""
    if self.cache is None:
      return None
    state_BGHKV = self.cache['state_BGHKV']
    return state_BGHKV.reshape(-1, *state_BGHKV.shape[2:])

  def before(
      self, x_PD: Float[Array, 'P D'], name: str
  ) -> Float[Array, 'P D']:
    """Return the row before each row.

    Args:
      name: of the cached window of x.
    """
    return _shifted(
        x_PD, 1, self.layout, self.segment_P, self._window(name, x_PD, 1))

  def convolve(
      self, u_PF: Float[Array, 'P F'], conv_WF: Float[Array, 'W F'], name: str
  ) -> Float[Array, 'P F']:
    """Convolve each memory's own rows, causally and per channel.

      c_p = sum_j conv[W - 1 - j] * u_{p - j}

    Args:
      name: of the cached window of u.
    """
    W = len(conv_WF)
    window = self._window(name, u_PF, W - 1)
    c_PF = u_PF.astype(jnp.float32) * conv_WF[-1][None]
    for j in range(1, W):
      c_PF += _shifted(
          u_PF.astype(jnp.float32), j, self.layout, self.segment_P, window
      ) * conv_WF[W - 1 - j][None]
    return c_PF

  def cache_after(
      self, windows: dict[str, jax.Array | None], state_GHKV: jax.Array
  ) -> Cache | None:
    """Return the cache with the rows at hand in it, or None without one.

    Args:
      windows: by name in the cache, rows [P, F] whose last it holds; None where
        the layer has no such window.
      state_GHKV: last states, in the order of `state_GHKV`.
    """
    if self.cache is None:
      return None
    state_BGHKV = self.cache['state_BGHKV']
    new = {
        name: _last_rows(u_PF, self.layout, memory_major(self.cache[name]))
        for name, u_PF in windows.items() if u_PF is not None
    } | {'count_BG': self.count_G + self.layout.count_G}
    return {
        name: batch_major(a, len(state_BGHKV)) for name, a in new.items()
    } | {'state_BGHKV': state_GHKV.reshape(state_BGHKV.shape)}

  def _window(self, name, u_PF, w) -> Window | None:
    """Find the last w rows of u before those at hand."""
    if self.cache is not None:
      return Window(memory_major(self.cache[name]), None)
    if self.is_empty:
      return None
    return _window_of_neighbours(u_PF, w, self.layout, self.segment_P)


def past_of(
    layout: dispatch.Layout,
    segment_P: Int[Array, ' P'],
    cache: Cache | None,
) -> Past:
  """Make the past of the rows at hand, wherever it lies."""
  if cache is not None:
    return Past(
        layout, jnp.minimum(segment_P, 1), memory_major(cache['count_BG']),
        cache=cache)
  if sharding.axis_size('time') > 1:
    return _past_of_neighbours(layout, segment_P)
  return Past(layout, segment_P)


def memory_major(x_BG: jax.Array) -> jax.Array:
  """Reorder [B, G, ...] to [G * B, ...], memory by memory."""
  B, G, *rest = x_BG.shape
  return x_BG.swapaxes(0, 1).reshape(G * B, *rest)


def batch_major(x_G: jax.Array, B: int) -> jax.Array:
  """Reorder [G * B, ...], memory by memory, to [B, G, ...]."""
  return x_G.reshape(len(x_G) // B, B, *x_G.shape[1:]).swapaxes(0, 1)


def token_before(
    x_BTD: Float[Array, 'B T D'],
    segment_BT: Int[Array, 'B T'],
    last_BD: Float[Array, 'B D'] | None,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D'] | None]:
  """Find the token before each in its document, skipping padding.

  Args:
    last_BD: the last token so far, or None; with it, all tokens are of one
      document.
  Returns:
    (x of the token before, the new last token or None).
  """
  T = x_BTD.shape[1]
  real_BT = segment_BT > 0
  seen_BT = jax.lax.cummax(
      jnp.where(real_BT, jnp.arange(T)[None], -1), axis=1)
  index_BT = jnp.pad(seen_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  at_BT = jnp.maximum(index_BT, 0)
  before_BTD = jnp.take_along_axis(x_BTD, at_BT[..., None], 1)
  same_BT = jnp.take_along_axis(segment_BT, at_BT, 1) == segment_BT
  first_BT1 = (index_BT < 0)[..., None]
  if last_BD is None:
    keep_BT1 = (same_BT & real_BT)[..., None] & ~first_BT1
    return jnp.where(keep_BT1, before_BTD, 0), None
  before_BTD = jnp.where(first_BT1, last_BD[:, None], before_BTD)
  newest_B1 = seen_BT[:, -1:]
  newest_BD = jnp.take_along_axis(
      x_BTD, jnp.maximum(newest_B1, 0)[..., None], 1)[:, 0]
  return before_BTD, jnp.where(newest_B1 >= 0, newest_BD, last_BD)


def _position_here(layout, segment_P):
  """Count the rows at hand of the same document before each row."""
  position_P = jnp.arange(len(segment_P))
  changes = lambda x_P: x_P != jnp.pad(x_P, (1, 0), constant_values=-2)[:-1]
  begin_P = changes(layout.group_P) | changes(segment_P)
  return position_P - jax.lax.cummax(jnp.where(begin_P, position_P, 0))


def _shifted(u_PF, j, layout, segment_P, window: Window | None):
  """Return u of the j-th row before each row."""
  group_P = jnp.maximum(layout.group_P, 0)
  index_P = jnp.arange(len(u_PF)) - layout.start_G[group_P]
  before_PF = jnp.pad(u_PF, ((j, 0), (0, 0)))[:-j]
  same_P = segment_P == jnp.pad(segment_P, (j, 0))[:-j]
  inside_P = index_P >= j
  before_PF = jnp.where((inside_P & same_P)[:, None], before_PF, 0)
  if window is not None:
    w = window.u_GWF.shape[1]
    at_P = jnp.minimum(w - j + index_P, w - 1)
    mine_P = segment_P > 0
    if window.segment_GW is not None:
      mine_P &= segment_P == window.segment_GW[group_P, at_P]
    window_PF = jnp.where(mine_P[:, None], window.u_GWF[group_P, at_P], 0)
    before_PF = jnp.where(inside_P[:, None], before_PF, window_PF)
  return before_PF


def _last_rows(u_PF, layout, window_GWF):
  """Return the last w rows of every group, old ones where it got fewer."""
  w = window_GWF.shape[1]
  if not w:
    return window_GWF
  index_GW = layout.count_G[:, None] - jnp.arange(w, 0, -1)[None]
  new_GWF = u_PF[jnp.maximum(layout.start_G[:, None] + index_GW, 0)]
  # Group g keeps its newest w - count old rows, moved to the front.
  old_GW = jnp.clip(w + index_GW, 0, w - 1)
  old_GWF = jnp.take_along_axis(window_GWF, old_GW[..., None], 1)
  return jnp.where(index_GW[..., None] >= 0, new_GWF, old_GWF)


# Context parallelism. Each device groups the rows of its own part of the time;
# it gets a few integers, or rows, of each group from all others.


def _past_of_neighbours(layout, segment_P) -> Past:
  """Make the past from counts and documents of the devices before."""
  position_P = Past(layout, segment_P).position_in_memory
  has_G = layout.count_G > 0
  last_G = jnp.maximum(layout.start_G + layout.count_G - 1, 0)
  mine = (has_G, segment_P[layout.start_G % len(segment_P)],
          segment_P[last_G], position_P[last_G] + 1)

  def add_part(before, part):
    segment_G, count_G = before
    has_G, first_G, last_G, rows_G = part
    continues_G = (first_G == last_G) & (first_G == segment_G)
    rows_G = rows_G + jnp.where(continues_G, count_G, 0)
    return (jnp.where(has_G, last_G, segment_G),
            jnp.where(has_G, rows_G, count_G)), before

  nothing = (jnp.full_like(mine[1], -1), jnp.zeros_like(mine[3]))
  every = jax.lax.all_gather(mine, sharding.CONTEXT_AXIS)
  _, before = jax.lax.scan(add_part, nothing, every)
  me = jax.lax.axis_index(sharding.CONTEXT_AXIS)
  segment_G, count_G = jax.tree.map(lambda x: x[me], before)
  return Past(
      layout, segment_P, count_G, segment_G, ~has_G | (mine[1] == segment_G))


def _window_of_neighbours(u_PF, w, layout, segment_P) -> Window:
  """Collect the last w rows of u of each group on the devices before."""
  index_GW = layout.count_G[:, None] - jnp.arange(w, 0, -1)[None]
  at_GW = jnp.maximum(layout.start_G[:, None] + index_GW, 0)
  mine = (jnp.where((index_GW >= 0)[..., None], u_PF[at_GW], 0),
          jnp.where(index_GW >= 0, segment_P[at_GW], -1))
  u, segment = jax.lax.all_gather(mine, sharding.CONTEXT_AXIS, axis=1)
  n = segment.shape[1]
  earlier_n = jnp.arange(n) < jax.lax.axis_index(sharding.CONTEXT_AXIS)
  segment = jnp.where(earlier_n[None, :, None], segment, -1)
  segment = segment.reshape(len(segment), n * w)
  # Rows that exist come last, in order.
  newest_GW = jnp.argsort(segment >= 0, axis=1, stable=True)[:, -w:]
  segment_GW = jnp.take_along_axis(segment, newest_GW, 1)
  u_GWF = jnp.take_along_axis(
      u.reshape(len(u), n * w, -1), newest_GW[..., None], 1)
  return Window(
      jnp.where((segment_GW >= 0)[..., None], u_GWF, 0), segment_GW)
