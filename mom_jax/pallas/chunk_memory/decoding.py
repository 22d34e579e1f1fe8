"""Chunks of one row: kernel backends hand them to a decoding kernel."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import xla


def with_decoding(backend: common.Backend, decode: Callable) -> common.Backend:
  """Return the backend, with chunks of one row handed to `decode`.

  `decode` keeps nothing for a backward pass; where one follows, chunks of one
  row are computed in plain XLA.
  """

  def fwd(*operands, chunk, keep, **static):
    if chunk == 1 and not keep:
      return decode(*operands, **static), None
    one = xla.BACKEND if chunk == 1 else backend
    return one.fwd(*operands, chunk=chunk, keep=keep, **static)

  def bwd(*operands, chunk, **static):
    one = xla.BACKEND if chunk == 1 else backend
    return one.bwd(*operands, chunk=chunk, **static)

  return dataclasses.replace(backend, fwd=fwd, bwd=bwd)
