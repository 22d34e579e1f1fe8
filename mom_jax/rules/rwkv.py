"""RWKV: maps of mixed neighbours, decays per channel, bonus of the own token.

What a map reads is mixed with the row before it, x + (x_before - x) m, where
"before" is the row before in the same memory and document, as for the short
convolution.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax.rules import gates as parts
from mom_jax.rules.rule import Constant, Gate, Operands, Rule, l2_normalise


def _channels(shape):
  """0 .. 1 over all channels of [H, K], head after head."""
  H, K = shape
  n = H * K
  return jnp.arange(n, dtype=jnp.float32).reshape(H, K) / max(1, n - 1)


# rwkv6: o_t = r_t (S_{t-1} + (u * k_t)^T v_t); S_t = diag(exp(w_t)) S_{t-1} +
# k_t^T v_t with w_t = -exp(w_0 + tanh(x W_1) W_2), W_1 of 64 columns, r, k, v
# the maps of shifted rows whose shares depend on the data, read with scale 1.
# A row costs 4 K V operations a head, and a few V for the bonus u. Published
# with group norm and SiLU gate (Eagle and Finch, arXiv 2404.05892, eq. 16 to
# 22; first values of w_0, u and the shares as in the official repository).


def _rwkv6(q_RHK, k_RHK, v_RHV, gates, constants):
  decay_RHK = -jnp.exp(gates['decay'] + constants['w0'][None])
  own_RH1 = jnp.einsum(
      'rhk,hk,rhk->rh', q_RHK.astype(jnp.float32), constants['bonus'],
      k_RHK.astype(jnp.float32))[..., None]
  return Operands(
      q_RHK, k_RHK, v_RHV, decay_RHK,
      skip_RHV=own_RH1 * v_RHV.astype(jnp.float32))


def _w6(key, shape, depth):
  del key
  return -6 + 5 * _channels(shape) ** (0.7 + 1.3 * depth)


def _bonus6(key, shape, depth):
  del key
  n = jnp.arange(shape[0] * shape[1]).reshape(shape)
  zigzag = (((n + 1) % 3) - 1) * 0.1
  return depth * (1 - _channels(shape)) + zigzag


def _shares6(name, D, depth):
  rest = 1 - depth
  ramp_D = jnp.arange(D, dtype=jnp.float32) / D
  if name in ('query', 'output'):
    return 1 - ramp_D ** (0.5 * rest)
  return 1 - ramp_D**rest - (0.3 * depth if name == 'value' else 0)


RWKV6 = Rule(
    {'decay': Gate('key', rank=lambda D, K, V: 64, inner=jnp.tanh)},
    {'w0': Constant('key', _w6), 'bonus': Constant('key', _bonus6)},
    _rwkv6, scale=1.0, silu='', one_write=True, read_before=True, shift='data',
    shares=_shares6,
)

# rwkv7: S_t = (diag(w_t) - (a_t * c_t)^T c_t) S_{t-1} + k'_t^T v_t, the erasing
# on the state before it decays, with w = exp(-e^-0.5 sigmoid(w_0 + tanh(x W_1)
# W_2)), a = sigmoid(a_0 + x A_1 A_2), c = k * k_k of unit length and k' = k *
# (1 + (a - 1) * k_a); o_t = r_t S_t with scale 1, and (r_t . (r_k * k'_t)) v_t
# joins past the norm. Shares of the shift are learnt. Two rows of
# `chunk_memory` a token, one that erases and one that writes: 8 K V operations
# a head. Values of later layers are v + (v_first - v) sigmoid(v_0 + x V_1 V_2),
# v_first those of the token in the first layer. Published with group norm and
# the gate sigmoid(x G_1) G_2 (Goose, arXiv 2503.14456, eq. 1 to 19; first
# values as in the official repository).

_HALF = -0.6065306597126334  # -e^-0.5


def _rwkv7(q_RHK, k_RHK, v_RHV, gates, constants):
  c = {name: constants[name][None] for name in (
      'w0', 'a0', 'k_k', 'k_a', 'r_k')}
  k_RHK = k_RHK.astype(jnp.float32)
  decay_RHK = _HALF * jax.nn.sigmoid(gates['decay'] + c['w0'])
  a_RHK = jax.nn.sigmoid(gates['rate'] + c['a0'])
  erase_RHK = l2_normalise(k_RHK * c['k_k'])
  k_RHK = k_RHK * (1 + (a_RHK - 1) * c['k_a'])
  own_RH1 = (q_RHK.astype(jnp.float32) * k_RHK * c['r_k']).sum(
      -1, keepdims=True)
  both = lambda first, second: jnp.stack([first, second], 1).reshape(
      -1, *first.shape[1:])
  # Erased is exp(-w) c S', with S' = exp(w) S: decays are above e^-0.61.
  return Operands(
      q_RHK,
      both(a_RHK * erase_RHK, k_RHK).astype(q_RHK.dtype),
      both(jnp.zeros_like(v_RHV), v_RHV), decay_RHK,
      erase_RHK=both(
          erase_RHK * jnp.exp(-decay_RHK), jnp.zeros_like(erase_RHK)),
      skip_RHV=own_RH1 * v_RHV.astype(jnp.float32),
  )


def _zigzag(shape):
  """-1 .. 1 over each head's channels, flat in the middle."""
  K = shape[-1]
  x_K = (jnp.arange(K) - (K - 1) / 2) / max(0.5, (K - 1) / 2)
  return jnp.broadcast_to((x_K * jnp.abs(x_K))[None], shape)


def _w7(key, shape, depth):
  del key
  ramp_HK = -6 + 6 * _channels(shape) ** (1 + depth**0.3)
  return ramp_HK + 0.5 + 2.5 * _zigzag(shape)


def _a7(key, shape, depth):
  del key, depth
  return -0.19 + 0.3 * _zigzag(shape) + 0.4 * (_channels(shape) - 0.5)


def _shares7(name, D, depth):
  power = {'query': 0.2, 'output': 0.2, 'key': 0.7, 'value': 0.7}
  ramp_D = jnp.arange(D, dtype=jnp.float32) / D
  return 1 - ramp_D ** (power.get(name, 0.9) * (1 - depth))


def _rank7(factor):
  """Columns of a map in two steps, a multiple of 32."""
  def rank(D, K, V):
    del V
    return max(32, 32 * round(factor * D**0.5 * max(1, K / 64) / 32))
  return rank


RWKV7 = Rule(
    {'decay': Gate('key', rank=_rank7(2.5), inner=jnp.tanh),
     'rate': Gate('key', rank=_rank7(2.5)),
     'first': Gate('value', rank=_rank7(1.7), reads='value')},
    {'w0': Constant('key', _w7), 'a0': Constant('key', _a7),
     'k_k': Constant(
         'key', lambda key, shape, depth: 0.76 - 0.1 * _channels(shape)),
     'k_a': Constant('key', parts.full(1.02)),
     'r_k': Constant('key', parts.full(-0.04)),
     'first_bias': Constant(
         'value', lambda key, shape, depth: 0.93 - 0.4 * _channels(shape))},
    _rwkv7, erases=True, scale=1.0, silu='', one_write=True, past_norm=True,
    shift='learned', shares=_shares7, first='first',
    macs=lambda K, V: 4 * K * V,
)
