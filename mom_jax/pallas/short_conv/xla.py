"""short_conv as shifted sums, on any device."""

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.short_conv.parts import UNIT_EPS, each


def _fwd(xs, conv_WF, bias_F, reach_R, *, parts):
  return each(_through, xs, conv_WF, bias_F, reach_R, parts=parts)


def _through(p, x_RF, conv_WF, bias_F, reach_R):
  reach_R1 = reach_R[:, None]
  dtype, x_RF = x_RF.dtype, x_RF.astype(jnp.float32)
  c_RF = x_RF
  if conv_WF is not None:
    W = len(conv_WF)
    c_RF = x_RF * conv_WF[-1][None]
    for j in range(1, W):
      before_RF = jnp.pad(x_RF, ((j, 0), (0, 0)))[:len(x_RF)]
      c_RF += jnp.where(reach_R1 >= j, before_RF, 0) * conv_WF[W - 1 - j][None]
  if bias_F is not None:
    c_RF += bias_F[None]
  y_RF = jax.nn.silu(c_RF) if p.silu else c_RF
  if p.unit:
    y_RHK = y_RF.reshape(len(y_RF), -1, p.unit)
    square_RH1 = jnp.square(y_RHK).sum(2, keepdims=True)
    y_RF = (y_RHK * jax.lax.rsqrt(square_RH1 + UNIT_EPS)).reshape(y_RF.shape)
  return jnp.where(reach_R1 < 0, 0, y_RF).astype(dtype)


def _bwd(xs, conv_WF, bias_F, reach_R, dys, *, parts):
  run = lambda *args: _fwd(*args, reach_R, parts=parts)
  return jax.vjp(run, xs, conv_WF, bias_F)[1](dys)


BACKEND = common.Backend('xla', common.everywhere, _fwd, _bwd)
