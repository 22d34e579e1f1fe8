"""AdamW with a decay mask, its learning-rate schedule and averaged parameters.

`make` returns a transformation without the learning rate: the training step
scales by `schedule(step)`, so that a skipped step does not shift the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import numpy as jnp
import optax

from mom_jax import config, routing, rules

# Parameters that are scales, rates or offsets; decay would pull them to 0.
NOT_DECAYED = {'scale', 'bias', 'shift', 'shift_query'} | {
    f'conv_{name}_bias' for name in ('query', 'key', 'value')
} | {
    name
    for owner in (*rules.RULES.values(), *rules.FEATURE_MAPS.values())
    for name, constant in owner.constants.items()
    if not isinstance(constant.per, tuple)
} | {
    f'layers_{name}' for rule in rules.RULES.values()
    for name in rule.cross_layer
}


# What the second stage trains, and nothing else.
AUXILIARY = 'auxiliary'


def _name(path: tuple[Any, ...]) -> str:
  return path[-1].key


def frozen(params: Any, stage: str) -> Any:
  """A tree of bools: which leaves get no gradient.

  Router state; in stage 'aux_router' all but the auxiliary routers.
  """

  def one(path, _):
    if stage == 'aux_router':
      return all(key.key != AUXILIARY for key in path)
    return _name(path) in routing.STATE_NAMES

  return jax.tree_util.tree_map_with_path(one, params)


def decayed(params: Any, embeddings: bool) -> Any:
  """A tree of bools: which leaves weight decay shrinks.

  All but norm scales, constants of memory rules, biases and router state;
  embeddings only where `embeddings` says so.
  """

  def one(path, _):
    name = _name(path)
    if name.endswith('embedding'):
      return embeddings
    return name not in NOT_DECAYED | {*routing.STATE_NAMES}

  return jax.tree_util.tree_map_with_path(one, params)


def trainable(tree: Any, stage: str) -> Any:
  """`tree` without what is frozen (None in its place)."""
  return jax.tree.map(
      lambda x, fixed: None if fixed else x, tree, frozen(tree, stage)
  )


def make(
    cfg: config.Optimizer, params: Any, stage: str
) -> optax.GradientTransformation:
  """Clip, Adam and decay, to be scaled by minus the learning rate.

    u = m / (sqrt(v) + eps) + weight_decay * p

  What is frozen gets zero updates, no moments and no part in the norm.

  Args:
    params: a tree of the parameters' structure; only its paths are read.
    stage: of the training, as `frozen` takes it.
  Source: arXiv 1711.05101, algorithm 2, decay scaled by the learning rate.
  """
  parts = [
      optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
      optax.add_decayed_weights(
          cfg.weight_decay,
          lambda tree: decayed(tree, cfg.decay_embeddings),
      ),
  ]
  if cfg.clip_norm:
    parts.insert(0, optax.clip_by_global_norm(cfg.clip_norm))
  labels = jax.tree.map(
      lambda fixed: 'buffer' if fixed else 'weight', frozen(params, stage)
  )
  return optax.partition(
      {'weight': optax.chain(*parts), 'buffer': optax.set_to_zero()}, labels
  )


def schedule(
    cfg: config.Optimizer, steps: int
) -> Callable[[Any], jax.Array]:
  """Learning rate of a step, counted from 0, of a run of `steps` steps.

  A linear warm-up that reaches the peak after `warmup_steps` steps, then
  cosine or linear to `end_ratio` of the peak at the last step, or the peak
  throughout (constant), or the peak and a linear fall over the last
  `decay_fraction` of the steps (wsd, arXiv 2404.06395).
  """
  warmup, end = cfg.warmup_steps, cfg.end_ratio

  def rate(step):
    step = jnp.asarray(step, jnp.float32)
    begin = {
        'wsd': max(warmup, steps * (1 - cfg.decay_fraction)),
        'constant': steps,
    }.get(cfg.schedule, warmup)
    done = jnp.clip((step - begin) / max(1, steps - 1 - begin), 0, 1)
    if cfg.schedule == 'cosine':
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    up = jnp.minimum((step + 1) / max(1, warmup), 1)
    return cfg.learning_rate * up * (1 - (1 - end) * done)

  return rate


def average(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
  """Exponential moving average whose window grows with the run at first.

    ema = d ema + (1 - d) params,   d = min(decay, (1 + step) / (10 + step))
  """
  d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
