"""Runs Triton kernels on a CPU, in Triton's interpreter, on numpy arrays.

The interpreter replaces `triton.jit` where triton is imported, so it needs a
process of its own, started with TRITON_INTERPRET=1: `test_triton_interpret.py`
starts one for each file `interpret_*.py`, which holds the tests.

Three of its faults are mended here. bfloat16 is kept as uint16, and `tl.dot`
multiplies those integers: operands are made float32 first, and arithmetic
between bfloat16 numbers outside `tl.dot` raises (a kernel computes in float32).
A cast to bfloat16 cuts digits off: it rounds to the nearest even number here,
as a GPU does. `tl.dot` calls BLAS, which on some CPUs adds a row's terms in an
order that depends on the row's position in the tile: here all rows add theirs
in the order of the columns. What the interpreter cannot see: layouts, races,
shared memory, asynchronous copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import contextlib
import os
import threading
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from mom_jax.pallas import common, triton_call

if os.environ.get('TRITON_INTERPRET') != '1':
  raise ImportError('set TRITON_INTERPRET=1 before triton is imported')

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

# Programs of XLA call kernels from several threads; the interpreter keeps the
# program's place in the grid in one variable.
_ONE_AT_A_TIME = threading.Lock()


class Buffer:
  """A numpy array with the methods that the interpreter calls on tensors."""

  def __init__(self, array: np.ndarray):
    self.array = array
    self.dtype = array.dtype.name

  def data_ptr(self):
    return self.array.ctypes.data

  def untyped_storage(self):
    return self

  def cpu(self):
    return self

  def copy_(self, other):
    assert other.array is self.array

  def new_empty(self, *shape, device):
    del shape, device
    return Buffer(self.array[:0])

  def set_(self, storage, offset, size, stride):
    del offset, size, stride
    self.array = storage.array

  def storage_offset(self):
    return 0

  def size(self):
    return self.array.shape

  def stride(self):
    return self.array.strides


def run(
    kernel: Any, *inputs: Any, out: Sequence[Any],
    grid: tuple[int, ...], aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> tuple[np.ndarray, ...]:
  """Outputs of a kernel whose pointers are the inputs, then the outputs.

  Args:
    kernel: a function under `triton.jit`.
    *inputs: arrays, or numbers.
    out: shape and dtype of each output; NaN (or the least integer) fills it
      before.
    grid: programs along each axis.
    aliases: by number of an input, the output that begins as a copy of it and
      has the same address.
    **constants: the kernel's `tl.constexpr` arguments.
  """
  arrays = [x if isinstance(x, (int, float)) else np.array(x) for x in inputs]
  outs = [_poisoned(o) for o in out]
  for i, o in (aliases or {}).items():
    outs[o] = arrays[i]
  wrap = lambda x: x if isinstance(x, (int, float)) else Buffer(x)
  if min(grid):
    with _ONE_AT_A_TIME:
      kernel[tuple(grid)](*map(wrap, arrays), *map(wrap, outs), **constants)
  return tuple(outs)


@contextlib.contextmanager
def installed(capability: int = 90):
  """Public operations believe in a GPU and run their kernels here.

  Args:
    capability: of the GPU whose tiles are taken.
  """

  def start(launch, *arrays):
    settings = dict(
        out=launch.out, grid=launch.grid, aliases=dict(launch.aliases))
    work = lambda *arrays: run(
        launch.kernel, *arrays, **settings, **dict(launch.constants))
    return tuple(jax.pure_callback(work, launch.out, *arrays))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(common, 'platform', lambda: 'gpu')
    patch.setattr(common, 'gpu_target', lambda: common.GpuTarget(
        capability, present=True))
    patch.setattr(triton_call, 'missing', lambda: None)
    patch.setattr(triton_call, 'start', start)
    yield


def _poisoned(out):
  dtype = np.dtype(out.dtype)
  inexact = np.issubdtype(dtype, np.inexact) or dtype == ml_dtypes.bfloat16
  worst = np.nan if inexact else np.iinfo(dtype).min
  return np.full(out.shape, worst, dtype)


def _float32(handle):
  if handle.dtype.scalar != tl.bfloat16:
    return handle
  wide = handle.data.view(ml_dtypes.bfloat16).astype(np.float32)
  return interpreter.TensorHandle(wide, tl.float32)


def _mend():
  builder = interpreter.InterpreterBuilder
  binary, cast = builder.binary_op, builder.cast_impl
  fp_to_fp = builder.create_fp_to_fp

  def narrow(src, dst_type):
    if (src.dtype.scalar, dst_type.scalar) == (tl.float32, tl.bfloat16):
      near = np.asarray(src.data).astype(ml_dtypes.bfloat16).view(np.uint16)
      return interpreter.TensorHandle(near, tl.bfloat16)

  def first(handle, other):  # a handle with a zero in it counts as false
    return other() if handle is None else handle

  def binary_op(self, lhs, rhs, op):
    if tl.bfloat16 in (lhs.dtype.scalar, rhs.dtype.scalar):
      raise TypeError('arithmetic in bfloat16; make the operands float32')
    return binary(self, lhs, rhs, op)

  def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    del self, input_precision, max_num_imprecise_acc
    total = d.data.copy()
    a, b = (_float32(x).data.astype(total.dtype) for x in (a, b))
    for k in range(a.shape[-1]):
      total += a[..., k, None] * b[..., k, None, :]
    return interpreter.TensorHandle(total, d.dtype.scalar)

  builder.create_dot = dot
  builder.binary_op = binary_op
  builder.cast_impl = lambda self, src, to: first(
      narrow(src, to), lambda: cast(self, src, to))
  builder.create_fp_to_fp = lambda self, src, to, rounding: first(
      narrow(src, to), lambda: fp_to_fp(self, src, to, rounding))


_mend()
