"""Laws of the whole model, over patterns of blocks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, models, routing

T, B = 12, 2
TINY = (
    'model.width=16', 'model.num_layers=2', 'model.vocab_size=40',
    'model.remat=none',
    'model.mixer.num_heads=2', 'model.mixer.key_dim=8',
    'model.mixer.value_dim=8', 'model.mixer.chunk=4',
    'model.mixer.num_memories=3', 'model.attention.num_heads=2',
    'model.attention.num_kv_heads=1', 'model.attention.head_dim=8',
    'model.mlp.hidden=24', 'model.moma.experts=2,2', 'model.moma.hidden=24',
)
PATTERNS = {
    'mom/moma': (),
    'attention/mlp': ('model.tie_embeddings=False', 'model.mixer_norm=post'),
    'mom/mlp attention/moma': (
        'model.channel_norm=post', 'model.attention.window=4'),
    'mom/moma attention/mlp': (
        'model.modality_specific=True', 'model.moma.experts=1,1'),
    'mod/attention/moma mom/mlp': (
        'model.mod.router=threshold', 'model.mod.capacity=0.5',
        'model.moma.router=threshold', 'model.attention.window=4'),
    'mod/mom/moma attention/moma': (
        'model.mod.router=aux_causal', 'model.moma.router=aux_causal',
        'train.stage=aux_router', 'train.init_from=x'),
}
SLOW = ('mom/moma attention/mlp', 'mod/mom/moma attention/moma')
CASES = [(f'model.pattern={p}', *more) for p, more in PATTERNS.items()]
every = pytest.mark.parametrize('case', [
    pytest.param(case, id=p, marks=pytest.mark.slow_law if p in SLOW else ())
    for p, case in zip(PATTERNS, CASES)])


@functools.cache
def _cfg(*overrides):
  return config.override(config.Config(), TINY + overrides)


@functools.cache
def _model(cfg):
  """The compiled model and parameters large enough to tell tokens apart."""
  params = nn.meta.unbox(
      models.init_params(cfg, jax.random.key(0)))
  small = routing.STATE_NAMES + ('scale', 'A_log', 'dt_bias')
  grow = lambda path, p: p if path[-1].key in small else p * 12
  apply = jax.jit(lambda params, *inputs: models.LM(cfg).apply(
      {'params': params}, *inputs))
  return apply, jax.tree_util.tree_map_with_path(grow, params)


# Slices of numpy arrays are not compiled.
def _tokens(seed=0):
  return np.random.default_rng(seed).integers(0, 40, (B, T), np.int32)


def _modality(tokens):
  return (tokens >= 20).astype(np.int32)


def _logits(cfg, tokens, segment=None, modality=None):
  apply, params = _model(cfg)
  if segment is None:
    segment = np.ones_like(tokens)
  if modality is None:
    modality = _modality(tokens)
  return np.asarray(apply(params, tokens, modality, segment).logits)


@every
def test_changing_the_future_leaves_the_past_bit_equal(case):
  cfg = _cfg(*case)
  tokens = _tokens()
  got = _logits(cfg, tokens)
  assert got.dtype == np.float32 and got.shape == (B, T, 40)
  for t in (1, 7, T - 1):
    other = _logits(
        cfg, np.concatenate([tokens[:, :t], _tokens(1)[:, t:]], 1))
    np.testing.assert_array_equal(got[:, :t], other[:, :t])
    assert not np.array_equal(got[:, t:], other[:, t:])


def test_a_router_that_is_not_causal_fails_that_law():
  cfg = _cfg('model.pattern=attention/moma', 'model.moma.router=expert_choice')
  tokens = _tokens()
  got = _logits(cfg, tokens)
  other = _logits(cfg, np.concatenate([tokens[:, :7], _tokens(1)[:, 7:]], 1))
  assert not np.array_equal(got[:, :7], other[:, :7])


@every
def test_a_row_does_not_depend_on_its_company(case):
  cfg = _cfg(*case)
  tokens = _tokens()
  got = _logits(cfg, tokens)
  company = np.stack([tokens[0], _tokens(2)[1]])
  np.testing.assert_array_equal(got[0], _logits(cfg, company)[0])
  swapped = _logits(cfg, tokens[::-1])
  np.testing.assert_allclose(got, swapped[::-1], atol=2e-5)


@every
def test_packed_documents_equal_documents_alone(case):
  cfg = _cfg(*case)
  tokens = _tokens()
  segment = np.asarray(
      [[1] * 5 + [2] * 7, [0, 1, 1, 1, 0, 2, 2, 2, 2, 0, 0, 0]], np.int32)
  got = _logits(cfg, tokens, segment)
  for b in range(B):
    for document in (1, 2):
      where = np.flatnonzero(segment[b] == document)
      n = len(where)
      row = np.zeros((B, T), np.int32)
      row[0, :n] = tokens[b, where]
      alone = _logits(cfg, row)
      np.testing.assert_allclose(got[b, where], alone[0, :n], atol=5e-5)


@every
def test_prefill_and_decode_equal_the_whole(case):
  """At every split. What the prefill has not seen is padding in it."""
  cfg = _cfg(*case)
  apply, params = _model(cfg)
  tokens = _tokens()
  modality = _modality(tokens)
  want = _logits(cfg, tokens)
  empty = models.init_cache(cfg, B, T)
  ones = np.ones((B, 1), np.int32)
  for split in range(1, T):
    segment = np.where(np.arange(T) < split, 1, 0)[None].repeat(B, 0)
    out = apply(params, tokens, modality, segment.astype(np.int32), empty)
    got = [np.asarray(out.logits)[:, :split]]
    for t in range(split, T):
      out = apply(
          params, tokens[:, t : t + 1], modality[:, t : t + 1], ones, out.cache)
      got.append(out.logits)
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=5e-5)
    np.testing.assert_array_equal(out.cache['length_B'], [T, T])


@every
def test_a_cached_row_may_go_on_with_many_tokens_and_padding(case):
  """Row 0 and row 1 are padded differently in front of one cache."""
  cfg = _cfg(*case)
  apply, params = _model(cfg)
  tokens = _tokens()
  want = _logits(cfg, tokens)
  cache = models.init_cache(cfg, B, T)
  seen = np.zeros(B, int)
  pad = lambda row: row + [0] * (T - len(row))
  steps = (
      [pad([0, 1, 1, 1, 0]), pad([1, 1, 1, 1, 1])],
      [[1], [0]],
      [[0], [1]],
      [pad([1, 0, 1, 1, 1]), pad([0, 1, 0, 0, 0])],
      [pad([0, 1, 1, 0, 1]), pad([1, 1, 1, 1, 1])],
  )
  for step in steps:
    segment = np.asarray(step, np.int32)
    row = np.full_like(segment, 3)
    for b in range(B):
      n = segment[b].sum()
      row[b, segment[b] > 0] = tokens[b, seen[b] : seen[b] + n]
    out = apply(params, row, _modality(row), segment, cache)
    cache, logits = out.cache, np.asarray(out.logits)
    for b in range(B):
      n = segment[b].sum()
      np.testing.assert_allclose(
          logits[b, segment[b] > 0], want[b, seen[b] : seen[b] + n],
          atol=5e-5)
    seen += segment.sum(1)
  np.testing.assert_array_equal(cache['length_B'], seen)


@every
def test_parameters_cache_and_aux_stack_the_repeats(case):
  """Same tree for any depth."""
  cfg = _cfg(*case, 'model.num_layers=4')
  boxed = jax.eval_shape(
      lambda k: models.init_params(cfg, k), jax.random.key(0))
  params, repeats = nn.meta.unbox(boxed), cfg.model.repeats
  assert set(params['units']) == {
      f'block_{i}' for i in range(len(cfg.model.unit))}
  out = jax.eval_shape(
      lambda p, t, c: models.LM(cfg).apply({'params': p}, t, cache=c),
      params, _tokens(), models.init_cache(cfg, B, T))
  for leaf in jax.tree.leaves((params['units'], out.aux, out.cache['units'])):
    assert leaf.shape[0] == repeats
  for box in jax.tree.leaves(
      boxed['units'], is_leaf=lambda x: isinstance(x, nn.Partitioned)):
    assert box.names[0] == 'layers' and len(box.names) == box.value.ndim


def test_each_repeat_has_parameters_of_its_own():
  _, params = _model(_cfg(*CASES[0]))
  kernel = params['units']['block_0']['mixer']['output']['kernel']
  assert not np.array_equal(kernel[0], kernel[1])


def test_a_pattern_of_equal_blocks_equals_a_shorter_pattern():
  """'a a' once a unit, with the same parameters, is 'a' repeated twice."""
  short = _cfg('model.pattern=attention/mlp')
  long = _cfg('model.pattern=attention/mlp attention/mlp')
  _, params = _model(short)
  apply, _ = _model(long)
  block = params['units']['block_0']
  units = {f'block_{i}': jax.tree.map(lambda a, i=i: a[i : i + 1], block)
           for i in range(2)}
  tokens = _tokens()
  got = apply(params | {'units': units}, tokens).logits
  np.testing.assert_allclose(
      got, _logits(short, tokens, modality=tokens * 0), atol=1e-5)


@pytest.mark.slow_law
def test_every_remat_policy_gives_the_same_gradients():
  grads = []
  for remat in ('none', 'dots', 'full'):
    cfg = _cfg(*CASES[0], f'model.remat={remat}')
    if not grads:
      _, params = _model(cfg)
    tokens = jnp.asarray(_tokens())
    loss = lambda p: jnp.square(  # noqa: B023
        models.LM(cfg).apply(  # noqa: B023
            {'params': p}, tokens, _modality(tokens)).logits).mean()  # noqa: B023
    grads.append(jax.jit(jax.grad(loss))(params))
  for other in grads[1:]:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=1e-5 * max(1, np.abs(a).max())), grads[0], other)
  assert max(np.abs(g).max() for g in jax.tree.leaves(grads[0])) > 1e-3


def test_defaults_are_text_in_one_document():
  cfg = _cfg(*CASES[0])
  apply, params = _model(cfg)
  tokens = _tokens()
  np.testing.assert_array_equal(
      apply(params, tokens).logits,
      _logits(cfg, tokens, modality=np.zeros_like(tokens)))


@pytest.mark.parametrize('name', ['modality', 'segment'])
def test_refuses_shapes_that_do_not_match(name):
  cfg = _cfg(*CASES[1])
  wrong = jnp.ones((B, T - 1), jnp.int32)
  with pytest.raises(ValueError, match=rf'{name} has shape \(2, 11\)'):
    models.LM(cfg).apply(
        {'params': _model(cfg)[1]}, jnp.asarray(_tokens()),
        **{f'{name}_BT': wrong})


def test_attention_wants_to_know_the_longest_row():
  cfg = _cfg('model.pattern=mom/mlp attention/mlp')
  with pytest.raises(ValueError, match='max_len=None'):
    models.init_cache(cfg, 1)
  models.init_cache(_cfg('model.pattern=mom/mlp'), 1)


def test_only_router_state_is_replaced():
  cfg = _cfg(*CASES[0])
  apply, params = _model(cfg)
  tokens = _tokens()
  aux = apply(
      params, tokens, _modality(tokens), np.ones_like(tokens)).aux
  new = models.outputs.apply_router_state(
      params, models.outputs.router_state(aux))
  assert jax.tree.structure(new) == jax.tree.structure(params)
  changed = {
      jax.tree_util.keystr(path, simple=True, separator='/')
      for (path, a), b in zip(
          jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(new))
      if not np.array_equal(a, b)
  }
  assert changed == {'units/block_0/channel/balance_bias'}


def test_activations_may_be_bfloat16():
  cfg = _cfg(*CASES[0], 'model.dtype=bfloat16')
  apply, params = _model(cfg)
  tokens = _tokens()
  out = apply(params, tokens, None, None, models.init_cache(cfg, B, T))
  want = _logits(_cfg(*CASES[0]), tokens, modality=tokens * 0)
  assert out.logits.dtype == jnp.float32
  error = np.abs(out.logits - want).mean() / np.abs(want).mean()
  assert 1e-4 < error < 0.1
