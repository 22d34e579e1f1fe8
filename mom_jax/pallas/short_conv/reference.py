"""short_conv row by row in float32: the definition."""

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.short_conv.parts import L2_EPS, map_convolved


def short_conv_ref(xs, conv_WF, bias_F, reach_R, *, parts):
  """Scan the rows of each part with a window of the last W rows."""
  return map_convolved(_scan, xs, conv_WF, bias_F, reach_R, parts=parts)


def _scan(p, x_RF, conv_WF, bias_F, reach_R):
  if conv_WF is None:
    conv_WF = jnp.ones((1, p.width))
  W = len(conv_WF)

  def step(window_WF, row):
    x_F, reach = row
    window_WF = jnp.concatenate([window_WF[1:], x_F[None]])
    seen_W = jnp.arange(W)[::-1] <= reach  # the last is the row itself
    c_F = (jnp.where(seen_W[:, None], window_WF, 0) * conv_WF).sum(0)
    c_F += 0 if bias_F is None else bias_F
    y_F = jax.nn.silu(c_F) if p.silu else c_F
    if p.l2_dim:
      y_HK = y_F.reshape(-1, p.l2_dim)
      length_H1 = jnp.sqrt((y_HK * y_HK).sum(1, keepdims=True) + L2_EPS)
      y_F = (y_HK / length_H1).reshape(-1)
    return window_WF, jnp.where(reach < 0, 0, y_F)

  initial = common.zeros((W, p.width), jnp.float32, x_RF)
  rows = (x_RF.astype(jnp.float32), reach_R)
  return jax.lax.scan(step, initial, rows)[1].astype(x_RF.dtype)


def _bwd(xs, conv_WF, bias_F, reach_R, dys, *, parts):
  run = lambda *args: short_conv_ref(*args, reach_R, parts=parts)
  return jax.vjp(run, xs, conv_WF, bias_F)[1](dys)


BACKEND = common.Backend('reference', common.anywhere, short_conv_ref, _bwd)
