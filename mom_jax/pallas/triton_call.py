"""Calls of Triton kernels: through jax-triton, or lowered here.

Kernels are `@triton.jit` functions in files `kernels*.py`, which are imported
inside functions only: nothing here needs Triton before a GPU kernel runs.
Releases of jax-triton fit few pairs of jax and Triton, so the pairs that were
tried are listed and others refused.

jax-triton cannot set the PTX version and stamps that of Triton's own assembler,
which a GPU's driver may be too old for (TRITON_PTXAS_BLACKWELL_PATH names
another). Where programs are compiled for an absent GPU, XLA takes whatever
assembler it finds, so `_lower_here` writes the oldest PTX that all targets
have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import importlib.metadata
import os
from typing import Any, NamedTuple
import zlib

import jax
import jax.numpy as jnp

from mom_jax.pallas import common

# (jax, jax-triton, triton) on which kernels were lowered and compiled.
PROVEN = (
    ('0.10.2', '0.3.1', '3.9.0'),
    ('0.11.2', '0.3.1', '3.6.0'),
)
PTX_VERSION = 87  # the first that knows all of sm_80 to sm_120
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448,
                120: 101376}  # bytes a program may have, by capability
_TYPES = {
    'bfloat16': '*bf16', 'float16': '*fp16', 'float32': '*fp32',
    'int32': '*i32', 'bool': '*i1'}


class Launch(NamedTuple):
  """The static part of a call."""

  kernel: Any
  out: tuple[jax.ShapeDtypeStruct, ...]
  grid: tuple[int, ...]
  warps: int
  stages: int
  aliases: tuple[tuple[int, int], ...]
  constants: tuple[tuple[str, Any], ...]


def missing() -> str | None:
  """Return why Triton kernels cannot be called here, or None if they can."""
  if common.platform() != 'gpu':
    return f'it needs a GPU; programs here are for {common.platform()}.'
  found = versions()
  if None in found:
    return "it needs jax-triton and triton; pip install 'mom_jax[gpu]'."
  if found not in PROVEN:
    known = '; '.join(map(' '.join, PROVEN))
    return (
        f'jax, jax-triton, triton {" ".join(found)} were not tried together;'
        f' install one of {known}.')
  return None


@functools.cache
def versions() -> tuple[str | None, ...]:
  """Installed versions of jax, jax-triton and triton; None is absent."""
  found = []
  for name in ('jax', 'jax-triton', 'triton'):
    try:
      found.append(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
      found.append(None)
  return tuple(found)


def triton_version() -> str | None:
  """Version of the installed Triton, or None."""
  return versions()[2]


def call(
    kernel: Any,
    *arrays: jax.Array,
    out: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    warps: int = 4,
    stages: int = 2,
    aliases: Mapping[int, int] | None = None,
    **constants: Any,
) -> tuple[jax.Array, ...]:
  """Run a Triton kernel on the GPU.

  Args:
    kernel: a function under `triton.jit` of pointers to the arrays, then to the
      outputs, then of constants by name. It writes every entry of an output
      that is read later: outputs begin undefined.
    *arrays: bfloat16, float16, float32, int32 or bool, in row-major order.
    out: shape and dtype of each output.
    grid: programs along up to three axes.
    warps: warps a program.
    stages: depth of the pipeline of a program's loops.
    aliases: by index of an array, the output that is written in its place.
    **constants: the kernel's `tl.constexpr` arguments, all of them.

  Returns:
    The outputs. They vary over the mesh axes over which any array does.

  Under `jax.vmap` the kernel runs once per entry, in turn; see `batched` for
  operations that can do better. No gradient.
  """
  launch = Launch(
      kernel, tuple(out), tuple(grid), warps, stages,
      tuple((aliases or {}).items()), tuple(sorted(constants.items())))
  arrays = common.vary_alike(*arrays)
  run = jax.custom_batching.sequential_vmap(functools.partial(start, launch))
  with jax.named_scope(kernel.__name__):
    got = run(*arrays)
  return common.vary_alike(*got, arrays[0])[:-1]


def batched(op: Callable, shared: tuple[int, ...] = ()) -> Callable:
  """Make an operation on batches one on single entries; `jax.vmap` batches it.

  Args:
    op: a function whose operands and results have a leading batch axis. Under
      `jax.vmap` that axis grows, and the kernel is still launched once.
    shared: indices of operands that may have a shorter axis, A of B entries, of
      which entry b takes number b % A.
  """
  run = jax.custom_batching.custom_vmap(op)

  @run.def_vmap
  def _(size, is_batched, *operands):
    B = max(x.shape[1 if b else 0] for x, b in zip(operands, is_batched))

    def merge(i, x, b):
      if not b:
        if i in shared:
          return x
        x = jnp.broadcast_to(x[None], (size, *x.shape))
      x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))
      return x.reshape(size * B, *x.shape[2:])

    out = run(*(
        merge(i, x, b)
        for i, (x, b) in enumerate(zip(operands, is_batched))))
    split = lambda y: y.reshape(size, B, *y.shape[1:])
    return jax.tree.map(split, out), jax.tree.map(lambda _: True, out)

  def single(*operands):
    return jax.tree.map(lambda y: y[0], run(*(x[None] for x in operands)))

  return single


def start(launch: Launch, *arrays: jax.Array) -> tuple[jax.Array, ...]:
  """Run the kernel of `launch` on the arrays."""
  target = common.gpu_target()
  if not target.present:
    return _lower_here(launch, *arrays, capability=target.capability)
  return tuple(_jax_triton().triton_call(
      *arrays, kernel=launch.kernel, out_shape=launch.out, grid=launch.grid,
      num_warps=launch.warps, num_stages=launch.stages,
      compute_capability=target.capability,
      input_output_aliases=dict(launch.aliases),
      name=launch.kernel.__name__, **dict(launch.constants)))


def _jax_triton():
  """Import jax_triton and keep TRITON_CACHE_DIR.

  Its import empties that variable, without which triton.compile does not run.
  """
  kept = os.environ.get('TRITON_CACHE_DIR')
  import jax_triton
  if kept is None:
    os.environ.pop('TRITON_CACHE_DIR', None)
  else:
    os.environ['TRITON_CACHE_DIR'] = kept
  return jax_triton


def compiled(
    launch: Launch, arrays: Sequence[Any], capability: int
) -> Any:
  """Compile the kernel of `launch` for a compute capability.

  Returns:
    The result of `triton.compile`.

  Raises:
    ValueError: a program needs more shared memory than there is.
  """
  import triton
  from triton.backends.compiler import GPUTarget
  from triton.compiler import ASTSource
  names, constants = launch.kernel.arg_names, dict(launch.constants)
  types = iter(_TYPES[x.dtype.name] for x in (*arrays, *launch.out))
  signature = {
      n: 'constexpr' if n in constants else next(types) for n in names}
  source = ASTSource(
      launch.kernel, signature,
      {(names.index(n),): value for n, value in constants.items()},
      {(i,): [['tt.divisibility', 16]]
       for i, n in enumerate(names) if n not in constants})
  made = triton.compile(
      source, target=GPUTarget('cuda', capability, 32),
      options=dict(
          num_warps=launch.warps, num_stages=launch.stages,
          ptx_version=PTX_VERSION, enable_fp_fusion=True))
  if made.metadata.shared > SHARED_LIMIT[capability]:
    raise ValueError(
        f'{launch.kernel.__name__} needs {made.metadata.shared} bytes of shared'
        f' memory; sm_{capability} has {SHARED_LIMIT[capability]}. Take smaller'
        ' tiles or fewer stages.')
  return made


def _lower_here(launch, *arrays, capability):
  from jaxlib import gpu_triton
  made = compiled(launch, arrays, capability)
  kernel = gpu_triton.TritonKernel(
      made.metadata.name, launch.warps, 1, made.metadata.shared,
      made.asm['ptx'], made.asm['ttir'], capability)
  aligned = [gpu_triton.create_array_parameter(0, 16)]
  grid = (*launch.grid, 1, 1)[:3]
  proto = gpu_triton.TritonKernelCall(
      kernel, *grid, aligned * (len(arrays) + len(launch.out))
  ).to_proto(launch.kernel.__name__, b'')
  run = jax.ffi.ffi_call(
      'triton_kernel_call_ffi', launch.out,
      input_output_aliases=dict(launch.aliases))
  return tuple(run(*arrays, opaque=zlib.compress(proto)))
