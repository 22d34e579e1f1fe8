"""The language-model loss: next-token cross-entropy by modality, and z-loss.

Losses are sums with their counts. Micro-batches, devices and validation
batches add sums; only a report divides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sums(NamedTuple):
  """Sums over target tokens, by the modality S of the target."""

  loss_S: Float[Array, ' S']  # weight * cross-entropy, nats
  count_S: Float[Array, ' S']  # weight
  z: Float[Array, '']  # weight * log(Z)^2


class Targets(NamedTuple):
  """Targets of all positions.

  Attributes:
    tokens: ids.
    modality: of the target.
    weight: loss weight, float32; 0 where there is no target.
  """

  tokens: Int[Array, 'B T']
  modality: Int[Array, 'B T']
  weight: Float[Array, 'B T']


def targets(
    tokens: Int[Array, 'B T'],
    modality: Int[Array, 'B T'],
    segment: Int[Array, 'B T'],
    weight: Float[Array, 'B T'],
) -> Targets:
  """Return the targets of a batch.

  Position t predicts token t + 1 of its sequence where both are of the same
  document; everywhere else, the last position included, the weight is 0.
  """

  def shift(x_BT):
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))

  same_BT = (shift(segment) == segment) & (segment > 0)
  weight_BT = jnp.where(same_BT, shift(weight), 0).astype(jnp.float32)
  return Targets(shift(tokens), shift(modality), weight_BT)


def noised_inputs(
    key: Key[Array, ''],
    tokens: Int[Array, 'B T'],
    modality: Int[Array, 'B T'],
    segment: Int[Array, 'B T'],
    fractions: Sequence[float],
) -> Int[Array, 'B T']:
  """Replace each token of modality s with probability fractions[s].

  The replacement is drawn from all tokens of that modality in the batch;
  padding stays. A model that cannot trust the last tokens learns to use earlier
  ones, such as the caption of an image (word dropout, arXiv 1511.06349 section
  3.2).
  """
  flat_N, inputs_BT = tokens.ravel(), tokens
  for s, fraction in enumerate(fractions):
    if not fraction:
      continue
    of_BT = (modality == s) & (segment > 0)
    order_N = jnp.argsort(~of_BT.ravel())  # tokens of the modality first
    # One call for both draws: XLA compiles each for a quarter of a second.
    replace_BT, draw_BT = jax.random.bits(
        jax.random.fold_in(key, s), (2, *tokens.shape))
    index_BT = draw_BT % jnp.maximum(of_BT.sum(), 1).astype(jnp.uint32)
    replaced_BT = of_BT & (replace_BT >> 8 < round(fraction * 2**24))
    inputs_BT = jnp.where(replaced_BT, flat_N[order_N[index_BT]], inputs_BT)
  return inputs_BT


def count(
    modality: Int[Array, 'B T'],
    weight: Float[Array, 'B T'],
    num_modalities: int,
) -> Float[Array, ' S']:
  """Sum the weights of the targets of each modality."""
  of_SBT = modality[None] == jnp.arange(num_modalities)[:, None, None]
  return jnp.where(of_SBT, weight[None], 0).sum((1, 2))


def log_z_and_target_logit(
    logits: Float[Array, 'B T W'], target: Int[Array, 'B T']
) -> tuple[Float[Array, 'B T'], Float[Array, 'B T']]:
  """Return log sum exp of the logits and the logit of the target, float32.

  Their difference is the cross-entropy of each target, in nats.
  """
  logits_BTW = logits.astype(jnp.float32)
  log_z_BT = jax.nn.logsumexp(logits_BTW, axis=-1)
  target_logit_BT1 = jnp.take_along_axis(logits_BTW, target[..., None], -1)
  return log_z_BT, target_logit_BT1[..., 0]


def cross_entropy(
    logits: Float[Array, 'B T W'],
    target: Int[Array, 'B T'],
    modality: Int[Array, 'B T'],
    weight: Float[Array, 'B T'],
    num_modalities: int,
) -> Sums:
  """Sum weight * (log Z - logit of the target) by modality, in float32.

  Args:
    logits: any float type.
    target, modality, weight: the fields of `Targets`.
    num_modalities: S.
  """
  log_z_BT, target_logit_BT = log_z_and_target_logit(logits, target)
  loss_BT = jnp.where(weight > 0, weight * (log_z_BT - target_logit_BT), 0)
  z_BT = jnp.where(weight > 0, weight * log_z_BT**2, 0)
  of_SBT = modality[None] == jnp.arange(num_modalities)[:, None, None]
  return Sums(
      jnp.where(of_SBT, loss_BT[None], 0).sum((1, 2)),
      count(modality, weight, num_modalities),
      z_BT.sum(),
  )


def lm_loss(
    sums: Sums,
    count_S: Float[Array, ' S'],
    modality_weights: tuple[float, ...],
    z_loss: float,
) -> Float[Array, '']:
  """Language-model loss: cross-entropy and z-loss, without router losses.

    sum_s w_s loss_s / sum_s w_s count_s  +  z_loss * z / sum_s count_s

  Args:
    sums: of the whole batch or of one micro-batch.
    count_S: counts of the whole batch, so that the losses of its micro-batches,
      and their gradients, add up to the batch's.
  """
  weight_S = jnp.asarray(modality_weights, jnp.float32)
  loss = (weight_S * sums.loss_S).sum() / _or_one((weight_S * count_S).sum())
  return loss + z_loss * sums.z / _or_one(count_S.sum())


def _or_one(x: jax.Array) -> jax.Array:
  """Return `x`, or 1 where a batch has no targets and every sum is 0."""
  return jnp.where(x > 0, x, 1)


def means(
    sums: Sums, modalities: tuple[str, ...], prefix: str = '', suffix: str = ''
) -> dict[str, float]:
  """Return the mean cross-entropy of all targets and of each modality."""
  loss_S, count_S = (jax.device_get(x) for x in (sums.loss_S, sums.count_S))
  named = {
      f'{prefix}loss{suffix}': (loss_S.sum(), count_S.sum()),
      **{
          f'{prefix}loss_{name}{suffix}': (loss_S[i], count_S[i])
          for i, name in enumerate(modalities)
      },
  }
  return {k: float(x / n) for k, (x, n) in named.items() if n > 0}
