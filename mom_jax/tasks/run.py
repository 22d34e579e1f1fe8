"""A trained model, and results that several tasks share."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config, models
from mom_jax.data import pipeline, tokenizers, unigram
from mom_jax.inference import decode
from mom_jax.models import eval_modes, layers, outputs
from mom_jax.training import checkpoint, losses

Result = dict[str, Any]


def say(text: str) -> None:
  """Print a line of progress."""
  print(text, file=sys.stderr, flush=True)


class ValidationSums(NamedTuple):
  """Sums over the validation batches.

  Attributes:
    losses: by modality of the target.
    tokens_S: input tokens of each modality.
    load: by part of a layer [S, E], tokens of modality s that memory or expert
      e took.
    experts_per_token: by layer with experts [S, 3], tokens of modality s with
      no expert, one, and more.
    token_counts: by part of a layer [E, W], how often a memory or expert took
      each token of the vocabulary.
    position_T2: nats and weight of targets after t + 1 tokens of their
      document.
  """

  losses: losses.Sums
  tokens_S: np.ndarray
  load: tuple[outputs.BlockAux, ...]
  experts_per_token: tuple[outputs.BlockAux, ...]
  token_counts: tuple[outputs.BlockAux, ...]
  position_T2: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
  """A trained model and cached results.

  Attributes:
    workdir: folder of the run.
    step: of the checkpoint.
    output_folder: for results, where it is not the workdir.
  """

  workdir: pathlib.Path
  cfg: config.Config
  params: Any
  step: int
  vocabulary: tokenizers.Vocabulary
  output_folder: pathlib.Path | None = None

  @property
  def output(self) -> pathlib.Path:
    """Folder where results go."""
    return self.output_folder or self.workdir

  @functools.cached_property
  def modes(self) -> dict[str, config.Config]:
    """Settings of each evaluation mode, see `eval_modes.modes`."""
    decode.causal_mode(self.cfg)  # raises if the model cannot be causal
    return eval_modes.modes(self.cfg)

  @functools.cached_property
  def validation(self) -> list[Any]:
    """Batches of held-out documents.

    Raises:
      UserError: nothing is held out.
    """
    documents = pipeline.open_all(self.cfg, self.vocabulary)
    changed = config.override(self.cfg, ['data.allow_changed=true'])
    for line in pipeline.keep_documents(
        self.workdir, changed, documents, write=False):
      say(f'warning: {line}')
    batches = pipeline.validation_batches(
        self.cfg, self.vocabulary, documents=documents)
    if not batches:
      raise config.UserError(
          f'config.data.validation={self.cfg.data.validation} holds out no'
          ' document, so nothing can be evaluated; train with more.'
      )
    return batches

  @functools.cached_property
  def unigram_entropy(self) -> dict[str, unigram.Entropy]:
    """Unigram entropy of the validation targets by modality."""
    counts_W = unigram.counts(self.cfg, self.vocabulary)
    return unigram.unigram_entropy(
        counts_W, self.validation, self.cfg.model.modalities)

  @functools.cached_property
  def validation_sums(self) -> dict[str, ValidationSums]:
    """Sums over the validation batches, by evaluation mode."""
    return {
        mode: _validate(cfg, self.params, self.validation)
        for mode, cfg in self.modes.items()
    }


def _validate(
    cfg: config.Config, params: Any, batches: list[Any]
) -> ValidationSums:
  """Run the model on all batches and add up in float64."""
  modalities = jnp.arange(len(cfg.model.modalities))

  @jax.jit
  def one(params, batch):
    output = models.LM(cfg).apply(
        {'params': params}, batch.tokens, batch.modality, batch.segment)
    of_SBT = (batch.modality[None] == modalities[:, None, None]) & (
        batch.segment > 0)[None]
    selected = selections(output.aux)
    load = outputs.map_parts(
        functools.partial(_load, of_SBT=of_SBT), selected)
    experts_per_token = outputs.map_parts(
        functools.partial(_experts_per_token, of_SBT=of_SBT),
        [outputs.BlockAux(None, block.channel) for block in selected])
    token_counts = outputs.map_parts(
        functools.partial(_token_counts, cfg, batch), selected)
    sums = losses.cross_entropy(
        output.logits, *losses.targets(*batch), len(cfg.model.modalities))
    return ValidationSums(
        sums, of_SBT.sum((1, 2)), load, experts_per_token, token_counts,
        _by_position(output.logits, batch))

  total = None
  for batch in batches:
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), one(params, batch))
    total = new if total is None else jax.tree.map(np.add, total, new)
  return total


def selections(
    aux: tuple[outputs.BlockAux, ...]
) -> tuple[outputs.BlockAux, ...]:
  """Return `selected_BTE` of every part that routes, repeats first."""
  return outputs.map_parts(
      lambda part: None if part.stats is None else part.stats.selected_BTE, aux)


def _load(selected_RBTE, of_SBT):
  """Count the tokens that each memory or expert took, [R, S, E]."""
  return jnp.einsum('rbte,sbt->rse', selected_RBTE.astype(jnp.float32),
                    of_SBT.astype(jnp.float32))


def _token_counts(cfg, batch, selected_RBTE):
  """Count how often each memory or expert took each token, [R, E, W]."""
  count_BT = (batch.segment > 0).astype(jnp.float32)
  at_WRE = jnp.zeros(
      (cfg.model.vocab_size, *selected_RBTE.shape[::3]), jnp.float32)
  took_BTRE = jnp.moveaxis(selected_RBTE, 0, 2) * count_BT[..., None, None]
  return jnp.moveaxis(at_WRE.at[batch.tokens].add(took_BTRE), 0, -1)


def _by_position(logits_BTW, batch):
  target_BT, _, weight_BT = losses.targets(*batch)
  log_z_BT, target_logit_BT = losses.log_z_and_target_logit(
      logits_BTW, target_BT)
  loss_BT = jnp.where(
      weight_BT > 0, weight_BT * (log_z_BT - target_logit_BT), 0)
  position_BT = layers.position_in_document(batch.segment)
  zero_T2 = jnp.zeros((batch.tokens.shape[1], 2), jnp.float32)
  return zero_T2.at[position_BT].add(jnp.stack([loss_BT, weight_BT], -1))


def _experts_per_token(selected_RBTE, of_SBT):
  """Count the tokens with no expert, one, and more, [R, S, 3]."""
  experts_RBT = selected_RBTE.sum(-1)
  has = jnp.stack([experts_RBT == 0, experts_RBT == 1, experts_RBT > 1], -1)
  return jnp.einsum('rbtc,sbt->rsc', has.astype(jnp.float32),
                    of_SBT.astype(jnp.float32))


def load(
    workdir: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    function: str = '',
) -> Run:
  """Load the newest checkpoint of a run.

  Args:
    workdir: of the run.
    output: folder for results, by default the workdir.
    function: image tokenizer that may be called; see `tokenizers.load`.
  """
  cfg, params, step = checkpoint.load_params(workdir)
  vocabulary = tokenizers.load(workdir, function)
  return Run(pathlib.Path(workdir), cfg, params, step, vocabulary,
             output and pathlib.Path(output))
