"""SwiGLU of two arrays and its cotangents, computed in float32."""

import jax
import jax.numpy as jnp


def swiglu(gate, up):
  """silu(gate) * up, in gate's dtype."""
  wide = gate.astype(jnp.float32)
  h = wide * jax.nn.sigmoid(wide) * up.astype(jnp.float32)
  return h.astype(gate.dtype)


def swiglu_back(gate, up, dh):
  """Cotangents of gate and up, in their dtype."""
  dtype = gate.dtype
  gate, up, dh = (x.astype(jnp.float32) for x in (gate, up, dh))
  s = jax.nn.sigmoid(gate)
  dgate = dh * up * s * (1 + gate * (1 - s))
  return dgate.astype(dtype), (dh * gate * s).astype(dtype)
