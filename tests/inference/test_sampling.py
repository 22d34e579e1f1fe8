"""Laws of the filters and of the image-block grammar."""

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax.inference import sampling

GRAMMAR = sampling.Grammar(
    text_size=8, eos=9, boi=10, eoi=11, image_start=12, codes=5,
    tokens_per_image=4,
)
SIZE = 17  # ids in use; rows beyond are unused
WIDTH = 20
OPEN = sampling.SamplingParams(1.0, 0, 1.0, 0.0)


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def logits(rows=6, width=WIDTH, seed=0):
  return 2 * jax.random.normal(jax.random.key(seed), (rows, width))


def test_top_k_keeps_the_k_largest():
  x_BW = logits()
  for k in (1, 3, WIDTH):
    kept_BW = np.array(sampling.keep(x_BW, k, 1.0, 0.0))
    assert (kept_BW.sum(1) == k).all()
    for x_W, kept_W in zip(np.array(x_BW), kept_BW):
      assert set(np.flatnonzero(kept_W)) == set(np.argsort(-x_W)[:k])


def test_top_k_breaks_ties_by_index():
  kept_BW = sampling.keep(jnp.zeros((1, 6)), 2, 1.0, 0.0)
  assert np.flatnonzero(kept_BW[0]).tolist() == [0, 1]


@pytest.mark.parametrize('p', [0.0, 0.3, 0.7, 0.95])
def test_top_p_keeps_the_smallest_set_that_holds_p(p):
  x_BW = logits()
  probs_BW = np.array(jax.nn.softmax(x_BW))
  for probs_W, kept_W in zip(
      probs_BW, np.array(sampling.keep(x_BW, 0, p, 0.0))):
    inside = np.sort(probs_W[kept_W])
    assert inside.sum() >= p - 1e-6
    assert inside[1:].sum() < p or len(inside) == 1
    if not kept_W.all():
      assert probs_W[~kept_W].max() <= inside[0]


@pytest.mark.parametrize('fraction', [0.05, 0.5, 1.0])
def test_min_p_is_relative_to_the_likeliest(fraction):
  x_BW = logits()
  probs_BW = np.array(jax.nn.softmax(x_BW))
  want_BW = probs_BW >= fraction * probs_BW.max(1, keepdims=True)
  got_BW = np.array(sampling.keep(x_BW, 0, 1.0, fraction))
  np.testing.assert_array_equal(got_BW, want_BW)


def test_top_p_counts_what_top_k_left():
  x_BW = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
  assert sampling.keep(x_BW, 2, 0.55, 0.0)[0].tolist() == [True] + [False] * 3
  assert sampling.keep(x_BW, 0, 0.55, 0.0)[0].tolist() == [True] * 2 + [
      False] * 2


def test_temperature_zero_takes_the_largest_allowed():
  x_BW = logits()
  allowed_BW = jnp.ones(x_BW.shape, bool).at[:, jnp.argmax(x_BW[0])].set(False)
  token_B = sampling.draw(
      keys(6), x_BW, allowed_BW, sampling.SamplingParams(0.0, 0, 1.0, 0.0))
  np.testing.assert_array_equal(
      token_B, jnp.argmax(jnp.where(allowed_BW, x_BW, -jnp.inf), -1))


def test_tiny_temperature_is_the_largest_and_stays_finite():
  x_BW = logits()
  token_B = sampling.draw(
      keys(6), x_BW, jnp.ones(x_BW.shape, bool),
      sampling.SamplingParams(1e-30, 0, 0.9, 0.1))
  np.testing.assert_array_equal(token_B, jnp.argmax(x_BW, -1))


def test_draws_follow_the_tempered_distribution():
  """Frequencies of 20,000 draws lie within five standard deviations."""
  x_W = jnp.array([0.0, 1.0, 2.0, -1.0])
  n, temperature = 20_000, 0.7
  token_N = sampling.draw(
      keys(n), jnp.tile(x_W, (n, 1)), jnp.ones((n, 4), bool),
      sampling.SamplingParams(temperature, 0, 1.0, 0.0))
  want_W = np.array(jax.nn.softmax(x_W / temperature))
  got_W = np.bincount(token_N, minlength=4) / n
  assert (abs(got_W - want_W) < 5 * np.sqrt(want_W * (1 - want_W) / n)).all()


def test_filters_bound_the_support_of_draws():
  x_BW = jnp.tile(logits(1), (4000, 1))
  filters = sampling.SamplingParams(1.5, 6, 0.9, 0.02)
  token_B = sampling.draw(
      keys(4000), x_BW, jnp.ones(x_BW.shape, bool), filters)
  kept_W = sampling.keep(x_BW[:1] / 1.5, 6, 0.9, 0.02)[0]
  assert set(np.array(token_B).tolist()) == set(
      np.flatnonzero(kept_W).tolist())


@jax.jit
def roll(seed, remaining, room):
  """Draws `room` tokens from wild logits that favour breaking the rules."""

  def step(remaining_B, i):
    key = jax.random.fold_in(jax.random.key(seed), i)
    x_BW = 30 * jax.random.normal(key, (1, WIDTH))
    x_BW = x_BW.at[:, SIZE:].add(100)
    token_B = sampling.draw(
        jax.random.split(key, 1), x_BW,
        sampling.allowed_next(GRAMMAR, remaining_B, room - i, WIDTH), OPEN)
    return sampling.remaining_after(GRAMMAR, remaining_B, token_B), token_B[0]

  return jax.lax.scan(step, jnp.array([remaining]), jnp.arange(40))[1]


def prompts():
  """Well-formed prompts, also such that end inside a block."""
  text = st.lists(st.integers(0, 9).filter(lambda t: t != 8), max_size=3)
  code = st.integers(12, 16)
  block = st.lists(code, min_size=4, max_size=4).map(
      lambda codes: [10, *codes, 11])
  part = st.lists(code, max_size=4).map(lambda codes: [10, *codes])
  return st.tuples(text, block, text, st.one_of(part, text)).map(
      lambda parts: sum(parts, []))


def check_blocks(tokens, whole=True):
  """Every boi starts 4 codes and eoi; codes and eoi stand nowhere else."""
  left = list(tokens)
  while left:
    token = left.pop(0)
    assert token not in (8, 11) and token < 12, tokens
    if token == 10:
      block, left = left[:5], left[5:]
      if len(block) < 5 and not whole:
        assert all(12 <= t < SIZE for t in block)
        return
      assert len(block) == 5 and block[4] == 11, tokens
      assert all(12 <= t < SIZE for t in block[:4]), tokens


@settings(deadline=None, max_examples=150)
@given(prompt=prompts(), seed=st.integers(0, 2**31 - 1))
def test_no_logits_break_an_image_block(prompt, seed):
  """Also for prompts that end in a block, and at the end of the room."""
  remaining = sampling.remaining_in(GRAMMAR, prompt)
  new = np.array(roll(seed, remaining, 40)).tolist()
  check_blocks(prompt + new)
  assert max(new) < SIZE


def test_images_are_drawn_at_all():
  """The test above would pass if boi never came."""
  drawn = np.array([roll(seed, 0, 40) for seed in range(20)])
  assert (drawn == 10).any() and (drawn == 11).any()


def test_a_block_begins_only_where_it_fits():
  remaining_B = jnp.zeros(1, jnp.int32)
  for room, fits in ((6, True), (5, False), (1, False)):
    allowed_BW = sampling.allowed_next(GRAMMAR, remaining_B, room, WIDTH)
    assert bool(allowed_BW[0, GRAMMAR.boi]) == fits


def test_a_vocabulary_without_images_draws_none():
  grammar = GRAMMAR._replace(codes=0, tokens_per_image=0)
  allowed_BW = sampling.allowed_next(
      grammar, jnp.zeros(1, jnp.int32), 100, WIDTH)
  assert np.flatnonzero(allowed_BW[0]).tolist() == [*range(8), 9]


@pytest.mark.parametrize('remaining', range(6))
def test_something_is_always_allowed(remaining):
  for room in (1, 6):
    assert sampling.allowed_next(
        GRAMMAR, jnp.array([remaining]), room, WIDTH).any()


@settings(deadline=None)
@given(prompt=prompts())
def test_both_forms_of_the_count_agree(prompt):
  """A prompt's count equals the sampler's, token by token."""
  remaining_B = jnp.zeros(1, jnp.int32)
  for token in prompt:
    remaining_B = sampling.remaining_after(
        GRAMMAR, remaining_B, jnp.array([token]))
  assert int(remaining_B[0]) == sampling.remaining_in(GRAMMAR, prompt)


@pytest.mark.parametrize('tokens, message', [
    ([1, 12], 'token 12 at position 1 is a code where an image block needs no'),
    ([11], 'token 11 at position 0 is eoi'),
    ([10, 12, 3], 'token 3 at position 2 is text where an image block needs a'),
    ([10, 12, 10], 'token 10 at position 2 is text'),
    ([10, 12, 12, 12, 12, 12], 'token 12 at position 5 is a code'),
    ([17], 'outside the vocabulary of 17 ids'),
    ([-1], 'token -1 at position 0 is outside'),
])
def test_a_broken_prompt_is_refused(tokens, message):
  with pytest.raises(ValueError, match=message):
    sampling.remaining_in(GRAMMAR, tokens)
