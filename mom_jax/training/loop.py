"""The training loop on the host.

Order: mesh, data, state, restore, step, loop, close. A checkpoint is taken
before the next batch is drawn, after validation and after every metric up to
its step is on disk, so that a run that dies anywhere resumes as if it had not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from mom_jax import chips, compilation, config, hf
from mom_jax.data import encode, pipeline, tokenizers
from mom_jax.models import flops
from mom_jax.parallel import sharding
from mom_jax.training import (
  aux_router,
  checkpoint,
  lease,
  losses,
  metrics,
  multihost,
  optimizer,
  step,
)

# Steps after which a run says how long it will take.
TIMED_STEPS = 20


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
  """Turn the ValueErrors of lower levels about settings into `UserError`."""
  try:
    yield
  except config.UserError:
    raise
  except (ValueError, NotImplementedError) as e:
    if '\n' in str(e):  # not one of ours
      raise
    raise config.UserError(str(e)) from e


def run(
    cfg: config.Config, workdir: str | os.PathLike[str], patience: float
) -> dict[str, Any]:
  """Train up to `train.steps`; see `train.fit`."""
  encode.check(cfg)
  cfg = aux_router.prepare(cfg)
  with multihost.make_stop(patience) as stop:
    checkpoint.check_trainable(workdir)
    checkpoint.check_same_run(workdir, cfg)
    if cfg.train.init_from and not (
        pathlib.Path(workdir) / 'config.json').is_file():
      aux_router.check(cfg)
    with _user_errors():
      mesh = sharding.make_mesh(**cfg.mesh.sizes)
    workdir = pathlib.Path(workdir)
    with (jax.set_mesh(mesh), lease.hold(workdir, print) as held,
          contextlib.ExitStack() as closing):
      return Run(cfg, workdir, mesh, stop, held, closing).train()


def _check_vocabulary(
    vocabulary: tokenizers.Vocabulary, workdir: pathlib.Path, function: str
) -> None:
  """Raise UserError if the run in `workdir` has another vocabulary."""
  path = workdir / tokenizers.VOCABULARY
  if not path.is_file():
    return
  before = tokenizers.load(workdir, function)
  if before.fingerprint != vocabulary.fingerprint:
    raise config.UserError(
        f'config.data gives other tokens than those that the run in'
        f' --workdir={workdir} was trained on (its vocabulary is in {path});'
        ' restore its data and tokenizer or choose another --workdir.'
    )


def _vocabulary(
    cfg: config.Config, workdir: pathlib.Path
) -> tokenizers.Vocabulary:
  """Return the vocabulary of the data, or of the run in `train.init_from`."""
  if cfg.train.stage != 'main' or not cfg.train.init_from:
    return encode.build_vocabulary(cfg)
  resumed = (workdir / tokenizers.VOCABULARY).is_file()
  return tokenizers.load(workdir if resumed else cfg.train.init_from,
                         cfg.data.tokenizer.image)


def _mesh_text(shape: dict[str, int], strategy: str) -> str:
  """Name the axes that split something, and how they do."""
  axes = {name: size for name, size in shape.items() if size > 1}
  return f', mesh {axes}, strategy {strategy}' if axes else ''


@dataclasses.dataclass
class _Pending:
  """A started step whose metrics are not fetched yet.

  Attributes:
    step: its number, from 1.
    metrics: on the devices.
    data_time: seconds that it waited for its batch.
  """

  step: int
  metrics: step.StepMetrics
  data_time: float


class Run:
  """A training run as one process executes it."""

  def __init__(
      self, cfg: config.Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh,
      stop: multihost.Stop, held: lease.Lease, closing: contextlib.ExitStack,
  ):
    self.cfg, self.workdir, self.mesh, self.stop = cfg, workdir, mesh, stop
    self.held = held
    self.progress = metrics.Progress(
        cfg.train.steps, jax.process_index() == 0)
    lowered = self._lower()
    vocabulary = _vocabulary(cfg, workdir)
    with _user_errors():
      index, count = multihost.data_process(
          mesh.devices, jax.process_index())
    here = dict(process_index=index, process_count=count)
    here['documents'] = pipeline.open_all(cfg, vocabulary)
    for line in pipeline.summary(cfg, vocabulary, here['documents']):
      self.progress.say(line)
    self.data = pipeline.train_iterator(cfg, vocabulary, **here)
    closing.callback(self.data.close)
    self.validation = pipeline.validation_batches(cfg, vocabulary, **here)
    if cfg.train.init_from and not (workdir / 'config.json').is_file():
      aux_router.check_vocabulary(cfg, vocabulary)
    held.confirm()
    _check_vocabulary(vocabulary, workdir, cfg.data.tokenizer.image)
    changes = pipeline.keep_documents(
        workdir, cfg, here['documents'], write=False)
    for line in changes:
      self.progress.say(line)
    checkpoint.claim(workdir, cfg)
    self._keep(vocabulary, here['documents'])
    if cfg.train.init_from and jax.process_index() == 0:
      hf.files.copy_record(pathlib.Path(cfg.train.init_from), workdir)
    self.checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    closing.push(self._close_checkpoints)
    self.step_index, self.evaluated, self.last = 0, 0, {}
    self.saved: int | None = None
    self.compiled: set[str] = set()
    self.train_step: compilation.Background | None = None
    self.state = self._restore(lowered)
    self.writers = []
    if jax.process_index() == 0:
      self.writers = metrics.open_writers(workdir, self.step_index, cfg)
    for writer in self.writers:
      closing.callback(writer.close)
    self.pending: _Pending | None = None
    self.clock = metrics.Clock(*self._flops())

  def _keep(
      self, vocabulary: tokenizers.Vocabulary,
      documents: Sequence[encode.Splits],
  ) -> None:
    """Write what tokens mean and what the run is trained on."""
    if jax.process_index() > 0:
      return
    with checkpoint.writing(str(self.workdir)):
      if not (self.workdir / tokenizers.VOCABULARY).is_file():
        vocabulary.save(self.workdir)
      pipeline.keep_documents(self.workdir, self.cfg, documents, write=True)

  def _lower(self) -> jax.stages.Lowered:
    """Check the settings against model and mesh, and lower the step."""
    cfg = self.cfg
    rows = cfg.data.batch_size // cfg.train.grad_accum_steps
    with _user_errors():
      sharding.check_batch(rows, sharding.batch_shards(self.mesh))
      self.make_state, self.abstract = step.init(cfg, self.mesh)
      lowered = step.make_step(cfg, self.abstract).lower(
          self.abstract, self._batch_shapes())
    total, active = flops.count_params(cfg)
    self.progress.say(
        f'{total:,} parameters, {active:,} of them active per token;'
        f' {len(jax.devices())} device(s) of kind'
        f' {jax.devices()[0].device_kind!r}' + _mesh_text(
            dict(self.mesh.shape), cfg.mesh.strategy))
    if note := optimizer.remark(cfg.optimizer, cfg.train.steps):
      self.progress.say(note)
    return lowered

  def _batch_shapes(self) -> pipeline.Batch:
    shape = (self.cfg.data.batch_size, self.cfg.data.seq_len)
    spread = sharding.batch_sharding(self.mesh)
    integer, real = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=spread)
        for dtype in (np.int32, np.float32))
    return pipeline.Batch(integer, integer, integer, real)

  def _compile(self, lowered: jax.stages.Lowered) -> None:
    """Start to compile the step; trace the evaluation meanwhile."""
    self.train_step = compilation.Background(lowered)
    self.evaluation = step.make_evaluation(self.cfg)
    with _user_errors():
      for evaluate in self.evaluation.values():
        jax.eval_shape(evaluate, self.abstract.params, self._batch_shapes())

  def _flops(self) -> tuple[float, float | None]:
    kind = jax.devices()[0].device_kind
    peak = chips.peak_flops(kind, len(jax.devices()))
    if peak is None and jax.default_backend() != 'cpu':
      self.progress.say(
          f'no MFU: chips.CHIPS does not have the peak FLOP/s of {kind!r}')
    return flops.train_flops_per_token(self.cfg), peak

  def _restore(self, lowered: jax.stages.Lowered) -> step.State:
    """Return the state of the newest checkpoint, or a new one.

    Meanwhile what is lowered is compiled, unless nothing is left to do.
    """
    seems_done = (
        max(self.checkpoints.steps, default=0) >= self.cfg.train.steps)
    if not seems_done:
      self._compile(lowered)
    restored = self.checkpoints.restore(self.abstract.trees, self.data)
    if restored is not None:
      self.step_index = self.saved = restored.step
      self.evaluated = restored.progress['evaluated']
      self.last = restored.progress['last']
    done = self.step_index >= self.cfg.train.steps
    if seems_done and (not done or self._evaluation_due(done)):
      self._compile(lowered)
    if restored is None:
      return self._first_state()
    if not done:
      self.progress.say(
          f'resuming from step {restored.step} of {self.workdir}')
    return step.State(**({'ema': None} | restored.trees))

  def _first_state(self) -> step.State:
    """Make a new state, with the parameters of `train.init_from` if set."""
    with self.progress.waiting('initialising the parameters'):
      state = jax.block_until_ready(self.make_state())
    if self.cfg.train.init_from:
      params = aux_router.start(self.cfg, state.params)
      ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
      state = state._replace(params=params, ema=ema)
    return state

  def train(self) -> dict[str, Any]:
    """Run the loop and return the last value of every metric."""
    train, every = self.cfg.train, self.cfg.checkpoint.every
    with self._profiler() as profile:
      while True:
        done = self.step_index >= train.steps
        stopping = self.stop.after(self.step_index)
        if not stopping and self._evaluation_due(done):
          self.evaluate()
          stopping = stopping or self.stop.interrupts
        if done or stopping or self.step_index % every == 0 < self.step_index:
          self.save()
        if done or stopping:
          break
        profile(self.step_index + 1)
        self.advance()
    self.finish()
    self.checkpoints.close()
    self._conclude()
    return dict(self.last)

  def advance(self) -> None:
    """Start the next step, then fetch the metrics of the one before."""
    self.held.check()
    started = time.perf_counter()
    batch = sharding.shard_batch(next(self.data), self.mesh)
    data_time = time.perf_counter() - started
    with self._compiling('the training step'):
      self.state, values = self.train_step(self.state, batch)
    previous, self.pending = self.pending, None
    if previous is not None:
      self._fetch(previous)
    self.step_index += 1
    self.pending = _Pending(self.step_index, values, data_time)
    self.checkpoints.check()

  def _compiling(
      self, function: str
  ) -> contextlib.AbstractContextManager[None]:
    """Say that the first call of a function waits for its compilation."""
    if function in self.compiled:
      return contextlib.nullcontext()
    self.compiled.add(function)
    return self.progress.waiting(f'compiling {function}')

  def finish(self) -> None:
    """Wait for the last step and report it."""
    if self.pending is not None:
      pending, self.pending = self.pending, None
      self._fetch(pending)

  def _fetch(self, pending: _Pending) -> None:
    values = jax.device_get(pending.metrics)
    self.clock.step(pending.data_time, int(values.tokens))
    if self.clock.count == TIMED_STEPS:
      left = self.cfg.train.steps - pending.step
      self.progress.say(
          f'{self.clock.step_time:.3g} s per step: the other {left:,} steps'
          f' take about {metrics.duration(left * self.clock.step_time)}')
    nonfinite = values.consecutive_nonfinite
    if nonfinite >= self.cfg.train.max_nonfinite_steps:
      self._give_up(pending.step, values)
    train = self.cfg.train
    log = (pending.step % train.log_every == 0
           or pending.step in (1, train.steps))
    if not (log or self.progress.live):
      return
    record = self._record(pending.step, values)
    self.progress.show(record, self.clock.step_time)
    if log:
      self._write(record)

  def _record(
      self, number: int, values: step.StepMetrics
  ) -> metrics.Record:
    """Name the metrics of a step."""
    sums, cfg = values.sums, self.cfg
    suffix = '' if step.causal(cfg) else '_noncausal'
    record = {
        'step': number,
        **losses.means(sums, cfg.model.modalities, suffix=suffix),
        'log_z2': float(sums.z / max(1, sums.count_S.sum())),
        'total_loss': float(values.total_loss),
        'balance_loss': float(values.balance_loss),
        'learning_rate': float(values.learning_rate),
        'grad_norm': float(values.grad_norm),
        'param_norm': float(values.param_norm),
        'nonfinite_steps': int(values.total_nonfinite),
    }
    if cfg.train.stage == 'aux_router':
      record['aux_router_loss'] = record['total_loss']
    record |= metrics.routing(values.routing)
    record |= metrics.agreement(values.agreement, cfg.model.modalities)
    return record | self.clock.record()

  def _write(self, record: metrics.Record) -> None:
    self.last |= record
    for writer in self.writers:
      writer.write(record)

  def _give_up(self, number: int, values: step.StepMetrics) -> None:
    """Stop after too many non-finite steps."""
    self.checkpoints.wait()
    where = step.locate_nonfinite(
        values.finite, values.routing,
        bool(np.isfinite(values.total_loss)), len(self.cfg.model.unit))
    raise config.UserError(
        f'step {number}: loss {values.total_loss:.4g} and gradient norm'
        f' {values.grad_norm:.4g} are not finite, for'
        f' {values.consecutive_nonfinite} steps in a row'
        f' (train.max_nonfinite_steps); the first such value is in {where}.'
        f' {self.checkpoints.kept()} Lower optimizer.learning_rate or'
        ' optimizer.clip_norm in another --workdir.'
    )

  def _evaluation_due(self, done: bool) -> bool:
    every = self.cfg.train.eval_every
    due = done or (every and self.step_index % every == 0)
    return bool(
        due and self.step_index > self.evaluated and self.validation
    )

  def evaluate(self) -> None:
    """Compute and write validation losses, unless a signal intervenes."""
    self.finish()
    params = self.state.params if self.state.ema is None else self.state.ema
    record: metrics.Record = {'step': self.step_index}
    modalities = self.cfg.model.modalities
    for suffix, evaluate in self.evaluation.items():
      total = losses.Sums(*[np.float64(0)] * 3)
      for batch in self.validation:
        if self.stop.interrupts:
          return
        with self._compiling(f'the evaluation{suffix}'):
          sums = evaluate(params, sharding.shard_batch(batch, self.mesh))
        total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64),
                             total, sums)
      record |= losses.means(total, modalities, 'val_', suffix)
    self.evaluated = self.step_index
    self.progress.say(
        f'validation at step {self.step_index}: {metrics.losses_text(record)}')
    self._write(record)
    self.clock.restart()

  def save(self) -> None:
    """Start a checkpoint of this step unless it has one."""
    self.finish()
    if self.saved == self.step_index:
      return
    self.held.check_now()
    for writer in self.writers:
      writer.flush()
    last = {k: v for k, v in self.last.items() if k not in metrics.TIMING_KEYS}
    self.checkpoints.save(
        self.step_index, self.state.trees, self.data,
        {'evaluated': self.evaluated, 'last': last,
         'config': checkpoint.fingerprint(self.cfg)},
    )
    self.saved = self.step_index
    self.clock.restart()

  def _close_checkpoints(self, kind: Any, error: Any, trace: Any) -> None:
    """Wait for a save under way after an error, and ignore its own error."""
    if error is not None:
      with contextlib.suppress(Exception):
        self.checkpoints.close()

  @contextlib.contextmanager
  def _profiler(self) -> Iterator[Any]:
    """Yield a function to call before each step; it traces train.profile."""
    first, last = self.cfg.train.profile or (0, 0)
    folder = self.workdir / 'profile'
    active = False

    def before(number: int) -> None:
      nonlocal active
      if not active and first <= number <= last:
        jax.profiler.start_trace(folder)
        active = True
      elif active and number > last:
        end()

    def end() -> None:
      nonlocal active
      active = False
      jax.block_until_ready(self.state)
      jax.profiler.stop_trace()
      self.progress.say(f'trace of steps {first} to {last} in {folder}')

    try:
      yield before
    finally:
      if active:
        end()

  def _conclude(self) -> None:
    """Say where the results are."""
    written = [f'checkpoint {self.workdir}/checkpoints/{self.step_index}']
    if 'jsonl' in self.cfg.train.writers:
      written.append(f'metrics {self.workdir}/metrics.jsonl')
    if 'tensorboard' in self.cfg.train.writers:
      written.append(f'TensorBoard {self.workdir}/tensorboard')
    where = ', '.join(written)
    if self.stop.signal:
      self.progress.say(
          f'stopped by {self.stop.signal} at step {self.step_index} of'
          f' {self.cfg.train.steps}; the same command resumes it. {where}')
    elif self.train_step is None:
      self.progress.say(
          f'done before: {self.step_index} steps; a larger config.train.steps'
          f' goes on. {where}')
    else:
      self.progress.say(f'done: {self.step_index} steps. {where}')
