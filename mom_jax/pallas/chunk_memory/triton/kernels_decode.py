"""The Triton kernel of decode.py."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def chunk_memory_decode(
    q, k, v, log_decay, beta, removal_key, value_decay, state, group_N,
    length_N, o, state_out, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    block_v: tl.constexpr, decay: tl.constexpr, delta: tl.constexpr,
    removes: tl.constexpr, by_value: tl.constexpr, exclusive: tl.constexpr,
    scale: tl.constexpr,
):
  """Compute rows n to n + length_N[n] of a group, for block_v value channels.

  Pointers of absent operands are never read. decay is 0, or the number of axes
  of log_decay: 2 per head, 3 per key channel.
  """
  blocks: tl.constexpr = V // block_v
  program = tl.program_id(0)
  n, h = program // (H * blocks), program // blocks % H
  key = tl.arange(0, K)
  value = program % blocks * block_v + tl.arange(0, block_v)
  group, length = tl.load(group_N + n), tl.load(length_N + n)
  row = n.to(tl.int64) * H + h
  if group < 0:
    zero_B = tl.zeros((block_v,), o.dtype.element_ty)
    tl.store(o + row * V + value, zero_B)
  if length > 0:
    state_at = (group.to(tl.int64) * H + h) * (K * V)
    state_at = state_at + key[:, None] * V + value[None, :]
    s = tl.load(state + state_at)
    for _ in range(0, length):
      q_K = tl.load(q + row * K + key).to(tl.float32) * scale
      k_K = tl.load(k + row * K + key).to(tl.float32)
      u_B = tl.load(v + row * V + value).to(tl.float32)
      o_B = tl.sum(q_K[:, None] * s, 0)
      if decay == 2:
        s *= tl.exp(tl.load(log_decay + row))
      if decay == 3:
        s *= tl.exp(tl.load(log_decay + row * K + key))[:, None]
      if by_value:
        s *= tl.exp(tl.load(value_decay + row * V + value))[None, :]
      if delta:
        u_B = tl.load(beta + row) * (u_B - tl.sum(k_K[:, None] * s, 0))
      if removes:
        e_K = tl.load(removal_key + row * K + key)
        u_B -= tl.sum(e_K[:, None] * s, 0)
      s += k_K[:, None] * u_B[None, :]
      if not exclusive:
        o_B = tl.sum(q_K[:, None] * s, 0)
      tl.store(o + row * V + value, o_B.to(o.dtype.element_ty))
      row += H
    tl.store(state_out + state_at, s)
