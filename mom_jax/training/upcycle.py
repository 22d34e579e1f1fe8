"""Upcycling: a model with one FFN a modality becomes one with several experts.

Every expert of a modality starts as a copy of its FFN (of the only one, in a
dense model), behind a new router; all else is kept, the place in the data too.
Under a norm behind the experts the model is at first the seed's, for tokens
that some expert takes. Copies part because routers, and best `moma.noise`, give
them different tokens.

Source: arXiv 2407.21770, section 2.5; 2212.05055.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config
from mom_jax.data import pipeline, tokenizers
from mom_jax.parallel import sharding
from mom_jax.training import checkpoint, metrics, step

SCHEDULES = ('restart', 'continue')
OPTIMIZERS = ('reset', 'copy')
# Settings of the model that upcycling is there to change, or that change
# nothing that is computed.
_MAY_DIFFER = checkpoint.MAY_CHANGE + tuple(
    f'model.moma.{name}' for name in (
        'experts', 'hidden', 'router', 'top_k', 'capacity', 'pool', 'noise',
        'balance_rate', 'threshold_rate')
) + ('model.pattern', 'model.mlp.hidden')


def upcycle(
    seed: str | os.PathLike[str],
    cfg: config.Config,
    workdir: str | os.PathLike[str],
    schedule: str,
    optimizer: str,
) -> None:
  """Makes `workdir` a run of `cfg` that goes on from the run in `seed`.

  Args:
    seed: workdir of a dense model or of one with one expert a modality.
    cfg: the new model and training; its data must be the seed's.
    workdir: gets config, vocabulary, a checkpoint and a note of its seed.
    schedule: of the learning rate; 'restart' begins at step 0 with its warm-up,
      'continue' goes on at the seed's step.
    optimizer: 'reset' begins with zero moments, 'copy' gives each expert those
      of the FFN that it is a copy of.
  Raises:
    UserError: an unknown option, or the one model cannot become the other.
  """
  for name, value, known in (('schedule', schedule, SCHEDULES),
                             ('optimizer', optimizer, OPTIMIZERS)):
    if value not in known:
      raise config.UserError(
          f'--{name}={value} must be one of {", ".join(known)}.')
  seed, workdir = pathlib.Path(seed), pathlib.Path(workdir)
  first = checkpoint.read_config(seed)
  check(first, cfg, seed)
  if (workdir / 'config.json').exists():
    raise config.UserError(
        f'--workdir={workdir} holds a run already; choose another one.')
  mesh = sharding.make_mesh(**cfg.mesh.sizes)
  vocabulary = tokenizers.load(seed)
  data = pipeline.train_iterator(cfg, vocabulary)
  with jax.set_mesh(mesh):
    _, old = step.init(first, mesh)
    names = {k: v for k, v in old._asdict().items() if v is not None}
    restored = checkpoint.load_trees(seed, names, data)
    state = _state(first, cfg, mesh, restored.trees, optimizer)
    number = restored.step if schedule == 'continue' else 0
    state = state._replace(counters=step.Counters(
        jnp.int32(number), jnp.int32(0), jnp.int32(0)))
    if number >= cfg.train.steps:
      raise config.UserError(
          f'config.train.steps={cfg.train.steps} is no more than the'
          f' {number} steps of --upcycle={seed}, with which'
          ' --schedule=continue goes on; raise it.'
      )
    checkpoint.claim(workdir, cfg)
    with checkpoint.writing(str(workdir)):
      vocabulary.save(workdir)
      (workdir / metrics.UPCYCLED).write_text(json.dumps({
          'seed': str(seed), 'seed_step': restored.step,
          'seed_flops': metrics.spent_in(seed, first, restored.step),
          'schedule': schedule, 'optimizer': optimizer,
      }, indent=2), encoding='utf-8')
    saved = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    trees = {k: v for k, v in state._asdict().items() if v is not None}
    saved.save(number, trees, data, {'evaluated': number, 'last': {}})
    saved.close()
  data.close()


def check(
    first: config.Config, cfg: config.Config, seed: str | os.PathLike[str]
) -> None:
  """Raises UserError if a run of `first` cannot become one of `cfg`."""
  old, new = first.model, cfg.model
  wrong = [
      line for line in config.differing(first, cfg)
      if line.startswith(('config.model.', 'config.data.'))
      and line.split(':')[0].removeprefix('config.') not in _MAY_DIFFER
  ]
  if old.pattern.replace('/mlp', '/moma') != new.pattern.replace(
      '/mlp', '/moma') or any(
          (a, b) == ('moma', 'mlp')
          for (_, a), (_, b) in zip(old.unit, new.unit)):
    wrong.append(f'config.model.pattern: {old.pattern!r} -> {new.pattern!r}')
  if wrong:
    raise config.UserError(
        f'--upcycle={seed} gives experts to the channel mixers and changes'
        f' nothing else; --config differs in {"; ".join(wrong)}.'
    )
  for (_, was), (_, becomes) in zip(old.unit, new.unit):
    if becomes != 'moma':
      continue
    _check_experts(old, new, was, seed)


def _check_experts(old, new, was, seed) -> None:
  hidden = old.mlp.hidden if was == 'mlp' else old.moma.hidden
  key = 'mlp' if was == 'mlp' else 'moma'
  if new.moma.hidden != hidden:
    raise config.UserError(
        f'config.model.moma.hidden={new.moma.hidden} must be the'
        f" {hidden} of the seed's model.{key}.hidden; experts are copies."
    )
  if was == 'mlp':
    return
  if max(old.moma.experts) > 1:
    raise config.UserError(
        f'--upcycle={seed} has model.moma.experts={old.moma.experts}; only a'
        ' dense model or one with one expert a modality can be upcycled.'
    )
  if len(old.moma.experts) != len(new.moma.experts) > 1 or (
      len(new.moma.experts) == 1 < len(old.moma.experts)):
    raise config.UserError(
        f'config.model.moma.experts={new.moma.experts} must have as many groups'
        f" as the seed's {old.moma.experts}; each is copies of one expert."
    )


def _state(first, cfg, mesh, trees, optimizer) -> step.State:
  """The new state: grown parameters, and moments if they are copied."""
  make, abstract = step.init(cfg, mesh)
  new = make()
  grow = lambda old, fresh: grown(old, fresh, cfg.model)
  params = grow(trees['params'], new.params)
  ema = None
  if new.ema is not None:
    ema = grow(trees.get('ema', trees['params']), new.ema)
  state = new.optimizer
  if optimizer == 'copy':
    whole = lambda x: isinstance(x, dict) and 'units' in x
    old, old_def = jax.tree.flatten(trees['optimizer'], is_leaf=whole)
    fresh, fresh_def = jax.tree.flatten(state, is_leaf=whole)
    if old_def != fresh_def:
      raise config.UserError(
          '--optimizer=copy needs the optimizer of the seed; config.optimizer'
          ' differs in what it keeps. Choose --optimizer=reset.'
      )
    state = jax.tree.unflatten(fresh_def, [
        grow(a, b) if whole(a) else a for a, b in zip(old, fresh)])
  made = step.State(params, state, new.counters, ema)
  return jax.device_put(made, jax.tree.map(lambda x: x.sharding, abstract))


def grown(old: Any, fresh: Any, model: config.Model) -> Any:
  """A tree of the old model's leaves, FFNs repeated, routers from `fresh`.

  Args:
    old: parameters or moments of the seed.
    fresh: the same of a new model of settings `model`.
  """
  units = {}
  for i, (_, channel) in enumerate(model.unit):
    name = f'block_{i}'
    units[name] = dict(old['units'][name])
    if channel == 'moma':
      units[name]['channel'] = _experts(
          old['units'][name]['channel'], fresh['units'][name]['channel'],
          model.moma.experts)
  return old | {'units': units}


def _experts(old, fresh, experts):
  """Copies of FFNs, and what is new of `fresh`."""
  kept = {k: v for k, v in old.items() if k.startswith('shared')}
  made = fresh | kept
  for name in ('gate_up', 'down'):
    if isinstance(old[name], dict):  # an MLP, the same for every modality
      ffn_REX = old[name]['kernel'][:, None]
      index_E = np.zeros(sum(experts), int)
    else:
      ffn_REX = old[name]
      index_E = np.repeat(np.arange(len(experts)), experts)
    made[name] = jnp.take(ffn_REX, index_E, axis=1)
  return made
