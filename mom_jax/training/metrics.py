"""Metrics of a run: metrics.jsonl, TensorBoard, W&B and the progress line.

A record is a dict with 'step' and named values, floats or lists of floats (one
value per memory or expert). All but `TIMING_KEYS` are deterministic: a run that
was killed and resumed leaves the same file as one that was not.

  loss, loss_text, ...    mean cross-entropy in nats, by modality of the target;
                          with '_noncausal' where the router sees the future
  val_loss, ...           the same on held-out documents
  total_loss              the scalar that the step minimises
  balance_loss            balance loss of the token mixers, before its weight
  aux_router_loss         total loss in the training of auxiliary routers: the
                          cross-entropy of their decisions, nats
  log_z2                  mean log(Z)^2, before its weight
  learning_rate, grad_norm, param_norm
  nonfinite_steps         steps skipped so far, with a loss or gradient that was
                          not finite
  entropy/mixer, entropy/channel, entropy/mod
                                        mean router entropy, nats
  load/layer_00/mixer                   fraction of the layer's rows that each
                                        memory (channel: expert) took
  load_min/mixer, load_max/mixer        least and greatest such fraction
  tokens_without_expert, tokens_with_1_expert, tokens_with_2plus_experts
                                        fractions of tokens, mean over layers
  tokens_kept/layer_00                  fraction of tokens that a
                                        Mixture-of-Depths block processes
  accuracy/channel, precision/channel, recall/channel
                                        of auxiliary routers, means; also by
                                        layer and modality, accuracy/layer_00/
                                        channel/text; `mod` like `channel`
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mom_jax import compilation, config
from mom_jax.models import flops, outputs
from mom_jax.training import checkpoint

Record = dict[str, Any]

# Values that depend on the clock: tokens per second, padding left out, and the
# seconds of a step and of waiting for its data, over the last WINDOW steps.
TIMING_KEYS = (
    'time', 'tokens_per_s', 'step_time_p50', 'step_time_p90', 'step_time_max',
    'data_time_p50', 'mfu',
)
WINDOW = 200


@runtime_checkable
class Writer(Protocol):
  """Destination of records."""

  def write(self, record: Record) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


class Jsonl:
  """JSON Lines file workdir/metrics.jsonl.

  Args:
    workdir: of the run.
    step: records of later steps, left by a run that died after its last
      checkpoint, are removed; so is a last line that is cut off. All other
      lines stay as they are.
  """

  def __init__(self, workdir: str | os.PathLike[str], step: int):
    self._path = pathlib.Path(workdir) / 'metrics.jsonl'
    with checkpoint.writing(f'{self._path}'):
      whole, _, last = _bytes(self._path).rpartition(b'\n')
      if _record(last):  # whole but for its end
        whole += b'\n' * bool(whole) + last
      lines = whole.split(b'\n') if whole else []
      kept = [line + b'\n' for line in lines
              if (_record(line) or {'step': 0})['step'] <= step]
      partial = self._path.with_suffix('.jsonl.partial')
      partial.write_bytes(b''.join(kept))
      partial.replace(self._path)
      self._file = self._path.open('a', encoding='utf-8')

  def write(self, record: Record) -> None:
    # JSON has no nan or inf; null is written for both.
    record = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v
        for k, v in record.items()
    }
    with checkpoint.writing(f'{self._path}'):
      self._file.write(json.dumps(record) + '\n')
      self._file.flush()

  def flush(self) -> None:
    with checkpoint.writing(f'{self._path}'):
      self._file.flush()
      os.fsync(self._file.fileno())

  def close(self) -> None:
    with checkpoint.writing(f'{self._path}'):
      self._file.close()


def read_jsonl(workdir: str | os.PathLike[str]) -> list[Record]:
  """Read the records of workdir/metrics.jsonl; other lines are left out."""
  lines = _bytes(pathlib.Path(workdir) / 'metrics.jsonl').split(b'\n')
  return [record for line in lines if (record := _record(line))]


def _bytes(path: pathlib.Path) -> bytes:
  return path.read_bytes() if path.is_file() else b''


def _record(line: bytes) -> Record | None:
  """Return the record of a line, or None if it holds none."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):  # not UTF-8, or not JSON
    return None
  if isinstance(record, dict) and isinstance(record.get('step'), int):
    return record
  return None


class TensorBoard:
  """Scalars in workdir/tensorboard; later steps of a dead run are purged.

  Events are written by the thread that makes them: tensorboardX's own writer
  has one for it, which ends without a word on a full disk and blocks the run.
  """

  def __init__(self, workdir: str | os.PathLike[str], step: int):
    from tensorboardX import event_file_writer, summary  # slow to import
    from tensorboardX.proto import event_pb2

    self._folder = pathlib.Path(workdir) / 'tensorboard'
    self._scalar, self._event = summary.scalar, event_pb2.Event
    with checkpoint.writing(f'{self._folder}'):
      self._folder.mkdir(parents=True, exist_ok=True)
      self._writer = event_file_writer.EventsWriter(
          str(self._folder / 'events'), f'.{step}.{os.getpid()}')
      if step:
        self._add(step + 1, session_log=event_pb2.SessionLog(
            status=event_pb2.SessionLog.START))

  def _add(self, step: int, **what: Any) -> None:
    self._writer.write_event(
        self._event(wall_time=time.time(), step=step, **what))

  def write(self, record: Record) -> None:
    with checkpoint.writing(f'{self._folder}'):
      for key, value in flatten(record).items():
        self._add(record['step'], summary=self._scalar(key, value))

  def flush(self) -> None:
    with checkpoint.writing(f'{self._folder}'):
      self._writer.flush()

  def close(self) -> None:
    with checkpoint.writing(f'{self._folder}'):
      self._writer.close()


class Wandb:
  """Weights & Biases; one W&B run a workdir, rewound when a run resumes."""

  def __init__(
      self, workdir: str | os.PathLike[str], step: int, cfg: config.Config
  ):
    try:
      import wandb
    except ImportError as e:
      raise config.UserError(
          "config.train.writers has 'wandb', which is not installed; pip"
          ' install wandb or leave it out.'
      ) from e
    path = pathlib.Path(workdir) / 'wandb_run.txt'
    with checkpoint.writing(f'{path}'):
      if not path.is_file():
        path.write_text(wandb.util.generate_id(), encoding='utf-8')
      name = path.read_text(encoding='utf-8').strip()
      resumed = dict(resume_from=f'{name}?_step={step}') if step else dict(
          id=name, resume='allow')
      self._run = wandb.init(
          project='mom_jax', dir=str(workdir),
          config=json.loads(config.to_json(cfg)), **resumed,
      )

  def write(self, record: Record) -> None:
    self._run.log(flatten(record), step=record['step'])

  def flush(self) -> None:
    pass  # its own process sends what it was given

  def close(self) -> None:
    self._run.finish()


def open_writers(
    workdir: str | os.PathLike[str], step: int, cfg: config.Config
) -> list[Writer]:
  """Open the writers of `train.writers`, to continue after `step`."""
  make = {
      'jsonl': lambda: Jsonl(workdir, step),
      'tensorboard': lambda: TensorBoard(workdir, step),
      'wandb': lambda: Wandb(workdir, step, cfg),
  }
  return [make[name]() for name in cfg.train.writers]


def flatten(record: Record) -> dict[str, float]:
  """Name every entry of a list, 'load/layer_00/mixer/3'."""
  out = {}
  for key, value in record.items():
    if isinstance(value, list):
      out |= {f'{key}/{i}': x for i, x in enumerate(value)}
    elif key != 'step':
      out[key] = value
  return out


# Values.


def routing(counts: Sequence[outputs.BlockAux]) -> Record:
  """Name the `step.RoutingCounts` of a step."""
  load, low, high, entropy, taken = {}, {}, {}, {}, []
  for layer, part, count in outputs.layers(counts):
    entropy.setdefault(part, []).append(float(count.entropy))
    total = max(1, count.taken_3.sum())
    if part == 'mod':
      load[f'tokens_kept/layer_{layer:02}'] = float(count.load_E[0] / total)
      continue
    fraction_E = count.load_E / max(1, count.load_E.sum())
    load[f'load/layer_{layer:02}/{part}'] = fraction_E.tolist()
    low.setdefault(part, []).append(float(fraction_E.min()))
    high.setdefault(part, []).append(float(fraction_E.max()))
    if part == 'channel':
      taken.append(count.taken_3 / total)
  record = {f'entropy/{k}': float(np.mean(v)) for k, v in entropy.items()}
  record |= {f'load_min/{k}': min(v) for k, v in low.items()}
  record |= {f'load_max/{k}': max(v) for k, v in high.items()}
  if taken:
    names = ('tokens_without_expert', 'tokens_with_1_expert',
             'tokens_with_2plus_experts')
    mean_3 = np.stack(taken).mean(0)
    record |= {k: float(x) for k, x in zip(names, mean_3)}
  return record | dict(sorted(load.items()))


def agreement(
    counts: Sequence[outputs.BlockAux], modalities: tuple[str, ...]
) -> Record:
  """Compute accuracy, precision and recall of auxiliary routers.

  Args:
    counts: `aux_router.Agreement` by part of a layer, [S] each.
  """
  record, found = {}, {}
  for layer, part, counts_S in outputs.layers(counts):
    for modality, both, predicted, selected, neither in zip(
        modalities, *counts_S):
      for key, right, total in (
          ('accuracy', both + neither, both + predicted + selected + neither),
          ('precision', both, both + predicted),
          ('recall', both, both + selected)):
        if total:
          value = float(right / total)
          record[f'{key}/layer_{layer:02}/{part}/{modality}'] = value
          found.setdefault(f'{key}/{part}', []).append(value)
  means = {key: float(np.mean(values)) for key, values in found.items()}
  return means | dict(sorted(record.items()))


UPCYCLED = 'upcycled.json'  # a record of the seed in an upcycled workdir


def train_flops(cfg: config.Config, steps: int) -> float:
  """Count the FLOPs of training steps, padding included."""
  tokens = steps * cfg.data.batch_size * cfg.data.seq_len
  return tokens * flops.train_flops_per_token(cfg)


def read_upcycled(workdir: str | os.PathLike[str]) -> Record:
  """Read the record of the run that a run was upcycled from, {} if none."""
  path = pathlib.Path(workdir) / UPCYCLED
  if not path.is_file():
    return {}
  return json.loads(path.read_text(encoding='utf-8'))


def total_train_flops(
    workdir: str | os.PathLike[str], cfg: config.Config, step: int
) -> float:
  """Count the FLOPs of a run up to a step, with those of its upcycling seed."""
  note = read_upcycled(workdir)
  if not note:
    return train_flops(cfg, step)
  first = note['seed_step'] if note['schedule'] == 'continue' else 0
  return note['seed_flops'] + train_flops(cfg, step - first)


class Clock:
  """Speed of training over the last WINDOW steps.

  Args:
    flops_per_token: of a training step.
    peak: FLOP/s of all devices, or None if unknown.
  """

  def __init__(self, flops_per_token: float, peak: float | None):
    self._flops, self._peak = flops_per_token, peak
    self._steps: deque[tuple[float, float, int]] = deque(maxlen=WINDOW)
    self._last: float | None = None

  def restart(self) -> None:
    """Leave the time since the last step out of the next one."""
    self._last = time.perf_counter()

  def step(self, data_time: float, tokens: int) -> None:
    """Count a finished step of `tokens` that waited `data_time` s for data."""
    now = time.perf_counter()
    if self._last is not None:
      self._steps.append((now - self._last, data_time, tokens))
    self._last = now

  @property
  def count(self) -> int:
    """Timed steps, at most WINDOW."""
    return len(self._steps)

  @property
  def step_time(self) -> float | None:
    """Median seconds per step, or None before the second step."""
    if not self._steps:
      return None
    return float(np.median([s for s, _, _ in self._steps]))

  def record(self) -> Record:
    """Return the `TIMING_KEYS` that are known."""
    out = {'time': time.time()}
    if self._steps:
      step, data, tokens = np.array(self._steps).T
      speed = tokens.sum() / step.sum()
      out |= {
          'tokens_per_s': float(speed),
          'step_time_p50': float(np.percentile(step, 50)),
          'step_time_p90': float(np.percentile(step, 90)),
          'step_time_max': float(step.max()),
          'data_time_p50': float(np.percentile(data, 50)),
      }
      if self._peak is not None:
        out['mfu'] = float(speed * self._flops / self._peak)
    return out


# The progress line.


class Progress:
  """Progress display: one live line on a terminal, else a line per record.

  Args:
    steps: of the whole run.
    prints: False in all processes but one.
  """

  def __init__(self, steps: int, prints: bool = True):
    self._steps = steps
    self._out = sys.stdout if prints else open(os.devnull, 'w')  # noqa: SIM115
    self._live = self._out.isatty()
    self._shown = 0

  @property
  def live(self) -> bool:
    """True if the line may change with every step."""
    return self._live

  def say(self, text: str) -> None:
    """Print a line that stays."""
    self._clear()
    print(text, file=self._out, flush=True)

  def waiting(self, text: str) -> contextlib.AbstractContextManager[None]:
    """Say that the run waits for `text`, and for how long."""
    self._clear()
    return compilation.waiting(text, self._out)

  def show(self, record: Record, step_time: float | None) -> None:
    """Show a training record."""
    text = summary(record, self._steps, step_time)
    if not self._live:
      print(text, file=self._out, flush=True)
      return
    text = text[: shutil.get_terminal_size().columns - 1]
    self._clear()
    print(text, end='', file=self._out, flush=True)
    self._shown = len(text)

  def _clear(self) -> None:
    if self._shown:
      print('\r' + ' ' * self._shown + '\r', end='', file=self._out)
      self._shown = 0


def losses_text(record: Record) -> str:
  """Format the losses of a record, 'loss_text 1.234  loss_image 4.567'."""
  return '  '.join(
      f'{k} {v:.3f}' for k, v in record.items() if 'loss' in k.split('_')
  )


def summary(record: Record, steps: int, step_time: float | None) -> str:
  """Format the progress line: step, losses, speed, learning rate, ETA."""
  parts = [f'step {record["step"]}/{steps}', losses_text(record)]
  if 'tokens_per_s' in record:
    parts.append(f'{record["tokens_per_s"]:,.0f} tokens/s')
  if 'mfu' in record:
    parts.append(f'MFU {record["mfu"]:.1%}')
  parts.append(f'lr {record["learning_rate"]:.2e}')
  if step_time is not None:
    parts.append(f'ETA {duration(step_time * (steps - record["step"]))}')
  return '  '.join(parts)


def duration(seconds: float) -> str:
  """Format seconds as hours:minutes:seconds."""
  whole = int(seconds)
  return f'{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}'
