"""Upcycling: several experts per modality from a model with one FFN each.

Every expert starts as a copy of the FFN of its modality (of the only FFN in a
dense model), behind a new router. All else is kept, the position in the data
included. With a norm on the output of the experts, the new model first equals
the seed for every token that some expert takes. The copies diverge because
routers, and `moma.noise` above all, give them different tokens.

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
from mom_jax.models import outputs
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
  """Make `workdir` a run of `cfg` that continues the run in `seed`.

  Args:
    seed: workdir of a dense model or of one with one expert per modality.
    cfg: the new model and training; its data must be the seed's.
    workdir: gets config, vocabulary, a checkpoint and a record of its seed.
    schedule: learning rate; 'restart' starts at step 0 with warm-up, 'continue'
      at the seed's step.
    optimizer: moments; 'reset' starts with zeros, 'copy' copies those of each
      FFN to its experts.
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
        f'--workdir={workdir} already holds a run; choose another one.')
  mesh = sharding.make_mesh(**cfg.mesh.sizes)
  vocabulary = tokenizers.load(seed, cfg.data.tokenizer.image)
  data = pipeline.train_iterator(cfg, vocabulary)
  with jax.set_mesh(mesh):
    _, old = step.init(first, mesh)
    restored = checkpoint.load_trees(seed, old.trees, data)
    state = _state(first, cfg, mesh, restored.trees, optimizer)
    step_index = restored.step if schedule == 'continue' else 0
    state = state._replace(counters=step.Counters(
        jnp.int32(step_index), jnp.int32(0), jnp.int32(0)))
    if step_index >= cfg.train.steps:
      raise config.UserError(
          f'config.train.steps={cfg.train.steps} is no more than the'
          f' {step_index} steps of --upcycle={seed}, which'
          ' --schedule=continue continues; raise it.'
      )
    checkpoint.claim(workdir, cfg)
    with checkpoint.writing(str(workdir)):
      vocabulary.save(workdir)
      (workdir / metrics.UPCYCLED).write_text(json.dumps({
          'seed': str(seed), 'seed_step': restored.step,
          'seed_flops': metrics.total_train_flops(
              seed, first, restored.step),
          'schedule': schedule, 'optimizer': optimizer,
      }, indent=2), encoding='utf-8')
    saved = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    saved.save(step_index, state.trees, data,
               {'evaluated': step_index, 'last': {},
                'config': checkpoint.fingerprint(cfg)})
    saved.close()
  data.close()


def check(
    first: config.Config, cfg: config.Config, seed: str | os.PathLike[str]
) -> None:
  """Raise UserError if a run of `first` cannot become one of `cfg`."""
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
        f'--upcycle={seed} replaces FFNs by experts and changes nothing'
        f' else; --config differs in {"; ".join(wrong)}.'
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
        ' dense model or one with one expert per modality can be upcycled.'
    )
  if len(old.moma.experts) != len(new.moma.experts) > 1 or (
      len(new.moma.experts) == 1 < len(old.moma.experts)):
    raise config.UserError(
        f'config.model.moma.experts={new.moma.experts} must have as many groups'
        f" as the seed's {old.moma.experts}; each copies one expert."
    )


def _state(first, cfg, mesh, trees, optimizer) -> step.State:
  """Make the new state: grown parameters, and moments if they are copied."""
  make, abstract = step.init(cfg, mesh)
  new = make()

  def grow(old, fresh):
    return grown(old, fresh, cfg.model)

  params = grow(trees['params'], new.params)
  ema = None
  if new.ema is not None:
    ema = grow(trees.get('ema', trees['params']), new.ema)
  state = new.optimizer
  if optimizer == 'copy':
    old, old_def = jax.tree.flatten(trees['optimizer'], is_leaf=_like_params)
    fresh, fresh_def = jax.tree.flatten(state, is_leaf=_like_params)
    if old_def != fresh_def:
      raise config.UserError(
          '--optimizer=copy needs the optimizer of the seed; config.optimizer'
          ' differs in what it keeps. Choose --optimizer=reset.'
      )
    state = jax.tree.unflatten(fresh_def, [
        grow(a, b) if _like_params(a) else a for a, b in zip(old, fresh)])
  state = step.State(params, state, new.counters, ema)
  return jax.device_put(state, jax.tree.map(lambda x: x.sharding, abstract))


def _like_params(tree: Any) -> bool:
  """Recognise a tree of parameters or moments."""
  return isinstance(tree, dict) and 'units' in tree


def grown(old: Any, fresh: Any, model: config.Model) -> Any:
  """Copy the old model's leaves, with FFNs repeated and routers from `fresh`.

  Args:
    old: parameters or moments of the seed.
    fresh: the same tree of a new model.
    model: settings of the new model.
  """
  units = {}
  for i, (_, channel) in enumerate(model.unit):
    name = outputs.block_name(i)
    units[name] = dict(old['units'][name])
    if channel == 'moma':
      units[name]['channel'] = _experts(
          old['units'][name]['channel'], fresh['units'][name]['channel'],
          model.moma.experts)
  return old | {'units': units}


def _experts(old, fresh, experts):
  """Copy FFNs to experts; take the rest from `fresh`."""
  kept = {k: v for k, v in old.items() if k.startswith('shared')}
  new = fresh | kept
  for name in ('gate_up', 'down'):
    if isinstance(old[name], dict):  # an MLP, the same for every modality
      ffn_REX = old[name]['kernel'][:, None]
      index_E = np.zeros(sum(experts), int)
    else:
      ffn_REX = old[name]
      index_E = np.repeat(np.arange(len(experts)), experts)
    new[name] = jnp.take(ffn_REX, index_E, axis=1)
  return new
