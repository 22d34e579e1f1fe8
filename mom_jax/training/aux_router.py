"""The second stage: auxiliary routers learn what a finished model selects.

The model of `train.init_from` is frozen and runs with true expert choice;
auxiliary routers see its tokens one by one and are fitted to the selections.
Errors upstream, which inference makes, are not seen here.

Source: arXiv 2407.21770, section 2.4.
"""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import config
from mom_jax.data import tokenizers
from mom_jax.models import eval_modes
from mom_jax.training import checkpoint

# Settings of the model in which the second stage may differ from the first.
_MAY_DIFFER = checkpoint.MAY_CHANGE + (
    'model.moma.router', 'model.moma.noise', 'model.moma.pool',
    'model.mod.router', 'model.dtype', 'model.mixer.chunk',
)


def prepare(cfg: config.Config) -> config.Config:
  """The settings of the run: in the second stage, auxiliary routers."""
  if cfg.train.stage == 'main':
    return cfg
  return config.validate(eval_modes.aux_causal(cfg))


def check(cfg: config.Config) -> None:
  """Raises UserError if `train.init_from` is no first stage of `cfg`."""
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
  """Raises UserError if the first stage saw other tokens."""
  first = tokenizers.load(pathlib.Path(cfg.train.init_from))
  if first.fingerprint != vocabulary.fingerprint:
    raise config.UserError(
        f'config.data gives other tokens than the run in'
        f' config.train.init_from={cfg.train.init_from} was trained on; bring'
        ' its data and tokenizer back.'
    )


def start(cfg: config.Config, params: Any) -> Any:
  """New parameters with those of the first stage in their places.

  Auxiliary routers stay as they are, unless the first stage has some.
  """
  _, trained, _ = checkpoint.load_params(cfg.train.init_from)
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


def loss(aux: dict[str, Any]) -> Float[Array, '']:
  """Mean binary cross-entropy of auxiliary logits, over all decisions.

  A decision is whether an expert that may take a token does; all layers count
  alike.
  """
  total, count = jnp.zeros(()), jnp.zeros(())
  for values in _parts(aux).values():
    logit, allowed = values['auxiliary_BTE'], values['allowed_BTE']
    each = jax.nn.softplus(logit) - jnp.where(
        values['selected_BTE'], logit, 0)
    total += jnp.where(allowed, each, 0).sum()
    count += allowed.sum()
  return total / jnp.maximum(count, 1)


def agreement(
    aux: dict[str, Any], modality: Int[Array, 'B T'], num_modalities: int
) -> dict[str, dict[str, jax.Array]]:
  """Counts by repeat and modality: {'block_i': {part: [R, S, 4]}}.

  The four: selected and predicted, predicted alone, selected alone, neither.
  """
  of_SBT = modality[None] == jnp.arange(num_modalities)[:, None, None]
  counts: dict[str, dict[str, jax.Array]] = {}
  for (block, part), values in _parts(aux).items():
    said, true = values['auxiliary_BTE'] > 0, values['selected_BTE']
    cases = jnp.stack([said & true, said & ~true, ~said & true, ~said & ~true])
    cases &= values['allowed_BTE'][None]
    counts.setdefault(block, {})[part] = jnp.einsum(
        'crbte,sbt->rsc', cases.astype(jnp.float32),
        of_SBT.astype(jnp.float32))
  return counts


def _parts(aux):
  return {
      (block, part): values
      for block, parts in aux['units'].items()
      for part, values in parts.items() if 'auxiliary_BTE' in values
  }
