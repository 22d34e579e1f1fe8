"""RWKV: token shift, decay per channel, a bonus for the current token.

Token shift mixes the input of a projection with the previous row:
x + (x_prev - x) m, where x_prev is the previous row of the same memory and
document, as for the short convolution.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import initializers
from mom_jax.rules.rule import Constant, Gate, Operands, Rule, l2_normalise


def _channels(shape):
  """A ramp from 0 to 1 over all channels of [H, K]."""
  H, K = shape
  n = H * K
  return jnp.arange(n, dtype=jnp.float32).reshape(H, K) / max(1, n - 1)


# rwkv6: o_t = r_t (S_{t-1} + (u * k_t)^T v_t); S_t = diag(exp(w_t)) S_{t-1} +
# k_t^T v_t with w_t = -exp(w_0 + tanh(x W_1) W_2), W_1 of rank 64, r, k, v
# projections of shifted rows with data-dependent coefficients, scale 1. A row
# costs 4 K V operations per head, and a few V for the bonus u. Published with
# group norm and SiLU gate (Eagle and Finch, arXiv 2404.05892, eq. 16 to 22;
# initial values of w_0, u and the coefficients as in the official repository).


def _rwkv6(q_RHK, k_RHK, v_RHV, gates, constants):
  decay_RHK = -jnp.exp(gates['decay'] + constants['w0'][None])
  bonus_RH1 = jnp.einsum(
      'rhk,hk,rhk->rh', q_RHK.astype(jnp.float32), constants['bonus'],
      k_RHK.astype(jnp.float32))[..., None]
  return Operands(
      q_RHK, k_RHK, v_RHV, decay_RHK,
      skip_RHV=bonus_RH1 * v_RHV.astype(jnp.float32))


def _w6(key, shape, layer_fraction):
  del key
  return -6 + 5 * _channels(shape) ** (0.7 + 1.3 * layer_fraction)


def _bonus6(key, shape, layer_fraction):
  del key
  n = jnp.arange(shape[0] * shape[1]).reshape(shape)
  zigzag = (((n + 1) % 3) - 1) * 0.1
  return layer_fraction * (1 - _channels(shape)) + zigzag


def _coefficients6(name, D, layer_fraction):
  rest = 1 - layer_fraction
  ramp_D = jnp.arange(D, dtype=jnp.float32) / D
  if name in ('query', 'output'):
    return 1 - ramp_D ** (0.5 * rest)
  return 1 - ramp_D**rest - (0.3 * layer_fraction if name == 'value' else 0)


RWKV6 = Rule(
    {'decay': Gate('key', rank=lambda D, K, V: 64, activation=jnp.tanh)},
    {'w0': Constant('key', _w6), 'bonus': Constant('key', _bonus6)},
    _rwkv6, scale=1.0, silu='', single_update=True, exclusive=True,
    shift='data', shift_coefficients=_coefficients6,
)

# rwkv7: S_t = (diag(w_t) - (a_t * c_t)^T c_t) S_{t-1} + k'_t^T v_t, with the
# removal on the state before it decays, w = exp(-e^-0.5 sigmoid(w_0 +
# tanh(x W_1) W_2)), a = sigmoid(a_0 + x A_1 A_2), c = k * k_k l2-normalised and
# k' = k * (1 + (a - 1) * k_a); o_t = r_t S_t with scale 1, and
# (r_t . (r_k * k'_t)) v_t is added after the norm. Coefficients of the token
# shift are learned. A token is two rows of `chunk_memory`, one that removes and
# one that writes: 8 K V operations per head. Values of later layers are
# v + (v_first - v) sigmoid(v_0 + x V_1 V_2), v_first the token's values in the
# first layer. Published with group norm and the gate sigmoid(x G_1) G_2 (Goose,
# arXiv 2503.14456, eq. 1 to 19; initial values as in the official repository).

_HALF = -0.6065306597126334  # -e^-0.5


def _rwkv7(q_RHK, k_RHK, v_RHV, gates, constants):
  c = {name: constants[name][None] for name in (
      'w0', 'a0', 'k_k', 'k_a', 'r_k')}
  k_RHK = k_RHK.astype(jnp.float32)
  decay_RHK = _HALF * jax.nn.sigmoid(gates['decay'] + c['w0'])
  a_RHK = jax.nn.sigmoid(gates['rate'] + c['a0'])
  removal_key_RHK = l2_normalise(k_RHK * c['k_k'])
  k_RHK = k_RHK * (1 + (a_RHK - 1) * c['k_a'])
  bonus_RH1 = (q_RHK.astype(jnp.float32) * k_RHK * c['r_k']).sum(
      -1, keepdims=True)

  def interleave(removing, writing):
    return jnp.stack([removing, writing], 1).reshape(-1, *removing.shape[1:])

  # Removed is exp(-w) c S', with S' = exp(w) S: decays are above e^-0.61.
  return Operands(
      q_RHK,
      interleave(a_RHK * removal_key_RHK, k_RHK).astype(q_RHK.dtype),
      interleave(jnp.zeros_like(v_RHV), v_RHV), decay_RHK,
      removal_key_RHK=interleave(
          removal_key_RHK * jnp.exp(-decay_RHK),
          jnp.zeros_like(removal_key_RHK)),
      skip_RHV=bonus_RH1 * v_RHV.astype(jnp.float32),
  )


def _zigzag(shape):
  """A curve from -1 to 1 over each head's channels, flat in the middle."""
  K = shape[-1]
  x_K = (jnp.arange(K) - (K - 1) / 2) / max(0.5, (K - 1) / 2)
  return jnp.broadcast_to((x_K * jnp.abs(x_K))[None], shape)


def _w7(key, shape, layer_fraction):
  del key
  ramp_HK = -6 + 6 * _channels(shape) ** (1 + layer_fraction**0.3)
  return ramp_HK + 0.5 + 2.5 * _zigzag(shape)


def _a7(key, shape, layer_fraction):
  del key, layer_fraction
  return -0.19 + 0.3 * _zigzag(shape) + 0.4 * (_channels(shape) - 0.5)


def _coefficients7(name, D, layer_fraction):
  power = {'query': 0.2, 'output': 0.2, 'key': 0.7, 'value': 0.7}
  ramp_D = jnp.arange(D, dtype=jnp.float32) / D
  return 1 - ramp_D ** (power.get(name, 0.9) * (1 - layer_fraction))


def _rank7(factor):
  """The rank of a low-rank projection, a multiple of 32."""
  def rank(D, K, V):
    del V
    return max(32, 32 * round(factor * D**0.5 * max(1, K / 64) / 32))
  return rank


RWKV7 = Rule(
    {'decay': Gate('key', rank=_rank7(2.5), activation=jnp.tanh),
     'rate': Gate('key', rank=_rank7(2.5)),
     'first': Gate('value', rank=_rank7(1.7), input_of='value')},
    {'w0': Constant('key', _w7), 'a0': Constant('key', _a7),
     'k_k': Constant(
         'key',
         lambda key, shape, layer_fraction: 0.76 - 0.1 * _channels(shape)),
     'k_a': Constant('key', initializers.full(1.02)),
     'r_k': Constant('key', initializers.full(-0.04)),
     'first_bias': Constant(
         'value',
         lambda key, shape, layer_fraction: 0.93 - 0.4 * _channels(shape))},
    _rwkv7, removes=True, scale=1.0, silu='', single_update=True,
    skip_after_norm=True, shift='learned', shift_coefficients=_coefficients7,
    v_first_gate='first',
    macs=lambda K, V: 4 * K * V,
)
