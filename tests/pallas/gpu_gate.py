"""Registers and memory of GPU kernels, read off their machine code.

`launches` traces an operation for a GPU and returns the kernels it calls;
`measure` compiles one of them and returns its registers, spills and shared
memory, and what a Hopper GPU is known to get wrong (`faults`).
"""

from __future__ import annotations

import contextlib
import importlib.util
import pathlib
import re
import subprocess
import tempfile

import gpu_topology
import jax
import pytest

from mom_jax.pallas import triton_call

MOST_SPILLED = 64  # bytes
SERIALISED = ('C7510', 'C7511')  # ptxas: wgmma waits after every instruction
_TRANSPOSED = re.compile(
    r'tt\.trans\b.*: tensor<[^>]*, #mma\d*> ->')


@contextlib.contextmanager
def recorded():
  """Yields a list of what `triton_call.call` is asked for: (launch, arrays)."""
  seen, start = [], triton_call.start

  def record(launch, *arrays):
    seen.append((launch, tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)))
    return tuple(jax.numpy.zeros(o.shape, o.dtype) for o in launch.out)

  triton_call.start = record
  try:
    yield seen
  finally:
    triton_call.start = start


def launches(fn, *args, kind='NVIDIA H100 80GB HBM3'):
  """(launch, arrays) of every kernel that fn(*args) calls on such a GPU.

  Skips the test where Triton is absent.
  """
  if importlib.util.find_spec('triton') is None:
    pytest.skip("triton is absent: pip install '.[gpu-compile]'")
  fresh = lambda *args: fn(*args)  # traced anew
  with jax.sharding.use_abstract_mesh(
      gpu_topology.abstract_mesh(kind)), recorded() as seen:
    jax.eval_shape(fresh, *args)
  return seen


def measure(launch, arrays, capability: int) -> dict:
  """Compiles a launch: registers, spilled and shared bytes, faults."""
  made = triton_call.compiled(launch, arrays, capability)
  ptx = made.asm['ptx']
  text = _assemble(ptx, capability)
  number = lambda pattern: max(
      (int(x) for x in re.findall(pattern, text)), default=0)
  faults = [
      f'ptxas {name}: wgmma is serialised' for name in SERIALISED
      if name in text]
  faults += [
      'a product is transposed: ' + line.strip()
      for line in made.asm['ttgir'].splitlines() if _TRANSPOSED.search(line)]
  spilled = number(r'(\d+) bytes spill (?:stores|loads)')
  if spilled > MOST_SPILLED:
    faults.append(f'{spilled} bytes spilled')
  if getattr(made.metadata, 'global_scratch_size', 0):
    faults.append('needs scratch memory, which a call does not pass')
  return dict(
      registers=number(r'Used (\d+) registers'), spilled=spilled,
      shared=made.metadata.shared, wgmma='wgmma.mma_async' in ptx,
      multiplies='tt.dot' in made.asm['ttir'], faults=faults)


def _assemble(ptx, capability):
  import triton
  name = 'ptxas-blackwell' if capability >= 100 else 'ptxas'
  folder = pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin'
  letter = 'a' if capability >= 90 else ''
  with tempfile.TemporaryDirectory() as made:
    source = pathlib.Path(made, 'kernel.ptx')
    source.write_text(ptx)
    done = subprocess.run(
        [folder / name, '-v', f'-arch=sm_{capability}{letter}', source, '-o',
         pathlib.Path(made, 'kernel.cubin')],
        text=True, capture_output=True)
  assert done.returncode == 0, done.stderr
  return done.stderr
