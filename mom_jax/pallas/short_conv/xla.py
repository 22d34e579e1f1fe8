"""short_conv as shifted sums, on any device."""

import jax
import jax.numpy as jnp

from mom_jax.pallas import common
from mom_jax.pallas.short_conv.parts import L2_EPS, map_convolved


def _fwd(xs, conv_WF, bias_F, reach_R, *, parts):
  return map_convolved(_shifted_sum, xs, conv_WF, bias_F, reach_R, parts=parts)


def _shifted_sum(p, x_RF, conv_WF, bias_F, reach_R):
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
  if p.l2_dim:
    y_RHK = y_RF.reshape(len(y_RF), -1, p.l2_dim)
    square_RH1 = jnp.square(y_RHK).sum(2, keepdims=True)
    y_RF = (y_RHK * jax.lax.rsqrt(square_RH1 + L2_EPS)).reshape(y_RF.shape)
  return jnp.where(reach_R1 < 0, 0, y_RF).astype(dtype)


def _bwd(xs, conv_WF, bias_F, reach_R, dys, *, parts):
  run = lambda *args: _fwd(*args, reach_R, parts=parts)
  return jax.vjp(run, xs, conv_WF, bias_F)[1](dys)


BACKEND = common.Backend('xla', common.anywhere, _fwd, _bwd)
