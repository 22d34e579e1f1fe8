"""Losses by modality, compared with the unigram entropy."""

from __future__ import annotations

import numpy as np

from mom_jax import config, figures
from mom_jax.tasks.run import Result, Run
from mom_jax.training import losses, metrics


def loss(run: Run) -> Result:
  """Validation loss by modality, the unigram entropy and the margin, nats.

  'gap' is the cost of causality for a model trained with expert choice: the
  causal loss minus the loss with the routers of training. 'positions' are
  causal losses by the number of tokens before a target in its document, in
  doublings.
  """
  result = {
      mode: _by_modality(run, sums.losses)
      for mode, sums in run.validation_sums.items()
  }
  if 'noncausal' in result:
    result['gap'] = {
        name: value['loss'] - result['noncausal'][name]['loss']
        for name, value in result['causal'].items()
    }
  positions = by_position(run.validation_sums['causal'].position_T2)
  figures.lines(
      run.output / 'loss_position.png',
      {'loss by position': {
          'validation': [(p['from'], p['loss']) for p in positions]}},
      'tokens of the document before a target, or more', 'nats per token')
  return result | {'positions': positions, 'picture': 'loss_position.png'}


def by_position(position_T2: np.ndarray) -> list[Result]:
  """Average losses of targets after [1, 2), [2, 4), [4, 8), ... tokens."""
  found = []
  for low in 1 << np.arange(32):
    nats, weight = position_T2[low - 1:2 * low - 1].sum(0)
    if weight:
      found.append({'from': int(low), 'to': int(2 * low),
                    'loss': float(nats / weight), 'targets': float(weight)})
  return found


def _by_modality(run: Run, sums: losses.Sums) -> Result:
  loss_S, count_S = sums.loss_S, sums.count_S
  totals = dict(zip(run.cfg.model.modalities, zip(loss_S, count_S)))
  totals['all'] = loss_S.sum(), count_S.sum()
  result = {}
  for name, (total, count) in totals.items():
    if count:
      floor, mean = run.unigram_entropy[name].nats, float(total / count)
      result[name] = {
          'loss': mean, 'unigram': floor, 'margin': floor - mean,
          'bits': mean / float(np.log(2)), 'targets': int(count),
      }
  return result


def curve(run: Run) -> Result:
  """Draw training and validation loss over steps."""
  records = metrics.read_jsonl(run.workdir)
  names = [m for m in run.cfg.model.modalities
           if figures.series(records, f'val_loss_{m}')[0]
           or figures.series(records, f'loss_{m}')[0]]
  if not names:
    raise config.UserError(
        f'{run.workdir}/metrics.jsonl has no losses to draw; train with'
        " 'jsonl' among config.train.writers, or leave --task=curve out."
    )
  floor = {name: entropy.nats for name, entropy in run.unigram_entropy.items()}
  figures.loss_curve(run.output / 'loss_curve.png', records, names, floor)
  return {'picture': 'loss_curve.png', 'records': len(records)}
