"""Cost of random routing errors: a cliff would fail in use."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config, figures, models
from mom_jax.models import eval_modes, outputs
from mom_jax.tasks.run import Result, Run
from mom_jax.training import losses

ERROR_PROBS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
NAMES = {'mixer': 'memories', 'channel': 'experts', 'mod': 'blocks'}


def errors(run: Run) -> Result:
  """Validation loss by error probability, evaluation mode and kind of router.

  A decision is whether an expert takes a token, or which memory or expert a
  token chose (see `routing.with_random_errors`). Errors are drawn in all
  layers; a higher probability includes the errors of a lower one.
  """
  result: Result = {}
  panels = {}
  for mode, cfg in run.modes.items():
    result[mode] = {}
    known = routers(cfg)
    for part, router in known.items():
      losses_P = [
          _losses(run, cfg, {p: prob if p == part else 0.0 for p in known})
          for prob in ERROR_PROBS]
      result[mode][part] = {
          'router': router, 'error_probs': list(ERROR_PROBS),
          'loss': {name: [by_name[name] for by_name in losses_P]
                   for name in losses_P[0]},
      }
      panels[f'{mode}: {NAMES[part]}, {router}'] = {
          name: (ERROR_PROBS, [by_name[name] - losses_P[0][name]
                               for by_name in losses_P])
          for name in losses_P[0]
      }
  if not panels:
    raise config.UserError(
        f'--task=errors: {run.workdir} has no router that decides anything.')
  figures.errors(run.output / 'errors.png', panels)
  return result | {'picture': 'errors.png'}


def routers(cfg: config.Config) -> dict[str, str]:
  """Name the router of each part that has something to decide."""
  model, found = cfg.model, {}
  if any(m == 'mom' for m, _ in model.unit) and model.mixer.num_memories > 1:
    found['mixer'] = model.mixer.router
  names = {'moma': 'channel', 'mod': 'mod'}
  return found | {
      names[part]: router for part, router in eval_modes.routers(cfg).items()}


def collection(cfg: config.Config, error_probs: dict[str, Any]) -> Any:
  """Make the collection 'errors' of a model from probabilities by part."""
  result = {}
  blocks = zip(cfg.model.unit, cfg.model.mod_blocks)
  for i, ((mixer, channel), is_mod) in enumerate(blocks):
    has = {'mixer': mixer == 'mom', 'channel': channel == 'moma', 'mod': is_mod}
    result[outputs.block_name(i)] = {
        part: {'error_prob': jnp.full(cfg.model.repeats, prob)}
        for part, prob in error_probs.items() if has[part]
    }
  return {'units': result}


def _losses(
    run: Run, cfg: config.Config, error_probs: dict[str, float]
) -> dict[str, float]:
  """Return mean losses by modality over the validation batches."""
  sums = [
      _sums(cfg, run.params, batch, error_probs, jax.random.key(i))
      for i, batch in enumerate(run.validation)
  ]
  total = jax.tree.map(
      lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *sums)
  found = losses.means(total, cfg.model.modalities)
  return {'all' if key == 'loss' else key.removeprefix('loss_'): value
          for key, value in found.items()}


@functools.partial(jax.jit, static_argnums=0)
def _sums(cfg, params, batch, error_probs, key):
  output = models.LM(cfg).apply(
      {'params': params, 'errors': collection(cfg, error_probs)},
      batch.tokens, batch.modality, batch.segment, rngs={'errors': key})
  return losses.cross_entropy(
      output.logits, *losses.targets(*batch), len(cfg.model.modalities))
