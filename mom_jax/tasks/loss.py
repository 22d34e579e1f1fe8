"""Losses by modality beside what token frequencies alone would give."""

from __future__ import annotations

import numpy as np

from mom_jax import config, figures, losses, metrics
from mom_jax.tasks.run import Result, Run


def loss(run: Run) -> Result:
  """Validation loss by modality, the unigram entropy and the margin, nats.

  'gap' is what causality costs a model whose experts chose tokens in training:
  the causal loss less that with the routers of training.
  """
  result = {
      mode: _by_modality(run, passed.losses)
      for mode, passed in run.passed.items()
  }
  if 'noncausal' in result:
    result['gap'] = {
        name: value['loss'] - result['noncausal'][name]['loss']
        for name, value in result['causal'].items()
    }
  return result


def _by_modality(run: Run, sums: losses.Sums) -> Result:
  loss_S, count_S = sums.loss_S, sums.count_S
  totals = dict(zip(run.cfg.model.modalities, zip(loss_S, count_S)))
  totals['all'] = loss_S.sum(), count_S.sum()
  result = {}
  for name, (total, count) in totals.items():
    if count:
      floor, mean = run.floor[name].nats, float(total / count)
      result[name] = {
          'loss': mean, 'unigram': floor, 'margin': floor - mean,
          'bits': mean / float(np.log(2)), 'targets': int(count),
      }
  return result


def curve(run: Run) -> Result:
  """The loss of training and validation over steps, as a picture."""
  records = metrics.read_jsonl(run.workdir)
  names = [m for m in run.cfg.model.modalities
           if figures.series(records, f'val_loss_{m}')[0]
           or figures.series(records, f'loss_{m}')[0]]
  if not names:
    raise config.UserError(
        f'{run.workdir}/metrics.jsonl has no losses to draw; train with'
        " 'jsonl' among config.train.writers, or leave --task=curve out."
    )
  floor = {name: entropy.nats for name, entropy in run.floor.items()}
  figures.loss_curve(run.workdir / 'loss_curve.png', records, names, floor)
  return {'picture': 'loss_curve.png', 'records': len(records)}
