"""The Triton kernel of decode.py."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def chunk_memory_decode(
    q, k, v, log_decay, beta, erase, value_decay, state, group_N, length_N, o,
    state_out, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    columns: tl.constexpr, decay: tl.constexpr, delta: tl.constexpr,
    erases: tl.constexpr, by_value: tl.constexpr, exclusive: tl.constexpr,
    scale: tl.constexpr,
):
  """Rows n to n + length_N[n] of a group, for some columns of a head's state.

  What is absent of log_decay, beta, erase and value_decay is never read. decay
  is 0, or the number of axes of log_decay: 2 by head, 3 by key channel.
  """
  tiles: tl.constexpr = V // columns
  at = tl.program_id(0)
  n, h = at // (H * tiles), at // tiles % H
  key = tl.arange(0, K)
  value = at % tiles * columns + tl.arange(0, columns)
  group, length = tl.load(group_N + n), tl.load(length_N + n)
  row = n.to(tl.int64) * H + h
  if group < 0:
    nothing = tl.zeros((columns,), o.dtype.element_ty)
    tl.store(o + row * V + value, nothing)
  if length > 0:
    s_at = (group.to(tl.int64) * H + h) * (K * V)
    s_at = s_at + key[:, None] * V + value[None, :]
    s = tl.load(state + s_at)
    for _ in range(0, length):
      q_K = tl.load(q + row * K + key).to(tl.float32) * scale
      k_K = tl.load(k + row * K + key).to(tl.float32)
      y = tl.load(v + row * V + value).to(tl.float32)
      found = tl.sum(q_K[:, None] * s, 0)
      if decay == 2:
        s *= tl.exp(tl.load(log_decay + row))
      if decay == 3:
        s *= tl.exp(tl.load(log_decay + row * K + key))[:, None]
      if by_value:
        s *= tl.exp(tl.load(value_decay + row * V + value))[None, :]
      if delta:
        y = tl.load(beta + row) * (y - tl.sum(k_K[:, None] * s, 0))
      if erases:
        e_K = tl.load(erase + row * K + key)
        y -= tl.sum(e_K[:, None] * s, 0)
      s += k_K[:, None] * y[None, :]
      if not exclusive:
        found = tl.sum(q_K[:, None] * s, 0)
      tl.store(o + row * V + value, found.to(o.dtype.element_ty))
      row += H
    tl.store(state_out + s_at, s)
