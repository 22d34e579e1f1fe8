"""Decoding equals the full forward, whatever the batch and the prompts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, models
from mom_jax.inference import decode, sampling
from mom_jax.models import eval_modes

GRAMMAR = sampling.Grammar(
    text_size=20, eos=21, boi=22, eoi=23, image_start=24, codes=8,
    tokens_per_image=6,
)
GREEDY = sampling.SamplingParams(0.0, 0, 1.0, 0.0)
FREE = sampling.SamplingParams(1.0, 0, 1.0, 0.0)
PROMPTS = [
    [21, 3, 4],
    [21, 5, 22, 24, 25, 26],  # ends inside an image
    [21, 22, *range(24, 30), 23, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9],
]
PATTERNS = ['attention/mlp', 'mom/moma']


def tiny(pattern='mom/moma', **moma):
  cfg = config.Config()
  model = dataclasses.replace(
      cfg.model, pattern=pattern, width=16, num_layers=2, vocab_size=40,
      mixer=dataclasses.replace(
          cfg.model.mixer, num_heads=2, key_dim=8, value_dim=8, chunk=16),
      attention=dataclasses.replace(
          cfg.model.attention, num_heads=2, num_kv_heads=1, head_dim=8),
      mlp=config.Mlp(hidden=16),
      moma=dataclasses.replace(
          cfg.model.moma, experts=(2, 2), hidden=16, **moma),
  )
  return config.validate(dataclasses.replace(cfg, model=model))


def init(cfg, seed=0):
  """Parameters far from their start, so that logits and routes differ."""
  boxed = models.init_params(cfg, jax.random.key(seed))
  params = nn.meta.unbox(boxed)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  return jax.tree.unflatten(tree, [
      x + 0.2 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])


@pytest.fixture(scope='module', params=PATTERNS)
def model(request):
  cfg = tiny(request.param)
  return cfg, init(cfg)


def run(model, prompts=PROMPTS, filters=FREE, count=24, seed=0, **how):
  cfg, params = model
  return decode.generate(
      cfg, params, prompts, GRAMMAR, filters, jax.random.key(seed),
      max_new_tokens=count, **how)


@functools.partial(jax.jit, static_argnums=0)
def last_logits(cfg, params, tokens_1T, length):
  valid_1T = jnp.arange(tokens_1T.shape[1])[None] < length
  output = models.LM(cfg).apply(
      {'params': params}, tokens_1T, (tokens_1T >= 24).astype(jnp.int32),
      valid_1T.astype(jnp.int32))
  return output.logits[:, length - 1]


def full_greedy(model, prompt, count, guidance=1.0):
  """Greedy by a whole forward pass a token, under the same grammar."""
  cfg, params = model
  tokens = list(prompt)

  def after(document):
    padded_1T = np.array([document + [0] * (48 - len(document))], np.int32)
    return np.asarray(last_logits(cfg, params, padded_1T, len(document)))

  for i in range(count):
    logits_1W = after(tokens)
    remaining = sampling.remaining_in(GRAMMAR, tokens)
    if remaining > 1:
      textless_1W = after([t for t in tokens if t >= GRAMMAR.text_size])
      logits_1W = textless_1W + guidance * (logits_1W - textless_1W)
    remaining_B = jnp.array([remaining])
    allowed_1W = sampling.allowed_next(GRAMMAR, remaining_B, count - i, 40)
    tokens.append(int(np.where(allowed_1W, logits_1W, -np.inf).argmax()))
    if tokens[-1] == GRAMMAR.eos:
      break
  return tokens[len(prompt):]


def test_greedy_equals_the_full_forward_at_every_step(model):
  """Prefill + one-token steps of a mixed batch, against whole passes."""
  got = run(model, filters=GREEDY)
  assert got == [full_greedy(model, p, 24) for p in PROMPTS]


@pytest.mark.parametrize('pattern, mode', [
    ('attention/moma', 'aux_causal'),
    pytest.param('mod/mom/moma', 'threshold', marks=pytest.mark.slow_law),
    pytest.param('attention/moma', 'threshold', marks=pytest.mark.slow),
    pytest.param('mod/mom/moma', 'aux_causal', marks=pytest.mark.slow)])
def test_every_causal_mode_of_expert_choice_generates_as_it_reads(
    pattern, mode):
  """Prefill and one-token steps of both stand-ins equal whole passes."""
  cfg = tiny(pattern, router='expert_choice')
  stand_in = (
      eval_modes.causal if mode == 'threshold' else eval_modes.aux_causal)
  cfg = stand_in(cfg)
  params = init(cfg)
  taken = jax.jit(models.LM(cfg).apply)(
      {'params': params}, jnp.arange(16)[None]).aux[0]
  for part in taken:  # some, and not all: there is something to test
    if part is not None and part.stats is not None:
      assert 0.05 < part.stats.selected_BTE[..., :2].mean() < 0.95
  got = run((cfg, params), filters=GREEDY, count=12)
  assert got == [full_greedy((cfg, params), p, 12) for p in PROMPTS]


def test_guided_images_equal_two_full_forwards_at_every_step(model):
  """The second one without the text, in images alone."""
  guided = dataclasses.replace(GREEDY, guidance=3.0)
  prompts = [[21, 3, 4, 22], *PROMPTS[1:]]
  want = [full_greedy(model, p, 24, 3.0) for p in prompts]
  assert run(model, prompts, guided) == want
  assert want != [full_greedy(model, p, 24) for p in prompts]


def test_without_guidance_the_text_of_an_image_is_ignored(model):
  off = dataclasses.replace(FREE, guidance=0.0)
  one, other = run(model, [[21, 3, 4, 22]], off), run(model, [[21, 22]])
  assert one[0][:7] == other[0][:7] and one[0][6] == GRAMMAR.eoi


def test_a_prompt_alone_gives_what_it_gives_in_a_batch(model):
  batch = run(model, stop=())
  for i, prompt in enumerate(PROMPTS):
    alone = run(model, [prompt], stop=(), streams=[i])
    assert alone == [batch[i]]


def test_long_prompts_are_read_in_blocks(model, monkeypatch):
  whole = run(model, filters=GREEDY, count=24)
  monkeypatch.setattr(decode, 'PREFILL_LENGTH', 8)
  assert run(model, filters=GREEDY, count=24) == whole


def test_pieces_of_a_stream_do_not_change_it(model):
  cfg, params = model
  parts = list(decode.stream(
      cfg, params, PROMPTS, GRAMMAR, FREE, jax.random.key(0),
      max_new_tokens=24, stop=(), every=10))
  assert [p.shape[1] for p in parts] == [10, 10, 4]
  assert np.concatenate(parts, 1).tolist() == run(model, stop=())


def test_the_seed_decides(model):
  first = run(model, seed=1, stop=())
  assert run(model, seed=1, stop=()) == first
  assert run(model, seed=2, stop=()) != first


def test_equal_prompts_get_different_streams(model):
  rows = run(model, [PROMPTS[0]] * 3, stop=())
  assert len({tuple(r) for r in rows}) == 3


def test_prompt_inside_an_image_is_completed_first(model):
  """Three codes are in the prompt: three more, then eoi."""
  new = run(model)[1]
  assert all(24 <= t < 32 for t in new[:3]) and new[3] == 23


@pytest.mark.parametrize('seed', range(2))
def test_blocks_are_whole_and_unused_rows_never_drawn(model, seed):
  cfg, params = model
  wild = dict(params, embed=params['embed'] | {'embedding': params['embed'][
      'embedding'].at[32:].multiply(30)})
  rows = run((cfg, wild), seed=seed, stop=())
  for prompt, new in zip(PROMPTS, rows):
    assert len(new) == 24 and max(new) < 32 and 20 not in new
    assert sampling.remaining_in(GRAMMAR, prompt + new) == 0


def test_stop_tokens_end_a_row_and_not_the_others(model):
  free = run(model, stop=())
  stop = free[0][4]
  got = run(model, stop=(stop,))
  for new, whole in zip(got, free):
    end = whole.index(stop) + 1 if stop in whole else len(whole)
    assert new == whole[:end]
  assert len(got[0]) <= 5


def test_eos_ends_by_default(model):
  cfg, params = model
  loud = dict(params, embed=jax.tree.map(jnp.zeros_like, params['embed']))
  rows = sum((  # every token is alike
      run((cfg, loud), [[21, 1]] * 3, seed=seed) for seed in range(5)), [])
  assert all(len(r) == 24 or r[-1] == 21 for r in rows)
  assert any(r[-1] == 21 for r in rows)
  assert all(21 not in r[:-1] for r in rows)


def test_finished_rows_leave_the_loop_early(model):
  cfg, params = model
  parts = list(decode.stream(
      cfg, params, [[21]], GRAMMAR, FREE, jax.random.key(0),
      max_new_tokens=1000, stop=tuple(range(24)), every=24))
  assert len(parts) == 1 and (parts[0] != decode.NO_TOKEN).sum() == 1


@pytest.mark.parametrize('prompts, how, message', [
    ([], {}, 'every prompt needs a token'),
    ([[]], {}, 'every prompt needs a token'),
    ([[21]], {'max_new_tokens': 0}, 'max_new_tokens=0 must be above 0'),
    ([[21] * 9], {'max_len': 12}, 'a prompt of 9 tokens and 4 new ones'),
    ([[24]], {}, 'is a code where an image block needs'),
])
def test_what_cannot_be_continued_is_refused(prompts, how, message):
  cfg = tiny('attention/mlp')
  with pytest.raises(ValueError, match=message):
    next(decode.stream(cfg, {}, prompts, GRAMMAR, FREE, jax.random.key(0),
                       **({'max_new_tokens': 4} | how)))


def test_a_vocabulary_larger_than_the_model_is_refused():
  grammar = GRAMMAR._replace(codes=100)
  with pytest.raises(ValueError, match='124 ids exceeds'):
    next(decode.stream(tiny('attention/mlp'), {}, [[21]], grammar, FREE,
                       jax.random.key(0), max_new_tokens=4))


@pytest.mark.slow_law
def test_thresholds_stand_in_for_expert_choice():
  """The paper's router cannot decode; its thresholds can, and then do."""
  cfg = tiny(router='expert_choice')
  params = init(cfg)
  with pytest.raises(ValueError, match='expert_choice.*causal_mode'):
    run((cfg, params))
  causal = decode.causal_mode(cfg)
  assert causal.model.moma.router == 'threshold'
  assert config.differing(cfg, causal) == [
      "config.model.moma.router: 'expert_choice' -> 'threshold'"]
  got = run((causal, params), filters=GREEDY)
  assert got == [full_greedy((causal, params), p, 24) for p in PROMPTS]


def test_causal_routers_need_no_stand_in():
  for router in ('token_choice', 'threshold', 'softmax_topk'):
    cfg = tiny(router=router)
    assert decode.causal_mode(cfg) == cfg
  cfg = tiny('attention/mlp', router='expert_choice')
  assert decode.causal_mode(cfg) == cfg  # no layer uses the router


def test_memories_that_see_the_future_cannot_generate():
  cfg = tiny()
  mixer = dataclasses.replace(cfg.model.mixer, router='expert_choice')
  cfg = dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, mixer=mixer))
  with pytest.raises(config.UserError, match='mixer.router.*softmax_topk'):
    decode.causal_mode(cfg)
