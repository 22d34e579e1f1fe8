"""Code that benchmarks of training steps share: a state, batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mom_jax import config
from mom_jax.data import pipeline
from mom_jax.parallel import sharding
from mom_jax.training import step


class Training:
  """A state that moves on by one step a call."""

  def __init__(self, state: step.State):
    self.state = state

  def step(self, run: Callable[..., Any], batch: Any) -> Any:
    self.state, values = run(self.state, batch)
    return values


def with_attention(cfg: config.Config) -> config.Config:
  """The recipe with softmax attention as token mixer, heads filling the width.

  A recipe that has attention somewhere keeps its heads.
  """
  model = cfg.model
  pattern = ' '.join(f'attention/{channel}' for _, channel in model.unit)
  changes = [f'model.pattern={pattern}']
  if all(mixer != 'attention' for mixer, _ in model.unit):
    head = model.width // model.attention.num_heads
    changes.append(f'model.attention.head_dim={head}')
  return config.override(cfg, changes)


def with_length(
    cfg: config.Config, mesh: jax.sharding.Mesh, length: int
) -> config.Config:
  """Rows of `length` tokens, as many as hold the recipe's tokens a step."""
  unit = cfg.train.grad_accum_steps * sharding.batch_shards(mesh)
  rows = cfg.data.seq_len * cfg.data.batch_size // length // unit * unit
  return config.override(cfg, [
      f'data.seq_len={length}', f'data.batch_size={max(unit, rows)}'])


def random_batch(cfg: config.Config, mesh: jax.sharding.Mesh) -> pipeline.Batch:
  """Uniform tokens of uniform modality, one document a row."""
  random = np.random.default_rng(cfg.train.seed)
  shape = (cfg.data.batch_size, cfg.data.seq_len)
  draw = lambda below: random.integers(below, size=shape, dtype=np.int32)
  return sharding.shard_batch(pipeline.Batch(
      draw(cfg.model.vocab_size), draw(len(cfg.model.modalities)),
      np.ones(shape, np.int32), np.ones(shape, np.float32),
  ), mesh)
