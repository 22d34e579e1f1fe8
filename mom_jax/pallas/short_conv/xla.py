"""short_conv as shifted sums, on any device.

All convolved columns run side by side, so that XLA compiles one convolution,
not one per part.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax.pallas import common
from mom_jax.pallas.short_conv.parts import L2_EPS, columns


def _fwd(xs, conv_WF, bias_F, reach_R, *, parts):
  convolved = [c for c in columns(parts) if c.part.conv]
  x_RF = jnp.concatenate([xs[c.array][:, c.span] for c in convolved], 1)
  c_RF = _shifted_sum(x_RF.astype(jnp.float32), conv_WF, bias_F, reach_R)
  y_RF = _silu(c_RF, [c.part for c in convolved])
  dtype, y_RF = x_RF.dtype, jnp.where(reach_R[:, None] < 0, 0, y_RF)
  ys = []
  for c in columns(parts):
    if c.part.conv:
      y = _l2_normalised(y_RF[:, c.tap:c.tap + c.part.width], c.part.l2_dim)
      ys.append(y.astype(dtype))
    else:
      ys.append(xs[c.array][:, c.span])
  return tuple(ys)


def _shifted_sum(x_RF, conv_WF, bias_F, reach_R):
  """Convolve over the rows that each row sees, and add the bias."""
  c_RF = x_RF
  if conv_WF is not None:
    conv_WF, W = conv_WF.astype(jnp.float32), len(conv_WF)
    c_RF = x_RF * conv_WF[-1][None]
    for j in range(1, W):
      before_RF = jnp.pad(x_RF, ((j, 0), (0, 0)))[:len(x_RF)]
      before_RF = jnp.where(reach_R[:, None] >= j, before_RF, 0)
      c_RF += before_RF * conv_WF[W - 1 - j][None]
  return c_RF if bias_F is None else c_RF + bias_F.astype(jnp.float32)[None]


def _silu(c_RF, parts):
  """SiLU on the columns of the parts that ask for it."""
  on_F = np.repeat([p.silu for p in parts], [p.width for p in parts])
  if not on_F.any():
    return c_RF
  y_RF = jax.nn.silu(c_RF)
  return y_RF if on_F.all() else jnp.where(on_F[None], y_RF, c_RF)


def _l2_normalised(y_RF, l2_dim):
  if not l2_dim:
    return y_RF
  y_RHK = y_RF.reshape(len(y_RF), -1, l2_dim)
  square_RH1 = jnp.square(y_RHK).sum(2, keepdims=True)
  return (y_RHK * jax.lax.rsqrt(square_RH1 + L2_EPS)).reshape(y_RF.shape)


def _bwd(xs, conv_WF, bias_F, reach_R, dys, *, parts):
  run = lambda *args: _fwd(*args, reach_R, parts=parts)
  return jax.vjp(run, xs, conv_WF, bias_F)[1](dys)


BACKEND = common.Backend('xla', common.anywhere, _fwd, _bwd)
