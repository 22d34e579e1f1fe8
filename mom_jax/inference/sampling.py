"""Drawing the next token: filters of a distribution, and whole image blocks.

An image block is boi, exactly P codes, eoi. Its grammar is a count of the
tokens that a row still owes to its block:

  owed = 0              outside: text, eos or boi may come
  owed = P + 1 ... 2    inside: only codes may come
  owed = 1              only eoi may come

so that no sequence drawn here has a broken block, whatever the logits.
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
  """The ids of a joint vocabulary that matter for its image blocks."""

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
class Filters:
  """How logits become a distribution, in this order, after the guidance.

  Attributes:
    temperature: logits are divided by it; 0 takes the largest logit.
    top_k: only the k likeliest tokens; 0 is all.
    top_p: of those, the fewest likeliest tokens that hold this probability.
    min_p: and only tokens at least this fraction as likely as the likeliest.
    guidance: of the codes of an image by the text before it; see `guided`.
  """

  temperature: float | jax.Array
  top_k: int
  top_p: float
  min_p: float
  guidance: float | jax.Array = 1.0


def keep(
    logits: Float[Array, 'B W'], top_k: int, top_p: float, min_p: float
) -> Bool[Array, 'B W']:
  """Which tokens may be drawn; the likeliest always may.

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
    owed_B: Int[Array, ' B'],
    guidance: Float[Array, ''] | float,
) -> Float[Array, 'B W']:
  """Logits that make an image more typical of its text, less of all images.

  without + guidance (logits - without) for the codes of an image, where
  `without` are the logits after the same document without its text; logits
  elsewhere. 1 changes nothing, 0 ignores the text. Classifier-free guidance,
  arXiv 2207.12598 equation 6 with w = guidance - 1.
  """
  inside_B1 = (owed_B > 1)[:, None]
  return jnp.where(inside_B1, without + guidance * (logits - without), logits)


def unguided_prompt(grammar: Grammar, tokens: Sequence[int]) -> list[int]:
  """The prompt without its text: eos and image blocks alone."""
  kept = [token for token in tokens if token >= grammar.text_size]
  return kept or [grammar.eos]


def draw(
    key_B: Key[Array, ' B'],
    logits: Float[Array, 'B W'],
    allowed: Bool[Array, 'B W'],
    filters: Filters,
) -> Int[Array, ' B']:
  """One token a row from the allowed ones.

  Args:
    key_B: a key for each row, so that a row's draw is its own.
    allowed: at least one token a row.
  """
  logits_BW = jnp.where(allowed, logits.astype(jnp.float32), -jnp.inf)
  likeliest_B = jnp.argmax(logits_BW, -1)
  greedy = filters.temperature == 0
  # The largest logit becomes 0: a tiny temperature overflows to -inf only.
  top_B1 = logits_BW.max(-1, keepdims=True)
  logits_BW = (logits_BW - top_B1) / jnp.where(greedy, 1, filters.temperature)
  kept_BW = keep(logits_BW, filters.top_k, filters.top_p, filters.min_p)
  logits_BW = jnp.where(kept_BW, logits_BW, -jnp.inf)
  drawn_B = jax.vmap(jax.random.categorical)(key_B, logits_BW)
  return jnp.where(greedy, likeliest_B, drawn_B).astype(jnp.int32)


def allowed_next(
    grammar: Grammar,
    owed_B: Int[Array, ' B'],
    room: Int[Array, ''] | int,
    vocab_size: int,
) -> Bool[Array, 'B W']:
  """Tokens that may come next.

  Args:
    owed_B: tokens that each row owes to its image block.
    room: tokens that can still be drawn, this one included. A block is only
      begun where it fits whole.
    vocab_size: rows of the model's vocabulary; ids beyond the tokenizers' are
      never allowed, nor are pad, and eoi and codes outside a block.
  """
  id_W = jnp.arange(vocab_size)
  code_W = (id_W >= grammar.image_start) & (
      id_W < grammar.image_start + grammar.codes)
  fits = (grammar.codes > 0) & (room >= grammar.tokens_per_image + 2)
  outside_W = (id_W < grammar.text_size) | (id_W == grammar.eos)
  outside_W |= (id_W == grammar.boi) & fits
  owed_B1 = owed_B[:, None]
  inside_BW = jnp.where(
      owed_B1 == 1, (id_W == grammar.eoi)[None], code_W[None])
  return jnp.where(owed_B1 == 0, outside_W[None], inside_BW)


def owed_after(
    grammar: Grammar, owed: Shaped[Array, '*B'], token: Int[Array, '*B']
) -> Int[Array, '*B']:
  """Tokens owed to the block once `token` has come."""
  return jnp.where(
      token == grammar.boi, grammar.tokens_per_image + 1,
      jnp.maximum(owed - 1, 0),
  ).astype(jnp.int32)


def owed_by(grammar: Grammar, tokens: Sequence[int]) -> int:
  """Tokens that a prompt still owes to an image block at its end.

  Raises:
    ValueError: the prompt holds a broken block or an id that is none.
  """
  owed = 0
  for place, token in enumerate(tokens):
    code = 0 <= token - grammar.image_start < grammar.codes
    if not code and not 0 <= token < grammar.image_start:
      raise ValueError(
          f'token {token} at place {place} is outside the vocabulary of'
          f' {grammar.image_start + grammar.codes} ids.'
      )
    wanted = 'a code' if owed > 1 else 'eoi' if owed else 'no code and no eoi'
    found = 'a code' if code else 'eoi' if token == grammar.eoi else 'text'
    if found != wanted and (owed or found != 'text'):
      raise ValueError(
          f'token {token} at place {place} is {found} where an image block'
          f' needs {wanted}; a block is boi, {grammar.tokens_per_image} codes,'
          ' eoi.'
      )
    if token == grammar.boi:
      owed = grammar.tokens_per_image + 1
    else:
      owed = max(owed - 1, 0)
  return owed
