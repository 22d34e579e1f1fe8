"""Training of auxiliary routers on the selections of a trained model.

The model of `train.init_from` is frozen and runs with expert choice; auxiliary
routers see its tokens one by one and learn to predict the selections. In
inference they also see the effects of their errors in earlier layers; here they
do not.

Source: arXiv 2407.21770, section 2.4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import config
from mom_jax.data import tokenizers
from mom_jax.models import eval_modes, outputs
from mom_jax.training import checkpoint

# Settings in which the model may differ from that of `train.init_from`.
_MAY_DIFFER = checkpoint.MAY_CHANGE + (
    'model.moma.router', 'model.moma.noise', 'model.moma.pool',
    'model.mod.router', 'model.dtype', 'model.mixer.chunk',
)


def prepare(cfg: config.Config) -> config.Config:
  """Return the settings of the run, with auxiliary routers in their stage."""
  if cfg.train.stage == 'main':
    return cfg
  return config.validate(eval_modes.aux_causal(cfg))


def check(cfg: config.Config) -> None:
  """Raise UserError if `train.init_from` holds another model than `cfg`."""
  first = checkpoint.read_config(cfg.train.init_from)
  wrong = [
      line for line in config.differing(first, cfg)
      if line.startswith('config.model.')
      and line.split(':')[0].removeprefix('config.') not in _MAY_DIFFER
  ]
  if wrong:
    raise config.UserError(
        f'config.train.init_from={cfg.train.init_from} holds another model: it'
        f' differs in {"; ".join(wrong)}. Take --config from that run:'
        f' --config={cfg.train.init_from}/config.json.'
    )


def check_vocabulary(
    cfg: config.Config, vocabulary: tokenizers.Vocabulary
) -> None:
  """Raise UserError if `train.init_from` was trained on other tokens."""
  first = tokenizers.load(
      cfg.train.init_from, cfg.data.tokenizer.image)
  if first.fingerprint != vocabulary.fingerprint:
    raise config.UserError(
        f'config.data gives other tokens than the run in'
        f' config.train.init_from={cfg.train.init_from} was trained on; restore'
        ' its data and tokenizer.'
    )


def start(cfg: config.Config, params: Any) -> Any:
  """Replace parameters by those of `train.init_from`.

  Auxiliary routers stay new unless that run has some.
  """
  trained = checkpoint.load_params(cfg.train.init_from).params
  known = {
      jax.tree_util.keystr(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(trained)
  }

  def one(path, new):
    old = known.get(jax.tree_util.keystr(path))
    if old is None:
      if any(key.key == 'auxiliary' for key in path):
        return new
      name = '/'.join(key.key for key in path)
      raise config.UserError(
          f'config.train.init_from={cfg.train.init_from} has no parameter'
          f' {name}; take --config from that run:'
          f' --config={cfg.train.init_from}/config.json.'
      )
    return jax.device_put(old, new.sharding)

  return jax.tree_util.tree_map_with_path(one, params)


def loss(aux: tuple[outputs.BlockAux, ...]) -> Float[Array, '']:
  """Compute the mean binary cross-entropy of auxiliary logits.

  A decision is whether an expert that may take a token does; all decisions of
  all layers have equal weight.
  """
  total, count = jnp.zeros(()), jnp.zeros(())
  known = [part for block in _stats(aux) for part in block if part is not None]
  for stats in known:
    logits = stats.aux_logits_BTE
    each = jax.nn.softplus(logits) - jnp.where(stats.selected_BTE, logits, 0)
    total += jnp.where(stats.allowed_BTE, each, 0).sum()
    count += stats.allowed_BTE.sum()
  return total / jnp.maximum(count, 1)


class Agreement(NamedTuple):
  """Decisions of the auxiliary routers of a part, by modality, float32 counts.

  Attributes:
    both: selected and predicted.
    predicted, selected: only that.
    neither: neither.
  """

  both: jax.Array
  predicted: jax.Array
  selected: jax.Array
  neither: jax.Array


def agreement(
    aux: tuple[outputs.BlockAux, ...],
    modality: Int[Array, 'B T'],
    num_modalities: int,
) -> tuple[outputs.BlockAux, ...]:
  """Count `Agreement` [R, S] in each part that has auxiliary routers."""
  of_SBT = modality[None] == jnp.arange(num_modalities)[:, None, None]

  def count(stats):
    predicted, selected = stats.aux_logits_BTE > 0, stats.selected_BTE
    cases = jnp.stack([
        predicted & selected, predicted & ~selected, ~predicted & selected,
        ~predicted & ~selected])
    cases &= stats.allowed_BTE[None]
    return Agreement(*jnp.einsum(
        'crbte,sbt->crs', cases.astype(jnp.float32),
        of_SBT.astype(jnp.float32)))

  return outputs.map_parts(count, _stats(aux))


def _stats(aux):
  """Select the `RouterStats` of parts with auxiliary routers."""

  def one(part):
    known = part.stats is not None and part.stats.aux_logits_BTE is not None
    return part.stats if known else None

  return outputs.map_parts(one, aux)
