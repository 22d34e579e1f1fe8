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

PREFILL_LENGTH = 256  # tokens of a prompt that are read at once
NO_TOKEN = -1  # after the end of a sequence


class DecodeState(NamedTuple):
  """State of a batch between two steps of decoding.

  With guidance, a second half of the cache and of the logits belongs to the
  same documents without their text.

  Attributes:
    cache: of the model, as `models.init_cache` lists it.
    logits_RW: logits of the next token, float32; R = B, or 2 B with guidance.
    remaining_B: tokens until the image block of each sequence is complete.
    done_B: sequences that have ended.
    key_B: random key of each sequence.
    num_drawn: tokens drawn so far.
  """

  cache: Any
  logits_RW: jax.Array
  remaining_B: jax.Array
  done_B: jax.Array
  key_B: jax.Array
  num_drawn: jax.Array


class DecodeConfig(NamedTuple):
  """Constants of a decoding loop, static under jit."""

  cfg: config.Config
  grammar: sampling.Grammar
  stop: tuple[int, ...]


def grammar(vocabulary: Any) -> sampling.Grammar:
  """Take the ids that the sampler needs from a `tokenizers.Vocabulary`."""
  return sampling.Grammar(
      vocabulary.text.size, vocabulary.eos, vocabulary.boi, vocabulary.eoi,
      vocabulary.image_start, vocabulary.codes, vocabulary.tokens_per_image,
  )


def causal_mode(cfg: config.Config) -> config.Config:
  """Return the settings with which a trained model generates.

  A router that sees the future cannot decode. expert_choice is replaced by
  'threshold', whose thresholds it has learned; all other settings stay.

  Raises:
    UserError: a router is not causal and has no causal replacement.
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
    sampling_params: sampling.SamplingParams,
    key: Key[Array, ''],
    **how: Any,
) -> list[list[int]]:
  """Return the new tokens of each prompt, stop token included; see `stream`."""
  parts = list(stream(
      cfg, params, prompts, grammar, sampling_params, key, **how))
  return [
      [int(t) for part in parts for t in part[b] if t != NO_TOKEN]
      for b in range(len(prompts))
  ]


def stream(
    cfg: config.Config,
    params: Any,
    prompts: Sequence[Sequence[int]],
    grammar: sampling.Grammar,
    sampling_params: sampling.SamplingParams,
    key: Key[Array, ''],
    *,
    max_new_tokens: int,
    stop: Sequence[int] | None = None,
    streams: Sequence[int] | None = None,
    max_len: int | None = None,
    every: int = 64,
) -> Iterator[np.ndarray]:
  """Draw tokens after each prompt and yield them as they come.

  A sequence depends on its prompt, the key and its entry in `streams` alone,
  not on the other sequences.

  Args:
    cfg: its routers must be causal; see `causal_mode`.
    prompts: tokens of each prompt, one or more. A prompt may end inside an
      image block, which is then completed.
    key: random key.
    max_new_tokens: maximum number of new tokens per prompt. An image starts
      only if it fits.
    stop: tokens that end a sequence; eos by default.
    streams: index of each sequence's random stream; 0, 1, 2, ... by default.
    max_len: length of attention caches; by default as long as needed.
    every: tokens between two yields.
  Yields:
    int32 [B, at most every], NO_TOKEN after the end of a sequence.
  Raises:
    ValueError: no prompt, an empty prompt, one with a broken image block, one
      that does not fit max_len, or a router that is not causal.
  """
  streams = range(len(prompts)) if streams is None else streams
  _check(cfg, prompts, grammar, max_new_tokens, max_len)
  remaining_B = [sampling.remaining_in(grammar, p) for p in prompts]
  need = max(map(len, prompts)) + max_new_tokens
  stop = (grammar.eos,) if stop is None else tuple(stop)
  decode_cfg = DecodeConfig(cfg, grammar, stop)
  read = list(prompts)
  if sampling_params.guidance != 1 and grammar.codes:
    read += [sampling.unguided_prompt(grammar, p) for p in prompts]
  cache, logits_RW = prefill(
      decode_cfg, params, read, max_len or cache_length(need))
  state = DecodeState(
      cache, logits_RW, jnp.array(remaining_B, jnp.int32),
      jnp.zeros(len(prompts), bool),
      jax.vmap(lambda i: jax.random.fold_in(key, i))(
          jnp.array(list(streams), jnp.uint32)),
      jnp.zeros((), jnp.int32),
  )
  limit = jnp.int32(max_new_tokens)
  for first in range(0, max_new_tokens, every):
    state, tokens_BN = _decode(
        decode_cfg, every, params, sampling_params, state, limit)
    yield np.asarray(tokens_BN)[:, :max_new_tokens - first]
    if np.all(state.done_B):
      return


def cache_length(tokens: int) -> int:
  """Round a number of tokens up to a length of attention caches."""
  return -(-tokens // PREFILL_LENGTH) * PREFILL_LENGTH


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
    decode_cfg: DecodeConfig, params: Any, prompts: Sequence[Sequence[int]],
    max_len: int,
) -> tuple[Any, jax.Array]:
  """Read prompts and return (cache, logits [B, W] after each prompt)."""
  longest = max(map(len, prompts))
  length = min(PREFILL_LENGTH, max(16, 1 << (longest - 1).bit_length()))
  width = -(-longest // length) * length
  tokens_BT = np.full((len(prompts), width), NO_TOKEN, np.int32)
  for row, prompt in zip(tokens_BT, prompts):
    row[:len(prompt)] = prompt
  cache = models.init_cache(decode_cfg.cfg, len(prompts), max_len)
  shape = (len(prompts), decode_cfg.cfg.model.vocab_size)
  logits_BW = jnp.zeros(shape, jnp.float32)
  for first in range(0, width, length):
    tokens_Bt = jnp.asarray(tokens_BT[:, first:first + length])
    cache, logits_BW = _read(
        decode_cfg.cfg, decode_cfg.grammar, params, cache, logits_BW, tokens_Bt)
  return cache, logits_BW


@functools.partial(
    jax.jit, static_argnames=('cfg', 'grammar'),
    donate_argnames=('cache', 'logits_BW'))
def _read(cfg, grammar, params, cache, logits_BW, tokens_BT):
  """Read tokens, and update the logits of sequences that have any."""
  valid_BT = tokens_BT != NO_TOKEN
  logits_BTW, cache = _forward(cfg, grammar, params, cache, tokens_BT)
  count_B = valid_BT.sum(1)
  last_BW = jnp.take_along_axis(
      logits_BTW, jnp.maximum(count_B - 1, 0)[:, None, None], 1)[:, 0]
  some_B1 = (count_B > 0)[:, None]
  return cache, jnp.where(some_B1, last_BW.astype(jnp.float32), logits_BW)


def _forward(cfg, grammar, params, cache, tokens_BT):
  valid_BT = tokens_BT != NO_TOKEN
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
    jax.jit, static_argnames=('decode_cfg', 'steps'), donate_argnames='state')
def _decode(
    decode_cfg: DecodeConfig, steps: int, params,
    sampling_params: sampling.SamplingParams, state: DecodeState, limit,
):
  """Draw at most `steps` tokens per sequence: (state, tokens [B, steps])."""
  cfg, grammar = decode_cfg.cfg, decode_cfg.grammar
  stop_S = jnp.array(decode_cfg.stop, jnp.int32)
  B = len(state.done_B)
  is_guided = len(state.logits_RW) > B

  def unfinished(carry):
    i, state, _ = carry
    return (i < steps) & (state.num_drawn < limit) & ~state.done_B.all()

  def step(carry):
    i, state, tokens_BN = carry
    logits_BW = state.logits_RW[:B]
    if is_guided:
      logits_BW = sampling.guided(
          logits_BW, state.logits_RW[B:], state.remaining_B,
          sampling_params.guidance)
    allowed_BW = sampling.allowed_next(
        grammar, state.remaining_B, limit - state.num_drawn,
        logits_BW.shape[1])
    key_B = jax.vmap(
        lambda k: jax.random.fold_in(k, state.num_drawn))(state.key_B)
    token_B = sampling.draw(key_B, logits_BW, allowed_BW, sampling_params)
    tokens_BN = tokens_BN.at[:, i].set(
        jnp.where(state.done_B, NO_TOKEN, token_B))
    done_B = state.done_B | (token_B[:, None] == stop_S[None]).any(1)
    input_R = jnp.where(done_B, NO_TOKEN, token_B)
    if is_guided:
      text_B = input_R < grammar.text_size
      input_R = jnp.concatenate(
          [input_R, jnp.where(text_B, NO_TOKEN, input_R)])
    logits_R1W, cache = _forward(
        cfg, grammar, params, state.cache, input_R[:, None])
    # Sequences without a new token keep the logits after their last one.
    logits_RW = jnp.where(
        (input_R == NO_TOKEN)[:, None], state.logits_RW,
        logits_R1W[:, 0].astype(jnp.float32))
    remaining_B = sampling.remaining_after(grammar, state.remaining_B, token_B)
    state = DecodeState(
        cache, logits_RW, remaining_B, done_B, state.key_B,
        state.num_drawn + 1)
    return i + 1, state, tokens_BN

  tokens_BN = jnp.full((B, steps), NO_TOKEN, jnp.int32)
  _, state, tokens_BN = jax.lax.while_loop(
      unfinished, step, (jnp.int32(0), state, tokens_BN))
  return state, tokens_BN
