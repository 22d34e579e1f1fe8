"""Chunks of one row, which every backend of kernels hands on alike."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses

from mom_jax.pallas import common
from mom_jax.pallas.chunk_memory import xla


def with_decoding(backend: common.Backend, decode: Callable) -> common.Backend:
  """The backend, with chunks of one row handed on.

  `decode` takes them, which keeps nothing; where a backward pass is to follow,
  they are computed in plain XLA.
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
