"""Prompts to tokens: prefill, then steps of one token with a fixed-size cache.

  prompts -> right-padded blocks -> cache, last logits
          -> while_loop(draw, feed back) -> tokens
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key
import numpy as np

from mom_jax import config, models, routing
from mom_jax.inference import sampling
from mom_jax.models import eval_modes

BLOCK = 256  # tokens of a prompt that are read at once
NONE = -1  # stands where a row has ended


class Rows(NamedTuple):
  """The batch between two steps.

  Under guidance a second half of the cache and of the logits reads the same
  documents without their text.
  """

  cache: Any
  logits_RW: jax.Array  # of the next token, float32; R = B, or 2 B guided
  owed_B: jax.Array  # tokens owed to an image block
  done_B: jax.Array
  key_B: jax.Array
  drawn: jax.Array  # tokens drawn so far


class Plan(NamedTuple):
  """What is fixed while tokens are drawn; static under jit."""

  cfg: config.Config
  grammar: sampling.Grammar
  stop: tuple[int, ...]


def grammar(vocabulary: Any) -> sampling.Grammar:
  """What the sampler needs of a `tokenizers.Vocabulary`."""
  return sampling.Grammar(
      vocabulary.text.size, vocabulary.eos, vocabulary.boi, vocabulary.eoi,
      vocabulary.image_start, vocabulary.codes, vocabulary.tokens_per_image,
  )


def causal_mode(cfg: config.Config) -> config.Config:
  """The settings under which a trained model generates.

  A router that sees the future cannot decode. For expert_choice, which keeps
  thresholds for this, the router 'threshold' stands in with the same
  parameters; all other settings stay.

  Raises:
    UserError: a router is not causal and nothing stands in for it.
  """
  pattern = cfg.model.pattern
  mixer = routing.get(cfg.model.mixer.router)
  if 'mom/' in pattern and not mixer.causal:
    raise config.UserError(
        f'config.model.mixer.router={mixer.name!r} lets a token see later ones,'
        ' so the model cannot generate; train with a causal router such as'
        ' softmax_topk.'
    )
  causal = eval_modes.causal(cfg)
  if not eval_modes.is_causal(causal):
    known = sorted(r.name for r in routing.ROUTERS.values() if r.causal)
    raise config.UserError(
        f'config.model.moma.router={cfg.model.moma.router!r} lets a token see'
        ' later ones, so the model cannot generate; train with a causal'
        f' router: {", ".join(known)}.'
    )
  return causal


def generate(
    cfg: config.Config,
    params: Any,
    prompts: Sequence[Sequence[int]],
    grammar: sampling.Grammar,
    filters: sampling.Filters,
    key: Key[Array, ''],
    **how: Any,
) -> list[list[int]]:
  """New tokens of each prompt, its stop token included; see `stream`."""
  parts = list(stream(cfg, params, prompts, grammar, filters, key, **how))
  return [
      [int(t) for part in parts for t in part[b] if t != NONE]
      for b in range(len(prompts))
  ]


def stream(
    cfg: config.Config,
    params: Any,
    prompts: Sequence[Sequence[int]],
    grammar: sampling.Grammar,
    filters: sampling.Filters,
    key: Key[Array, ''],
    *,
    max_new_tokens: int,
    stop: Sequence[int] | None = None,
    streams: Sequence[int] | None = None,
    max_len: int | None = None,
    every: int = 64,
) -> Iterator[np.ndarray]:
  """Draws tokens after each prompt and yields them as they come.

  A row depends on its prompt, the seed and its number in `streams` alone, not
  on the other rows.

  Args:
    cfg: its routers must be causal; see `causal_mode`.
    prompts: tokens of each prompt, of any lengths above 0. One may end inside
      an image block, which is then completed.
    key: seed of the draws.
    max_new_tokens: most tokens drawn a row. An image is begun only where it
      fits whole.
    stop: tokens that end a row; eos by default.
    streams: number of each row's random stream; 0, 1, 2, ... by default.
    max_len: slots of attention caches; by default as many as are needed.
    every: tokens between two yields.
  Yields:
    int32 [B, at most every], -1 where a row has ended.
  Raises:
    ValueError: no prompt, an empty one, one with a broken image block, one
      that does not fit max_len, or a router that is not causal.
  """
  streams = range(len(prompts)) if streams is None else streams
  _check(cfg, prompts, grammar, max_new_tokens, max_len)
  owed_B = [sampling.owed_by(grammar, p) for p in prompts]
  need = max(map(len, prompts)) + max_new_tokens
  stop = (grammar.eos,) if stop is None else tuple(stop)
  plan = Plan(cfg, grammar, stop)
  read = list(prompts)
  if filters.guidance != 1 and grammar.codes:
    read += [sampling.unguided_prompt(grammar, p) for p in prompts]
  cache, logits_RW = prefill(
      plan, params, read, max_len or -(-need // BLOCK) * BLOCK)
  rows = Rows(
      cache, logits_RW, jnp.array(owed_B, jnp.int32),
      jnp.zeros(len(prompts), bool),
      jax.vmap(lambda i: jax.random.fold_in(key, i))(
          jnp.array(list(streams), jnp.uint32)),
      jnp.zeros((), jnp.int32),
  )
  limit = jnp.int32(max_new_tokens)
  for first in range(0, max_new_tokens, every):
    rows, tokens_BN = _decode(plan, every, params, filters, rows, limit)
    yield np.asarray(tokens_BN)[:, :max_new_tokens - first]
    if np.all(rows.done_B):
      return


def _check(cfg, prompts, grammar, max_new_tokens, max_len) -> None:
  if not prompts or not all(len(p) for p in prompts):
    raise ValueError('every prompt needs a token; start each with eos.')
  if max_new_tokens < 1:
    raise ValueError(f'max_new_tokens={max_new_tokens} must be above 0.')
  if causal_mode(cfg) != cfg:
    raise ValueError(
        f'config.model.moma.router={cfg.model.moma.router!r} is not causal;'
        ' pass decode.causal_mode(cfg).'
    )
  ids = grammar.image_start + grammar.codes
  if ids > cfg.model.vocab_size:
    raise ValueError(
        f'the vocabulary of {ids} ids exceeds'
        f' config.model.vocab_size={cfg.model.vocab_size}; use the vocabulary'
        ' that the model was trained with.'
    )
  need = max(map(len, prompts)) + max_new_tokens
  if max_len is not None and need > max_len:
    raise ValueError(
        f'a prompt of {need - max_new_tokens} tokens and {max_new_tokens} new'
        f' ones exceed max_len={max_len}.'
    )


def prefill(
    plan: Plan, params: Any, prompts: Sequence[Sequence[int]], max_len: int
) -> tuple[Any, jax.Array]:
  """Reads prompts block by block: (cache, logits [B, W] after each prompt)."""
  longest = max(map(len, prompts))
  block = min(BLOCK, max(16, 1 << (longest - 1).bit_length()))
  width = -(-longest // block) * block
  tokens_BT = np.full((len(prompts), width), NONE, np.int32)
  for row, prompt in zip(tokens_BT, prompts):
    row[:len(prompt)] = prompt
  cache = models.init_cache(plan.cfg, len(prompts), max_len)
  shape = (len(prompts), plan.cfg.model.vocab_size)
  logits_BW = jnp.zeros(shape, jnp.float32)
  for first in range(0, width, block):
    tokens_Bt = jnp.asarray(tokens_BT[:, first:first + block])
    cache, logits_BW = _read(
        plan.cfg, plan.grammar, params, cache, logits_BW, tokens_Bt)
  return cache, logits_BW


@functools.partial(
    jax.jit, static_argnames=('cfg', 'grammar'),
    donate_argnames=('cache', 'logits_BW'))
def _read(cfg, grammar, params, cache, logits_BW, tokens_BT):
  """Feeds tokens (-1 is none) and keeps each row's logits after its last."""
  valid_BT = tokens_BT != NONE
  logits_BTW, cache = _forward(cfg, grammar, params, cache, tokens_BT)
  count_B = valid_BT.sum(1)
  last_BW = jnp.take_along_axis(
      logits_BTW, jnp.maximum(count_B - 1, 0)[:, None, None], 1)[:, 0]
  some_B1 = (count_B > 0)[:, None]
  return cache, jnp.where(some_B1, last_BW.astype(jnp.float32), logits_BW)


def _forward(cfg, grammar, params, cache, tokens_BT):
  valid_BT = tokens_BT != NONE
  code_BT = tokens_BT >= grammar.image_start
  output = models.LM(cfg).apply(
      {'params': params},
      jnp.where(valid_BT, tokens_BT, 0),
      code_BT.astype(jnp.int32),
      valid_BT.astype(jnp.int32),
      cache,
  )
  return output.logits, output.cache


@functools.partial(
    jax.jit, static_argnames=('plan', 'steps'), donate_argnames='rows')
def _decode(plan: Plan, steps: int, params, filters, rows: Rows, limit):
  """At most `steps` tokens of every row: (rows, tokens [B, steps])."""
  stop_S = jnp.array(plan.stop, jnp.int32)
  B, is_guided = len(rows.done_B), len(rows.logits_RW) > len(rows.done_B)

  def unfinished(carry):
    i, rows, _ = carry
    return (i < steps) & (rows.drawn < limit) & ~rows.done_B.all()

  def step(carry):
    i, rows, tokens_BN = carry
    logits_BW = rows.logits_RW[:B]
    if is_guided:
      logits_BW = sampling.guided(
          logits_BW, rows.logits_RW[B:], rows.owed_B, filters.guidance)
    allowed_BW = sampling.allowed_next(
        plan.grammar, rows.owed_B, limit - rows.drawn, logits_BW.shape[1])
    key_B = jax.vmap(lambda k: jax.random.fold_in(k, rows.drawn))(rows.key_B)
    token_B = sampling.draw(key_B, logits_BW, allowed_BW, filters)
    tokens_BN = tokens_BN.at[:, i].set(jnp.where(rows.done_B, NONE, token_B))
    done_B = rows.done_B | (token_B[:, None] == stop_S[None]).any(1)
    fed_R = jnp.where(done_B, NONE, token_B)
    if is_guided:
      text_B = fed_R < plan.grammar.text_size
      fed_R = jnp.concatenate([fed_R, jnp.where(text_B, NONE, fed_R)])
    logits_R1W, cache = _forward(
        plan.cfg, plan.grammar, params, rows.cache, fed_R[:, None])
    # Rows that read nothing keep what is likely after their last token.
    logits_RW = jnp.where(
        (fed_R == NONE)[:, None], rows.logits_RW,
        logits_R1W[:, 0].astype(jnp.float32))
    owed_B = sampling.owed_after(plan.grammar, rows.owed_B, token_B)
    rows = Rows(cache, logits_RW, owed_B, done_B, rows.key_B, rows.drawn + 1)
    return i + 1, rows, tokens_BN

  tokens_BN = jnp.full((rows.done_B.shape[0], steps), NONE, jnp.int32)
  _, rows, tokens_BN = jax.lax.while_loop(
      unfinished, step, (jnp.int32(0), rows, tokens_BN))
  return rows, tokens_BN
