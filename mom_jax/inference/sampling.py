"""Sampling of the next token, with complete image blocks.

An image block is boi, exactly P codes, eoi. Its grammar is the number of tokens
that remain until the block of a row is complete:

  remaining = 0              outside: text, eos or boi may come
  remaining = P + 1 ... 2    inside: only codes may come
  remaining = 1              only eoi may come

So no sequence drawn here has a broken block, whatever the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped


class Grammar(NamedTuple):
  """Ids of a joint vocabulary that define its image blocks."""

  text_size: int  # text tokens are 0 .. text_size - 1
  eos: int
  boi: int
  eoi: int
  image_start: int  # id of code 0
  codes: int  # 0 where there are no images
  tokens_per_image: int


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=('temperature', 'guidance'),
    meta_fields=('top_k', 'top_p', 'min_p'))
@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """Map from logits to a distribution, applied in this order after guidance.

  Attributes:
    temperature: divisor of the logits; 0 takes the largest logit.
    top_k: keep the k likeliest tokens; 0 = all.
    top_p: keep the fewest of them with this total probability.
    min_p: drop tokens less likely than this fraction of the likeliest.
    guidance: of image codes by the text before them; see `guided`.
  """

  temperature: float | jax.Array
  top_k: int
  top_p: float
  min_p: float
  guidance: float | jax.Array = 1.0


def keep(
    logits: Float[Array, 'B W'], top_k: int, top_p: float, min_p: float
) -> Bool[Array, 'B W']:
  """Mask the tokens that may be drawn; the likeliest always may.

  Ties are broken by index, so that top_k keeps exactly k tokens and top_p no
  more than it needs.
  """
  if not top_k and top_p == 1 and min_p == 0:
    return jnp.ones(logits.shape, bool)
  order_BW = jnp.argsort(logits, axis=-1, stable=True, descending=True)
  sorted_BW = jnp.take_along_axis(logits, order_BW, -1)
  rank_W = jnp.arange(logits.shape[-1])
  first_BW = (rank_W < (top_k or len(rank_W)))[None]
  probs_BW = jax.nn.softmax(jnp.where(first_BW, sorted_BW, -jnp.inf))
  before_BW = jnp.cumsum(probs_BW, -1) - probs_BW
  kept_BW = first_BW & (before_BW < top_p)
  kept_BW &= probs_BW >= min_p * probs_BW[:, :1]
  kept_BW |= (rank_W == 0)[None]
  return jnp.take_along_axis(kept_BW, jnp.argsort(order_BW, axis=-1), -1)


def guided(
    logits: Float[Array, 'B W'],
    without: Float[Array, 'B W'],
    remaining_B: Int[Array, ' B'],
    guidance: Float[Array, ''] | float,
) -> Float[Array, 'B W']:
  """Apply classifier-free guidance to the codes of images.

    without + guidance (logits - without)

  `without` are the logits after the same document without its text. 1 changes
  nothing, 0 ignores the text. Logits of other tokens stay.

  Source: arXiv 2207.12598, eq. 6 with w = guidance - 1.
  """
  inside_B1 = (remaining_B > 1)[:, None]
  return jnp.where(inside_B1, without + guidance * (logits - without), logits)


def unguided_prompt(grammar: Grammar, tokens: Sequence[int]) -> list[int]:
  """Remove the text of a prompt, which leaves eos and image blocks."""
  kept = [token for token in tokens if token >= grammar.text_size]
  return kept or [grammar.eos]


def draw(
    key_B: Key[Array, ' B'],
    logits: Float[Array, 'B W'],
    allowed: Bool[Array, 'B W'],
    sampling_params: SamplingParams,
) -> Int[Array, ' B']:
  """Draw one of the allowed tokens for each sequence.

  Args:
    key_B: one key per sequence, so that sequences are independent.
    allowed: one or more tokens per sequence.
  """
  logits_BW = jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)
  likeliest_B = jnp.argmax(logits_BW, -1)
  greedy = sampling_params.temperature == 0
  # The largest logit becomes 0: a tiny temperature overflows to -inf only.
  top_B1 = logits_BW.max(-1, keepdims=True)
  logits_BW = (logits_BW - top_B1) / jnp.where(
      greedy, 1, sampling_params.temperature)
  kept_BW = keep(
      logits_BW, sampling_params.top_k, sampling_params.top_p,
      sampling_params.min_p)
  logits_BW = jnp.where(kept_BW, logits_BW, -jnp.inf)
  drawn_B = jax.vmap(jax.random.categorical)(key_B, logits_BW)
  return jnp.where(greedy, likeliest_B, drawn_B).astype(jnp.int32)


def allowed_next(
    grammar: Grammar,
    remaining_B: Int[Array, ' B'],
    tokens_left: Int[Array, ''] | int,
    vocab_size: int,
) -> Bool[Array, 'B W']:
  """Mask the tokens that may come next.

  Args:
    remaining_B: tokens until the image block of each sequence is complete.
    tokens_left: tokens that may still be drawn, this one included. A block
      starts only if it fits.
    vocab_size: size of the model's vocabulary. Ids beyond those of the
      tokenizers are never allowed, nor are pad, and eoi and codes outside a
      block.
  """
  id_W = jnp.arange(vocab_size)
  code_W = (id_W >= grammar.image_start) & (
      id_W < grammar.image_start + grammar.codes)
  fits = (grammar.codes > 0) & (tokens_left >= grammar.tokens_per_image + 2)
  outside_W = (id_W < grammar.text_size) | (id_W == grammar.eos)
  outside_W |= (id_W == grammar.boi) & fits
  remaining_B1 = remaining_B[:, None]
  inside_BW = jnp.where(
      remaining_B1 == 1, (id_W == grammar.eoi)[None], code_W[None])
  return jnp.where(remaining_B1 == 0, outside_W[None], inside_BW)


def remaining_after(
    grammar: Grammar, remaining: Shaped[Array, '*B'], token: Int[Array, '*B']
) -> Int[Array, '*B']:
  """Return the tokens that remain in the block after `token`."""
  return jnp.where(
      token == grammar.boi, grammar.tokens_per_image + 1,
      jnp.maximum(remaining - 1, 0),
  ).astype(jnp.int32)


def remaining_in(grammar: Grammar, tokens: Sequence[int]) -> int:
  """Return the tokens that remain in the block at the end of a prompt.

  Raises:
    ValueError: the prompt has a broken block or an unknown id.
  """
  remaining = 0
  for position, token in enumerate(tokens):
    code = 0 <= token - grammar.image_start < grammar.codes
    if not code and not 0 <= token < grammar.image_start:
      raise ValueError(
          f'token {token} at position {position} is outside the vocabulary of'
          f' {grammar.image_start + grammar.codes} ids.'
      )
    wanted = 'no code and no eoi'
    if remaining:
      wanted = 'a code' if remaining > 1 else 'eoi'
    found = 'a code' if code else 'eoi' if token == grammar.eoi else 'text'
    if found != wanted and (remaining or found != 'text'):
      raise ValueError(
          f'token {token} at position {position} is {found} where an image'
          f' block needs {wanted}; a block is boi,'
          f' {grammar.tokens_per_image} codes, eoi.'
      )
    if token == grammar.boi:
      remaining = grammar.tokens_per_image + 1
    else:
      remaining = max(remaining - 1, 0)
  return remaining
