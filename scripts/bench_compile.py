r"""Times the compilation of a recipe's programs, and counts it by part.

  python scripts/bench_compile.py --config=configs/quickstart.py
  python scripts/bench_compile.py --config=configs/quickstart.py \
      --topology=v6e:1x1

Two tables, in Markdown:

Programs: seconds to trace, to lower to StableHLO and to compile, one after
another and without a cache. `CPU s` is the processor time of all threads while
it compiles. `Mom gradient` is a layer alone, 512 wide, 4 memories, 2 x 512
tokens.

The training step by part of the library: `kernels` are the pieces of code that
the program calls, `distinct` those that XLA generates code for (equal pieces
are made once), `IR kB` is their optimised LLVM code, which most of the time is
spent on. CPUs only; with --topology the training step is compiled for a TPU
that need not be there (needs the extra `tpu-compile`), and only timed.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
import pathlib
import re
import tempfile
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np
import timing

from mom_jax import chips, cli, config, models
from mom_jax.data import pipeline
from mom_jax.parallel import sharding
from mom_jax.planning import compiled, hlo
from mom_jax.training import step

CONFIG = flags.DEFINE_string('config', None, 'recipe to measure', required=True)
TOPOLOGY = flags.DEFINE_string(
    'topology', None, 'TPU to compile the training step for, such as v6e:1x1')
OUTPUT = cli.define_path('output', None, 'JSON file for the same numbers')

# Instructions that run no code of their own.
_FREE = {'parameter', 'constant', 'get-tuple-element', 'tuple', 'bitcast',
         'while', 'conditional', 'call'}
_IR = '.ir-with-opt.ll'


def measure(name: str, trace: Callable[[], Any], **options: Any) -> tuple[
    timing.Row, Any]:
  """Time the three stages of a program: (row of the first table, program)."""
  began = time.perf_counter()
  traced = trace()
  traced_at = time.perf_counter()
  lowered = traced.lower()
  lowered_at, cpu = time.perf_counter(), time.process_time()
  program = lowered.compile(compiler_options=options)
  return {
      'program': name,
      'trace s': traced_at - began,
      'lower s': lowered_at - traced_at,
      'compile s': time.perf_counter() - lowered_at,
      'CPU s': time.process_time() - cpu,
  }, program


def layer_gradient() -> Any:
  """Trace the gradient of a MoM layer alone."""
  layer = models.Mom(
      width=512, num_memories=4, top_k=2, num_heads=4, key_dim=128)
  x_BTD = jnp.zeros((2, 512, 512))
  variables = jax.eval_shape(layer.init, jax.random.key(0), x_BTD)

  def loss(variables, x_BTD):
    y_BTD, _, aux = layer.apply(variables, x_BTD)
    return jnp.square(y_BTD).sum() + aux.loss

  return jax.jit(jax.grad(loss)).trace(variables, x_BTD)


def tables(
    cfg: config.Config, mesh: jax.sharding.Mesh, folder: str
) -> dict[str, list[timing.Row]]:
  """Make both tables; XLA writes the code of the step to `folder`."""
  make, abstract = step.init(cfg, mesh)
  shape = (cfg.data.batch_size, cfg.data.seq_len)
  split = sharding.batch_sharding(mesh)
  integer, real = (jax.ShapeDtypeStruct(shape, dtype, sharding=split)
                   for dtype in (np.int32, np.float32))
  batch = pipeline.Batch(integer, integer, integer, real)
  training = step.make_step(cfg, abstract)
  evaluation = list(step.make_evaluation(cfg).values())[0]
  rows = [
      measure('initialisation', make.trace)[0],
      measure('evaluation', lambda: evaluation.trace(
          abstract.params, batch))[0],
      measure('Mom gradient', layer_gradient)[0],
  ]
  row, program = measure(
      'training step', lambda: training.trace(abstract, batch))
  # Once more, because writing takes as long as compiling.
  training.lower(abstract, batch).compile(
      compiler_options={'xla_dump_to': folder})
  return {
      'Programs': [*rows, row],
      'The training step by part': parts(program.as_text(), folder),
  }


def parts(text: str, folder: str) -> list[timing.Row]:
  """Rows of the second table.

  Args:
    text: the compiled program.
    folder: holds its code.
  """
  size = {}
  for path in pathlib.Path(folder).glob(f'*jit_step.*{_IR}'):
    name = path.name.split('jit_step.', 1)[1].removesuffix(_IR)
    size[name.removesuffix('_kernel_module')] = path.stat().st_size
  frames, module = Frames(text), hlo.parse(text)
  called = {name for c in module.computations.values()
            for i in c.instructions
            for role, names in i.calls.items() if role in ('calls', 'to_apply')
            for name in names}
  found = collections.defaultdict(lambda: [0, 0, 0])
  for computation in module.computations.values():
    if computation.name in called:  # inside a kernel
      continue
    for i in computation.instructions:
      if i.op not in _FREE:
        row = found[frames.part(i, module)]
        row[0] += 1
        row[1] += i.name in size
        row[2] += size.get(i.name, 0)
  found['all'] = [sum(row[j] for row in found.values()) for j in range(3)]
  return [
      {'part': part, 'kernels': kernels, 'distinct': distinct,
       'IR kB': code / 1e3}
      for part, (kernels, distinct, code) in sorted(
          found.items(), key=lambda item: -item[1][2])]


class Frames:
  """The tables of a program's text that say where an instruction comes from."""

  def __init__(self, text: str):
    self._table = {}
    for name in ('FileNames', 'FileLocations', 'StackFrames'):
      lines = re.search(rf'^{name}\n((?:\d+ .*\n)*)', text, re.MULTILINE)
      self._table[name] = dict(
          line.split(' ', 1) for line in lines[1].splitlines()) if lines else {}

  def part(self, instruction: hlo.Instruction, module: hlo.Module) -> str:
    """Return the innermost folder or file of mom_jax, or 'no source'."""
    inside = [j for name in instruction.calls.get('calls', ())
              for j in module.computations[name].instructions]
    for i in (instruction, *reversed(inside)):
      frame = re.search(r'stack_frame_id=(\d+)', i.attrs)
      for path in self._paths(frame[1]) if frame else ():
        if '/mom_jax/' in path:
          return '/'.join(path.rpartition('/mom_jax/')[2].split('/')[:2])
    return 'no source'

  def _paths(self, frame: str) -> Iterator[str]:
    """Yield the files of a frame and its callers."""
    number = lambda name, text: re.search(rf'{name}=(\d+)', text)
    while frame in self._table['StackFrames']:
      found = self._table['StackFrames'][frame]
      location = self._table['FileLocations'][
          number('file_location_id', found)[1]]
      yield self._table['FileNames'][
          number('file_name_id', location)[1]].strip('"')
      parent = number('parent_frame_id', found)
      frame = parent[1] if parent and parent[1] != frame else ''


def main(overrides: list[str]) -> None:
  timing.check_output(OUTPUT.value)
  cfg = config.load(CONFIG.value, overrides)
  jax.config.update('jax_enable_compilation_cache', False)
  header = timing.machine(cfg.model.dtype) | {'recipe': CONFIG.value}
  if TOPOLOGY.value:
    topology = chips.topology(TOPOLOGY.value)
    began = time.perf_counter()
    lowered, *_ = compiled.lower_step(cfg, compiled.devices(topology))
    lowered_at, cpu = time.perf_counter(), time.process_time()
    lowered.compile()
    found = {'Programs': [{
        'program': f'training step, {TOPOLOGY.value}',
        'trace and lower s': lowered_at - began,
        'compile s': time.perf_counter() - lowered_at,
        'CPU s': time.process_time() - cpu}]}
  else:
    mesh = sharding.make_mesh(**cfg.mesh.sizes)
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
      found = tables(cfg, mesh, folder)
  timing.report(header, found, OUTPUT.value)


if __name__ == '__main__':
  cli.run(main)
