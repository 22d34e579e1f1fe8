"""Accuracy of a trained model on synthetic tasks.

Every answer follows the right answers before it, so a sample with all answers
right is one that the model would write itself.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from mom_jax import config, figures, models
from mom_jax.data import synthetic
from mom_jax.tasks.run import Result, Run, say
from mom_jax.training import losses

SAMPLES = 256  # per load
TOKENS = 1 << 14  # per batch, approximately
# tokens [B, T] -> logits of the next token [B, T, W]
Model = Callable[[np.ndarray], Float[Array, 'B T W']]


def recall(run: Run, text: str) -> Result:
  """Fractions of right answers of a task, at several loads.

  Args:
    text: 'mqar', or with settings, 'mqar:length=128'. Without the load among
      them, the loads are those of training, or if the run was trained on other
      data, the default loads of the task.
  Returns:
    {'over': the setting that is the load, 'loads': {spec: see `measure`}}, and
    a picture. A spec is named by the settings in which it differs from others.
  """
  asked = synthetic.parse(text)
  chosen = specs(run.cfg, text)
  key, apart = varied(chosen)
  found: Result = {}
  for spec in chosen:
    named = spec.text(*dict.fromkeys([*apart, *_given(text)]))
    documents = synthetic.open_documents(
        spec.text(*spec.settings), run.vocabulary, 'validation', SAMPLES)
    found[named] = measure(documents, functools.partial(
        _logits, run.modes['causal'], run.params))
    found[named][key] = spec.settings[key]
    say(f'{named}: {100 * found[named]["accuracy"]:.1f} % of answers right,'
        f' {100 * found[named]["samples"]:.1f} % of samples; chance is'
        f' {100 * found[named]["chance"]:.1f} %')
  picture = asked.name + '.png'
  points = {
      name: sorted((value[key], value[part]) for value in found.values())
      for name, part in (('answers', 'accuracy'), ('whole samples', 'samples'))
  }
  chance = min(value['chance'] for value in found.values())
  figures.lines(
      run.output / picture, {asked.task.doc: points}, key, 'fraction right',
      level={'chance of an answer': chance})
  return {'over': key, 'loads': found, 'picture': picture}


def specs(cfg: config.Config, text: str) -> list[synthetic.Spec]:
  """Return the tasks at the loads that a run is evaluated at."""
  asked, given = synthetic.parse(text), _given(text)
  key, loads = asked.task.load
  if key in given:
    return [asked]
  trained = [
      synthetic.parse(source.removeprefix(synthetic.NAME + ':'))
      for source in cfg.data.sources
      if source.split(':')[:2] == [synthetic.NAME, asked.name]
  ]
  if trained and not given:
    return trained
  return [asked.at(load) for load in loads]


def varied(chosen: list[synthetic.Spec]) -> tuple[str, list[str]]:
  """Return the setting that is the load, and all settings that differ.

  The load is that of the task, unless specs differ in other numbers only.
  """
  first, (load, _) = chosen[0], chosen[0].task.load
  differ = [key for key, value in first.settings.items()
            if any(spec.settings[key] != value for spec in chosen)]
  numbers = [key for key in differ if not isinstance(first.settings[key], str)]
  over = load if load in differ or not numbers else numbers[0]
  return over, list(dict.fromkeys([over, *differ]))


def _given(text: str) -> list[str]:
  return [item.partition('=')[0] for item in text.split(':')[1:]]


def measure(documents: synthetic.Documents, model: Model) -> Result:
  """Evaluate a model on samples.

  Returns:
    'accuracy', mean fraction of answers that the model ranks above all other
    candidates of the task, ties shared; 'error', its standard error over
    samples; 'samples', mean product of these over the answers of a sample;
    'loss' of the answers, nats, over the whole vocabulary; 'chance' of an
    answer; 'count' of samples.
  """
  count = len(documents.length_N)
  rows = max(1, min(count, TOKENS // int(documents.length_N[0])))
  right, nats = [], []
  for first in range(0, count, rows):
    some = range(first, min(first + rows, count))
    tokens_BT = np.stack([documents.part(i) for i in some])
    position_BA = np.stack([np.flatnonzero(documents.counts(i)) for i in some])
    fill = ((0, rows - len(some)), (0, 0))
    tokens_BT = np.pad(tokens_BT, fill)
    credit_BA, loss_BA = _score(
        model(tokens_BT), tokens_BT, np.pad(position_BA, fill),
        documents.answers)
    right.append(np.asarray(credit_BA, np.float64)[:len(some)])
    nats.append(np.asarray(loss_BA, np.float64)[:len(some)])
  right_NA = np.concatenate(right)
  each_N = right_NA.mean(1)
  return {
      'accuracy': float(each_N.mean()),
      'error': float(each_N.std() / np.sqrt(count)),
      'samples': float(right_NA.prod(1).mean()),
      'loss': float(np.concatenate(nats).mean()),
      'chance': 1 / len(documents.answers),
      'count': count,
  }


@jax.jit
def _score(logits_BTW, tokens_BT, position_BA, answers_C):
  """Return (credit, nats) of each answer.

  The credit is 1 / n if the answer is one of n candidates with the greatest
  logit, else 0.
  """
  before_BA1 = jnp.maximum(position_BA - 1, 0)[..., None]
  logits_BAW = jnp.take_along_axis(logits_BTW, before_BA1, 1)
  target_BA = jnp.take_along_axis(tokens_BT, position_BA, 1)
  log_z_BA, target_logit_BA = losses.log_z_and_target_logit(
      logits_BAW, target_BA)
  candidates_BAC = logits_BAW[..., answers_C]
  best_BA1 = candidates_BAC.max(-1, keepdims=True)
  ties_BA = (candidates_BAC == best_BA1).sum(-1)
  credit_BA = (target_logit_BA == best_BA1[..., 0]) / ties_BA
  return credit_BA, log_z_BA - target_logit_BA


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg: config.Config, params: Any, tokens_BT):
  return models.LM(cfg).apply({'params': params}, tokens_BT).logits
