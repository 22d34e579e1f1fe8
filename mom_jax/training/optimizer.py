"""AdamW with a decay mask, its learning-rate schedule, and averaged parameters.

`make` returns a transformation without the learning rate: the training step
scales by `lr_schedule`, so that a skipped step does not shift the schedule.
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
    for entry in (*rules.RULES.values(), *rules.FEATURE_MAPS.values())
    for name, constant in entry.constants.items()
    if not isinstance(constant.per, tuple)
} | {
    f'layers_{name}' for rule in rules.RULES.values()
    for name in rule.cross_layer
}


# The modules that stage aux_router trains, and nothing else.
AUXILIARY = 'auxiliary'


def _name(path: tuple[Any, ...]) -> str:
  return path[-1].key


def frozen(params: Any, stage: str) -> Any:
  """Mark the leaves without gradient in a tree of bools.

  These are router state, and in stage 'aux_router' all but auxiliary routers.
  """

  def one(path, _):
    if stage == 'aux_router':
      return all(key.key != AUXILIARY for key in path)
    return _name(path) in routing.STATE_NAMES

  return jax.tree_util.tree_map_with_path(one, params)


def decayed(params: Any, embeddings: bool) -> Any:
  """Mark the leaves that weight decay shrinks in a tree of bools.

  All but norm scales, constants of memory rules, biases and router state;
  embeddings if `embeddings`.
  """

  def one(path, _):
    name = _name(path)
    if name.endswith('embedding'):
      return embeddings
    return name not in NOT_DECAYED | {*routing.STATE_NAMES}

  return jax.tree_util.tree_map_with_path(one, params)


def trainable(tree: Any, stage: str) -> Any:
  """Replace frozen leaves by None."""
  return jax.tree.map(
      lambda x, fixed: None if fixed else x, tree, frozen(tree, stage)
  )


def squared_norms(tree: Any) -> Any:
  """Sum the squares of each leaf: [R] for the R repeats of a layer, or []."""

  def one(path, x):
    return jnp.square(x).sum(tuple(range(int(path[0].key == 'units'), x.ndim)))

  return jax.tree_util.tree_map_with_path(one, tree)


def global_norm(tree: Any) -> jax.Array:
  """Compute the norm of all leaves together."""
  return jnp.sqrt(sum(
      square.sum() for square in jax.tree.leaves(squared_norms(tree))))


def make(
    cfg: config.Optimizer, params: Any, stage: str
) -> optax.GradientTransformation:
  """Make a transformation to be scaled by minus the learning rate.

    u = m / (sqrt(v) + eps) + weight_decay * p

  Frozen leaves get zero updates, no moments and no part in the norm.

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
    parts.insert(0, _clip_by_global_norm(cfg.clip_norm))
  labels = jax.tree.map(
      lambda fixed: 'buffer' if fixed else 'weight', frozen(params, stage)
  )
  return optax.partition(
      {'weight': optax.chain(*parts), 'buffer': optax.set_to_zero()}, labels
  )


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """Scale updates to a global norm of at most `max_norm`.

  optax's own selects between two gradients, for which a CPU's compiler makes
  every loop of the optimizer twice.
  """

  def clip(updates, _):
    factor = jnp.minimum(1, max_norm / global_norm(updates))
    return jax.tree.map(lambda u: factor * u, updates)

  return optax.stateless(clip)


def remark(cfg: config.Optimizer, steps: int) -> str | None:
  """Say what makes no sense about a schedule over `steps` steps, if so."""
  if cfg.warmup_steps <= steps:
    return None
  return (
      f'note: optimizer.warmup_steps={cfg.warmup_steps} is above'
      f' train.steps={steps}, so the learning rate never reaches'
      f' optimizer.learning_rate={cfg.learning_rate:g}')


def lr_schedule(
    cfg: config.Optimizer, steps: int
) -> Callable[[Any], jax.Array]:
  """Return the learning rate as a function of the step index, from 0.

  A linear warm-up that reaches the peak after `warmup_steps` steps, then
  cosine or linear to `end_ratio` of the peak at the last step, or the peak
  throughout (constant), or the peak and a linear fall over the last
  `decay_fraction` of the steps (wsd, arXiv 2404.06395).
  """
  warmup, end = cfg.warmup_steps, cfg.end_ratio

  def learning_rate(step_index):
    step = jnp.asarray(step_index, jnp.float32)
    begin = {
        'wsd': max(warmup, steps * (1 - cfg.decay_fraction)),
        'constant': steps,
    }.get(cfg.schedule, warmup)
    done = jnp.clip((step - begin) / max(1, steps - 1 - begin), 0, 1)
    if cfg.schedule == 'cosine':
      done = (1 - jnp.cos(jnp.pi * done)) / 2
    up = jnp.minimum((step + 1) / max(1, warmup), 1)
    return cfg.learning_rate * up * (1 - (1 - end) * done)

  return learning_rate


def update_ema(
    ema: Any, params: Any, step_index: jax.Array, decay: float
) -> Any:
  """Update an exponential moving average whose window grows with the run.

    ema = d ema + (1 - d) params,   d = min(decay, (1 + i) / (10 + i))

  with the step index i.
  """
  d = jnp.minimum(decay, (1.0 + step_index) / (10.0 + step_index))
  return jax.tree.map(lambda e, p: e + (1 - d) * (p - e), ema, params)
