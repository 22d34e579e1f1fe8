"""What the rows of a part of the tokens need of the parts before it.

Where a sequence is split over devices, each groups the rows of its own part. A
memory's rows go on there from those of the parts before: their number in the
document, for places; the last few, for convolution and token shift; and the
state (`rules.context`). To be called inside `per_device.batch_local`; every
device learns a few numbers, or rows, of each group from all others.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mom_jax.models import rows
from mom_jax.parallel import sharding
from mom_jax.routing import dispatch


def past(
    layout: dispatch.Layout, segment_P: Int[Array, ' P']
) -> tuple[rows.Past, Bool[Array, ' G']]:
  """(what each group did before, whether its first row here goes on with it).

  A group without rows here goes on, so that what was before passes through.
  """
  place_P = rows.place(layout, segment_P, None)
  has_G = layout.count_G > 0
  last_G = jnp.maximum(layout.start_G + layout.count_G - 1, 0)
  mine = (has_G, segment_P[layout.start_G % len(segment_P)],
          segment_P[last_G], place_P[last_G] + 1)

  def after(before, part):
    segment_G, count_G = before
    has_G, first_G, last_G, rows_G = part
    going_G = (first_G == last_G) & (first_G == segment_G)
    rows_G = rows_G + jnp.where(going_G, count_G, 0)
    return (jnp.where(has_G, last_G, segment_G),
            jnp.where(has_G, rows_G, count_G)), before

  nothing = (jnp.full_like(mine[1], -1), jnp.zeros_like(mine[3]))
  every = jax.lax.all_gather(mine, sharding.CONTEXT_AXIS)
  _, before = jax.lax.scan(after, nothing, every)
  me = jax.lax.axis_index(sharding.CONTEXT_AXIS)
  segment_G, count_G = jax.tree.map(lambda x: x[me], before)
  return rows.Past(count_G, segment_G), ~has_G | (mine[1] == segment_G)


def window(
    u_PF: Float[Array, 'P F'],
    w: int,
    layout: dispatch.Layout,
    segment_P: Int[Array, ' P'],
) -> rows.Window:
  """The last w rows of u of each group in the parts before, as they come."""
  place_GW = layout.count_G[:, None] - jnp.arange(w, 0, -1)[None]
  at_GW = jnp.maximum(layout.start_G[:, None] + place_GW, 0)
  mine = (jnp.where((place_GW >= 0)[..., None], u_PF[at_GW], 0),
          jnp.where(place_GW >= 0, segment_P[at_GW], -1))
  u, segment = jax.lax.all_gather(mine, sharding.CONTEXT_AXIS, axis=1)
  n = segment.shape[1]
  earlier_n = jnp.arange(n) < jax.lax.axis_index(sharding.CONTEXT_AXIS)
  segment = jnp.where(earlier_n[None, :, None], segment, -1)
  segment = segment.reshape(len(segment), n * w)
  # Rows that are there come last, in order.
  newest_GW = jnp.argsort(segment >= 0, axis=1, stable=True)[:, -w:]
  segment_GW = jnp.take_along_axis(segment, newest_GW, 1)
  u_GWF = jnp.take_along_axis(
      u.reshape(len(u), n * w, -1), newest_GW[..., None], 1)
  return rows.Window(
      jnp.where((segment_GW >= 0)[..., None], u_GWF, 0), segment_GW)
