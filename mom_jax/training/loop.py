"""The training loop on the host.

Order: mesh, data, state, restore, step, loop, close. A checkpoint is taken
before the next batch is drawn, after validation and after every metric up to
its step is on disk, so that a run which dies anywhere goes on as if it had not.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import time
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from mom_jax import chips, config
from mom_jax.data import encode, pipeline, tokenizers
from mom_jax.models import flops, lm
from mom_jax.parallel import sharding
from mom_jax.training import (
  aux_router,
  checkpoint,
  losses,
  metrics,
  multihost,
  step,
)


@contextlib.contextmanager
def _settings_checked() -> Iterator[None]:
  """Lower levels raise ValueError for settings; to a user it is one line."""
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
  """Trains up to `train.steps`; see `train.fit`."""
  cfg = aux_router.prepare(cfg)
  with multihost.make_stop(patience) as stop:
    checkpoint.check_same_run(workdir, cfg)
    checkpoint.check_trainable(workdir)
    if cfg.train.init_from and not (
        pathlib.Path(workdir) / 'config.json').is_file():
      aux_router.check(cfg)
    with _settings_checked():
      mesh = sharding.make_mesh(**cfg.mesh.sizes)
    with jax.set_mesh(mesh), contextlib.ExitStack() as closing:
      return _Run(cfg, pathlib.Path(workdir), mesh, stop, closing).train()


def _keep_vocabulary(
    vocabulary: tokenizers.Vocabulary, workdir: pathlib.Path
) -> None:
  """Saves the vocabulary with the run, or checks that it is still the run's."""
  path = workdir / tokenizers.VOCABULARY
  if path.is_file():
    if tokenizers.load(workdir).fingerprint != vocabulary.fingerprint:
      raise config.UserError(
          f'config.data now gives other tokens than the run in'
          f' --workdir={workdir} was trained on (its vocabulary is in {path});'
          ' bring its data and tokenizer back or choose another --workdir.'
      )
  elif jax.process_index() == 0:
    with checkpoint.writing(str(path)):
      vocabulary.save(workdir)


def _vocabulary(
    cfg: config.Config, workdir: pathlib.Path
) -> tokenizers.Vocabulary:
  """That of the data, or of the run whose parameters are trained on."""
  if cfg.train.stage != 'main' or not cfg.train.init_from:
    return encode.build_vocabulary(cfg)
  mine = (workdir / tokenizers.VOCABULARY).is_file()
  return tokenizers.load(workdir if mine else cfg.train.init_from)


@dataclasses.dataclass
class _Pending:
  """A step that was started and whose metrics are not fetched yet."""

  number: int
  metrics: step.StepMetrics
  data_time: float


class _Run:
  """One process's part of a run."""

  def __init__(
      self, cfg: config.Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh,
      stop: multihost.Stop, closing: contextlib.ExitStack,
  ):
    self.cfg, self.workdir, self.mesh, self.stop = cfg, workdir, mesh, stop
    self.progress = metrics.Progress(
        cfg.train.steps, jax.process_index() == 0)
    make = self._compile()
    vocabulary = _vocabulary(cfg, workdir)
    with _settings_checked():
      index, count = multihost.data_process(
          mesh.devices, jax.process_index())
    here = dict(process_index=index, process_count=count)
    self.data = pipeline.train_iterator(cfg, vocabulary, **here)
    closing.callback(self.data.close)
    self.validation = pipeline.validation_batches(cfg, vocabulary, **here)
    if cfg.train.init_from and not (workdir / 'config.json').is_file():
      aux_router.check_vocabulary(cfg, vocabulary)
    checkpoint.claim(workdir, cfg)
    _keep_vocabulary(vocabulary, workdir)
    self.checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    closing.push(self._close_checkpoints)
    self.number, self.evaluated, self.last = 0, 0, {}
    self.saved: int | None = None
    self.state = self._restore(make)
    self.writers = []
    if jax.process_index() == 0:
      self.writers = metrics.open_writers(workdir, self.number, cfg)
    for writer in self.writers:
      closing.callback(writer.close)
    self.pending: _Pending | None = None
    self.clock = metrics.Clock(*self._flops())

  def _compile(self) -> Any:
    """Checks the settings against model and mesh; makes the functions."""
    cfg = self.cfg
    rows = cfg.data.batch_size // cfg.train.grad_accum_steps
    with _settings_checked():
      sharding.check_batch(rows, sharding.batch_shards(self.mesh))
      make, self.abstract = step.init(cfg, self.mesh)
      self.step = step.make_step(cfg, self.abstract)
      self.evaluation = step.make_evaluation(cfg)
      shape = (cfg.data.batch_size, cfg.data.seq_len)
      integer, real = (
          jax.ShapeDtypeStruct(shape, t) for t in (np.int32, np.float32))
      batch = pipeline.Batch(integer, integer, integer, real)
      jax.eval_shape(self.step, self.abstract, batch)
      for evaluate in self.evaluation.values():
        jax.eval_shape(evaluate, self.abstract.params, batch)
    total, activated = lm.count_params(cfg)
    self.progress.say(
        f'{total:,} parameters, {activated:,} of them used by a token;'
        f' {len(jax.devices())} device(s) of kind'
        f' {jax.devices()[0].device_kind!r}, mesh'
        f' {dict(self.mesh.shape)}, strategy {cfg.mesh.strategy}'
    )
    return make

  def _flops(self) -> tuple[float, float | None]:
    kind = jax.devices()[0].device_kind
    peak = chips.peak_flops(kind, len(jax.devices()))
    if peak is None:
      self.progress.say(
          f'no MFU: the peak FLOP/s of {kind!r} is not in chips.CHIPS')
    return flops.train_flops_per_token(self.cfg), peak

  def _restore(self, make: Any) -> step.State:
    """The state of the newest checkpoint, or a new one."""
    names = {k: v for k, v in self.abstract._asdict().items() if v is not None}
    restored = self.checkpoints.restore(names, self.data)
    if restored is None:
      return self._first_state(make)
    self.number = self.saved = restored.step
    self.evaluated = restored.progress['evaluated']
    self.last = restored.progress['last']
    self.progress.say(
        f'going on from step {restored.step} of {self.workdir}')
    return step.State(**({'ema': None} | restored.trees))

  def _first_state(self, make: Any) -> step.State:
    """A new state; in the second stage, with the model of the first one."""
    state = make()
    if self.cfg.train.init_from:
      params = aux_router.start(self.cfg, state.params)
      ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
      state = state._replace(params=params, ema=ema)
    return state

  def train(self) -> dict[str, Any]:
    """The loop."""
    train, every = self.cfg.train, self.cfg.checkpoint.every
    if self.number < train.steps:
      self.progress.say('compiling the training step')
    with self._profiler() as profile:
      while True:
        done = self.number >= train.steps
        stopping = self.stop.after(self.number)
        if not stopping and self._evaluation_due(done):
          self._evaluate()
          stopping = stopping or self.stop.interrupts
        if done or stopping or self.number % every == 0 < self.number:
          self._save()
        if done or stopping:
          break
        profile(self.number + 1)
        self._advance()
    self._finish()
    self.checkpoints.close()
    self._conclude()
    return dict(self.last)

  def _advance(self) -> None:
    """Starts the next step and fetches the metrics of the one before."""
    started = time.perf_counter()
    batch = sharding.shard_batch(next(self.data), self.mesh)
    data_time = time.perf_counter() - started
    self.state, values = self.step(self.state, batch)
    before, self.pending = self.pending, None
    if before is not None:
      self._fetch(before)
    self.number += 1
    self.pending = _Pending(self.number, values, data_time)
    self.checkpoints.check()

  def _finish(self) -> None:
    """Waits for the step that was started last and reports it."""
    if self.pending is not None:
      pending, self.pending = self.pending, None
      self._fetch(pending)

  def _fetch(self, pending: _Pending) -> None:
    values = jax.device_get(pending.metrics)
    self.clock.step(pending.data_time, int(values.tokens))
    nonfinite = values.consecutive_nonfinite
    if nonfinite >= self.cfg.train.max_nonfinite_steps:
      self._give_up(pending.number, values)
    train = self.cfg.train
    log = (pending.number % train.log_every == 0
           or pending.number in (1, train.steps))
    if not (log or self.progress.live):
      return
    record = self._record(pending.number, values)
    self.progress.show(record, self.clock.step_time)
    if log:
      self._write(record)

  def _record(self, number: int, values: step.StepMetrics) -> metrics.Record:
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
    self.checkpoints.wait()
    where = step.offender(
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
    due = done or (every and self.number % every == 0)
    return bool(
        due and self.number > self.evaluated and self.validation
    )

  def _evaluate(self) -> None:
    """Validation losses; nothing if a signal comes in between."""
    self._finish()
    params = self.state.params if self.state.ema is None else self.state.ema
    record: metrics.Record = {'step': self.number}
    modalities = self.cfg.model.modalities
    for suffix, evaluate in self.evaluation.items():
      total = losses.Sums(*[np.float64(0)] * 3)
      for batch in self.validation:
        if self.stop.interrupts:
          return
        sums = evaluate(params, sharding.shard_batch(batch, self.mesh))
        total = jax.tree.map(lambda a, b: a + np.asarray(b, np.float64),
                             total, sums)
      record |= losses.means(total, modalities, 'val_', suffix)
    self.evaluated = self.number
    self.progress.say(
        f'validation at step {self.number}: {metrics.losses_text(record)}')
    self._write(record)
    self.clock.restart()

  def _save(self) -> None:
    """Starts a checkpoint of this step unless there is one."""
    self._finish()
    if self.saved == self.number:
      return
    for writer in self.writers:
      writer.flush()
    state = {k: v for k, v in self.state._asdict().items() if v is not None}
    last = {k: v for k, v in self.last.items() if k not in metrics.TIMING_KEYS}
    self.checkpoints.save(
        self.number, state, self.data,
        {'evaluated': self.evaluated, 'last': last},
    )
    self.saved = self.number
    self.clock.restart()

  def _close_checkpoints(self, kind: Any, error: Any, trace: Any) -> None:
    """After an error: waits for the save under way, whose own error is less."""
    if error is not None:
      with contextlib.suppress(Exception):
        self.checkpoints.close()

  @contextlib.contextmanager
  def _profiler(self) -> Iterator[Any]:
    """Yields a function to call before each step; traces train.profile."""
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
    """Says where everything is."""
    places = [f'checkpoint {self.workdir}/checkpoints/{self.number}']
    if 'jsonl' in self.cfg.train.writers:
      places.append(f'metrics {self.workdir}/metrics.jsonl')
    if 'tensorboard' in self.cfg.train.writers:
      places.append(f'TensorBoard {self.workdir}/tensorboard')
    where = ', '.join(places)
    if self.stop.signal:
      self.progress.say(
          f'stopped by {self.stop.signal} at step {self.number} of'
          f' {self.cfg.train.steps}; the same command goes on. {where}')
    else:
      self.progress.say(f'done: {self.number} steps. {where}')
