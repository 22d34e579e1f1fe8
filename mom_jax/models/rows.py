"""What rows see of the rows before them, in their memory or in the stream.

Slots P hold each memory's own rows in order (`dispatch`); a row of another
document, or before a memory's first, counts as zero. Rows before the first are
the last ones of a window: of a cache's, or of those of the devices that have
the tokens before (`context`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax.routing import dispatch


class Past(NamedTuple):
  """What groups did before the rows at hand."""

  count_G: jax.Array  # rows of their newest document
  segment_G: jax.Array | None  # that document; None is that of any row


class Window(NamedTuple):
  """The last rows before those at hand."""

  u_GWF: jax.Array
  segment_GW: jax.Array | None  # their documents; None is that of any row


def place(
    layout: dispatch.Layout,
    segment_P: Int[Array, ' P'],
    past: Past | None,
) -> Int[Array, ' P']:
  """Rows of its document that its memory took before each row."""
  slot_P = jnp.arange(len(segment_P))
  changes = lambda x_P: x_P != jnp.pad(x_P, (1, 0), constant_values=-2)[:-1]
  begin_P = changes(layout.group_P) | changes(segment_P)
  first_P = jax.lax.cummax(jnp.where(begin_P, slot_P, 0))
  place_P = slot_P - first_P
  if past is not None:
    group_P = jnp.maximum(layout.group_P, 0)
    count_P = past.count_G[group_P]
    if past.segment_G is not None:
      count_P = jnp.where(segment_P == past.segment_G[group_P], count_P, 0)
    place_P += count_P
  return jnp.where(segment_P > 0, place_P, 0)


def before(
    u_PF: Float[Array, 'P F'],
    j: int,
    layout: dispatch.Layout,
    segment_P: Int[Array, ' P'],
    window: Window | None,
) -> Float[Array, 'P F']:
  """u of the j-th row before each row."""
  group_P = jnp.maximum(layout.group_P, 0)
  place_P = jnp.arange(len(u_PF)) - layout.start_G[group_P]
  before_PF = jnp.pad(u_PF, ((j, 0), (0, 0)))[:-j]
  same_P = segment_P == jnp.pad(segment_P, (j, 0))[:-j]
  inside_P = place_P >= j
  before_PF = jnp.where((inside_P & same_P)[:, None], before_PF, 0)
  if window is not None:
    w = window.u_GWF.shape[1]
    at_P = jnp.minimum(w - j + place_P, w - 1)
    mine_P = segment_P > 0
    if window.segment_GW is not None:
      mine_P &= segment_P == window.segment_GW[group_P, at_P]
    cached_PF = jnp.where(mine_P[:, None], window.u_GWF[group_P, at_P], 0)
    before_PF = jnp.where(inside_P[:, None], before_PF, cached_PF)
  return before_PF


def short_conv(
    u_PF: Float[Array, 'P F'],
    conv_WF: Float[Array, 'W F'],
    layout: dispatch.Layout,
    segment_P: Int[Array, ' P'],
    window: Window | None,
) -> Float[Array, 'P F']:
  """Causal depthwise convolution along each memory's own rows.

    c_p = sum_j conv[W - 1 - j] * u_{p - j}
  """
  W = conv_WF.shape[0]
  c_PF = u_PF * conv_WF[-1][None]
  for j in range(1, W):
    c_PF += before(u_PF, j, layout, segment_P, window) * conv_WF[
        W - 1 - j][None]
  return c_PF


def last_inputs(
    u_PF: Float[Array, 'P F'],
    layout: dispatch.Layout,
    window_GWF: Float[Array, 'G w F'],
) -> Float[Array, 'G w F']:
  """The last w inputs of every group, old ones where it got fewer."""
  w = window_GWF.shape[1]
  if not w:
    return window_GWF
  back_W = jnp.arange(w, 0, -1)
  place_GW = layout.count_G[:, None] - back_W[None]
  new_GWF = u_PF[jnp.maximum(layout.start_G[:, None] + place_GW, 0)]
  # Group g keeps its newest w - count old inputs, moved to the front.
  old_GW = jnp.clip(w + place_GW, 0, w - 1)
  old_GWF = jnp.take_along_axis(window_GWF, old_GW[..., None], 1)
  return jnp.where(place_GW[..., None] >= 0, new_GWF, old_GWF)


def token_before(
    x_BTD: Float[Array, 'B T D'],
    segment_BT: Int[Array, 'B T'],
    last_BD: Float[Array, 'B D'] | None,
) -> tuple[Float[Array, 'B T D'], Float[Array, 'B D'] | None]:
  """The token before each in its document, padding skipped.

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
