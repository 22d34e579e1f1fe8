"""Routing flips: decisions that change without the future of a token."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config, models
from mom_jax.models import eval_modes, outputs
from mom_jax.tasks.run import Result, Run, selections
from mom_jax.training import aux_router, metrics

POSITIONS = 16  # prefixes per sequence
ROWS = 16  # sequences of validation batches


def flips(run: Run) -> Result:
  """Fraction of (token, expert) decisions that change without the future.

  A decision in a batch of whole sequences, as in training, is compared with
  that on the sequence up to the token, alone. By mode, layer, part and
  modality, over tokens spread evenly over the first sequences of the validation
  batches; 'mixer' are memories. For auxiliary routers also their agreement with
  expert choice on the same hidden states.
  """
  result: Result = {}
  for mode, cfg in run.modes.items():
    counts = _count(run, cfg)
    result[mode] = {
        'prefixes': POSITIONS * min(
            ROWS, sum(len(batch.tokens) for batch in run.validation)),
        'layers': _layers(cfg, counts),
        'mean': _mean(cfg, counts),
    }
  if 'aux_causal' in eval_modes.routers(run.cfg).values():
    result['auxiliary'] = agreement_of_auxiliary(run)
  return result


class _Decisions(NamedTuple):
  """Decisions of a router: `selected` among those it `decided`.

  A decision is whether a memory or an expert that may take a token does.
  """

  selected: Any
  decided: Any


def _count(run: Run, cfg: config.Config) -> tuple[outputs.BlockAux, ...]:
  """Count changed and all decisions, by part of a layer [S, 2]."""
  alone = with_sequence_pool(cfg)
  total, seen = None, 0
  for batch in run.validation:
    if seen >= ROWS:
      break
    full = selected_by(cfg, run.params, batch)
    for row in range(min(len(batch.tokens), ROWS - seen)):
      prefixes, position_P = row_prefixes(batch, row)
      new = count_changes(
          jax.tree.map(lambda a, row=row: a[:, row], full),
          selected_by(alone, run.params, prefixes), position_P,
          batch.modality[row], len(cfg.model.modalities),
      )
      total = new if total is None else jax.tree.map(np.add, total, new)
      seen += 1
  return total


def with_sequence_pool(cfg: config.Config) -> config.Config:
  """Let the tokens of a sequence compete among themselves only."""
  moma = dataclasses.replace(cfg.model.moma, pool='sequence')
  model = dataclasses.replace(cfg.model, moma=moma)
  return dataclasses.replace(cfg, model=model)


@functools.partial(jax.jit, static_argnums=0)
def selected_by(cfg, params, batch) -> tuple[outputs.BlockAux, ...]:
  """Return the `_Decisions` of every router, [R, B, T, E]."""
  aux = models.LM(cfg).apply(
      {'params': params}, batch.tokens, batch.modality, batch.segment).aux
  valid_BT = batch.segment > 0
  allowed_BTE = models.Moma.allowed(
      jnp.where(valid_BT, batch.modality, -1), cfg.model.moma.experts)

  def decisions(decided_BTE, selected_RBTE):
    return _Decisions(
        selected_RBTE,
        jnp.broadcast_to(decided_BTE[None], selected_RBTE.shape))

  decided = outputs.BlockAux(
      valid_BT[..., None], allowed_BTE, valid_BT[..., None])
  return tuple(
      outputs.BlockAux(*(
          None if selected is None else decisions(of, selected)
          for of, selected in zip(decided, block)))
      for block in selections(aux))


def row_prefixes(batch: Any, row: int) -> tuple[Any, np.ndarray]:
  """Return a batch of prefixes of a sequence, and the last position of each."""
  length = max(1, int((batch.segment[row] > 0).sum()))  # padding comes last
  position_P = np.linspace(0, length - 1, POSITIONS).astype(int)
  until_PT = np.arange(batch.tokens.shape[1])[None] <= position_P[:, None]
  rows = [np.where(until_PT, field[row][None], 0) for field in batch]
  return type(batch)(*rows), position_P


def count_changes(full, prefix, position_P, modality_T, num_modalities):
  """Count changed and all decisions of a sequence, by part of a layer [S, 2].
  """
  of_SP = modality_T[position_P][None] == np.arange(num_modalities)[:, None]

  def one(whole, part):
    selected_RTE, decided_RTE = map(np.asarray, whole)
    row_P = np.arange(len(position_P))
    now_RPE = np.asarray(part.selected)[:, row_P, position_P]
    decided_RPE = decided_RTE[:, position_P]
    changed_RPE = (now_RPE ^ selected_RTE[:, position_P]) & decided_RPE
    both = np.stack([changed_RPE.sum(-1), decided_RPE.sum(-1)], -1)
    return np.einsum('rpc,sp->rsc', both, of_SP.astype(np.int64))

  return jax.tree.map(
      one, full, prefix, is_leaf=lambda x: isinstance(x, _Decisions))


def _layers(cfg, counts) -> Result:
  """Return {layer: {part: {modality: fraction}}}."""
  result: Result = {}
  for layer, part, count_S2 in outputs.layers(counts):
    result.setdefault(str(layer), {})[part] = _fractions(cfg, count_S2)
  return result


def _mean(cfg, counts) -> Result:
  """Return {part: {modality: fraction}} over all layers."""
  total = {}
  for _, part, count_S2 in outputs.layers(counts):
    total[part] = total.get(part, 0) + count_S2
  return {part: _fractions(cfg, count_S2) for part, count_S2 in total.items()}


def _fractions(cfg, count_S2) -> dict[str, float]:
  return {
      name: float(changed / decided)
      for name, (changed, decided) in zip(cfg.model.modalities, count_S2)
      if decided
  }


def agreement_of_auxiliary(run: Run) -> Result:
  """Compute accuracy, precision and recall of auxiliary routers."""
  cfg = eval_modes.oracle(run.cfg)
  modalities = cfg.model.modalities

  @jax.jit
  def one(params, batch):
    aux = models.LM(cfg).apply(
        {'params': params}, batch.tokens, batch.modality, batch.segment).aux
    return aux_router.agreement(aux, batch.modality, len(modalities))

  total = None
  for batch in run.validation:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64),
                       one(run.params, batch))
    total = new if total is None else jax.tree.map(np.add, total, new)
  return metrics.agreement(total, modalities)
