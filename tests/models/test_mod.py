"""Laws of Mixture-of-Depths blocks."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, models, routing
from mom_jax.models import eval_modes, mod

T = 12
TINY = (
    'model.width=16', 'model.num_layers=2', 'model.vocab_size=40',
    'model.remat=none', 'model.mixer.num_heads=1', 'model.mixer.key_dim=8',
    'model.mixer.value_dim=8', 'model.mixer.chunk=4',
    'model.mixer.num_memories=2', 'model.mixer.top_k=1',
    'model.attention.num_heads=2', 'model.attention.num_kv_heads=1',
    'model.attention.head_dim=8', 'model.mlp.hidden=24',
    'model.moma.experts=2,2', 'model.moma.hidden=24',
    'model.mod.capacity=0.4',
)
PATTERNS = (
    'mod/attention/moma attention/mlp', 'mod/mom/moma attention/mlp')
patterns = pytest.mark.parametrize('pattern', PATTERNS)


@functools.cache
def _cfg(*overrides):
  return config.override(config.Config(), TINY + overrides)


@functools.cache
def _params(cfg):
  params = nn.meta.unbox(models.init_params(cfg, jax.random.key(0)))
  small = routing.STATE_NAMES + ('scale', 'A_log', 'dt_bias')
  grow = lambda path, p: p if path[-1].key in small else p * 12
  return jax.tree_util.tree_map_with_path(grow, params)


def _batch(B=3, seed=0):
  tokens = jax.random.randint(jax.random.key(seed), (B, T), 0, 40)
  segment = jnp.ones((B, T), jnp.int32).at[0, 8:].set(2).at[0, 11:].set(0)
  return tokens, (tokens >= 20).astype(jnp.int32), segment


@functools.partial(jax.jit, static_argnums=0)
def _run(cfg, params, tokens, modality, segment):
  return models.LM(cfg).apply({'params': params}, tokens, modality, segment)


@patterns
def test_rows_of_picked_tokens_equal_the_others_as_padding(
    pattern, monkeypatch):
  """Gathering what expert choice picks saves work and changes nothing: the
  block sees the same tokens at the same places. Gradients too."""
  cfg = _cfg(f'model.pattern={pattern}', 'model.mod.router=expert_choice',
             'model.moma.router=expert_choice')
  params, batch = _params(cfg), _batch()

  def loss(p):
    out = models.LM(cfg).apply({'params': p}, *batch)
    return (out.logits**2 * (batch[2] > 0)[..., None]).mean(), out

  run = lambda: jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  (_, got), grads = run()
  whole = mod.on_picked
  monkeypatch.setattr(mod, 'on_picked', lambda *a: whole(*a[:-1], None))
  (_, want), want_grads = run()
  valid = np.asarray(batch[2]) > 0
  np.testing.assert_allclose(
      got.logits[valid], want.logits[valid], atol=2e-4, rtol=1e-4)
  for part in ('mod', 'channel'):
    np.testing.assert_array_equal(
        getattr(got.aux[0], part).stats.selected_BTE,
        getattr(want.aux[0], part).stats.selected_BTE)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(
          a, b, atol=1e-4 * max(1, np.abs(b).max())), grads, want_grads)


def test_expert_choice_picks_its_share_of_each_sequence():
  """ceil(0.4 b) of the b tokens that are no padding, no other sees them."""
  cfg = _cfg(f'model.pattern={PATTERNS[0]}')
  tokens, modality, segment = _batch()
  aux = _run(cfg, _params(cfg), tokens, modality, segment).aux[0]
  picked = np.asarray(aux.mod.stats.selected_BTE)[0, ..., 0]
  assert picked.sum(1).tolist() == [5, 5, 5]
  assert not picked[np.asarray(segment) == 0].any()
  experts = np.asarray(aux.channel.stats.selected_BTE)[0].any(-1)
  assert not experts[~picked].any() and experts[picked].any()


@patterns
def test_who_is_not_picked_passes_by_and_is_not_seen(pattern):
  """With no token picked the block is not there; a token that is not picked
  changes no other one in it."""
  cfg = _cfg(f'model.pattern={pattern}', 'model.mod.router=threshold')
  params, (tokens, modality, segment) = _params(cfg), _batch()
  none = jax.tree.map(lambda p: p, params)
  none['units']['block_0']['mod'] |= {'threshold': jnp.ones((1, 1))}
  got = _run(cfg, none, tokens, modality, segment)
  assert not got.aux[0].mod.stats.selected_BTE.any()
  plain = _cfg('model.pattern=attention/mlp', 'model.num_layers=1')
  alone = none | {'units': {'block_0': none['units']['block_1']}}
  want = _run(plain, alone, tokens, modality, segment)
  np.testing.assert_allclose(got.logits, want.logits, atol=1e-5)


def test_prefix_is_bit_equal_for_causal_routers_only():
  """Spec of the combination, test 1; expert choice is shown to fail."""
  for router in ('expert_choice', 'threshold', 'aux_causal'):
    cfg = _cfg(f'model.pattern={PATTERNS[0]}')
    if router != 'expert_choice':
      cfg = eval_modes.causal(cfg)
    if router == 'aux_causal':
      cfg = eval_modes.aux_causal(_cfg(f'model.pattern={PATTERNS[0]}'))
    params = _params(cfg)
    for B in (1, 3):
      tokens, _, _ = _batch(B)
      ones = jnp.ones_like(tokens)
      modality = lambda t: (t >= 20).astype(jnp.int32)
      before = _run(cfg, params, tokens, modality(tokens), ones).logits
      same = []
      for t in (3, 7, T - 1):
        other = tokens.at[:, t:].set(_batch(B, seed=1)[0][:, t:])
        after = _run(cfg, params, other, modality(other), ones).logits
        same.append(bool((before[:, :t] == after[:, :t]).all()))
      assert all(same) == (router != 'expert_choice'), (router, B)


def test_the_gate_gets_a_gradient_and_the_threshold_none():
  cfg = _cfg(f'model.pattern={PATTERNS[0]}')
  params, batch = _params(cfg), _batch()
  grad = jax.jit(jax.grad(lambda p: models.LM(cfg).apply(
      {'params': p}, *batch).logits[..., 0].sum()))(params)
  grad = grad['units']['block_0']['mod']
  assert np.abs(grad['router']['kernel']).max() > 1e-4
  assert not np.asarray(grad['threshold']).any()


@pytest.mark.parametrize('overrides, message', [
    (('model.pattern=mod/attention/mlp', 'model.mod.capacity=1.5'),
     'mod.capacity=1.5 must lie in'),
    (('model.pattern=deep/attention/mlp',), "the block 'deep/attention/mlp'"),
    (('model.mod.router=token_choice',), "mod.router='token_choice' must"),
])
def test_settings_that_cannot_work_are_refused(overrides, message):
  with pytest.raises(config.UserError, match=message):
    config.override(config.Config(), overrides)


def test_all_tokens_with_weight_one_are_a_plain_block(monkeypatch):
  cfg = _cfg('model.pattern=mod/attention/mlp', 'model.mod.capacity=1')
  params, batch = _params(cfg), _batch()
  whole = mod.on_picked
  monkeypatch.setattr(
      mod, 'on_picked', lambda block, picked, gate, *rest: whole(
          block, picked, jnp.ones_like(gate), *rest))
  got = models.LM(cfg).apply({'params': params}, *batch)
  picked = got.aux[0].mod.stats.selected_BTE[..., 0]
  np.testing.assert_array_equal(picked, (batch[2] > 0)[None].repeat(2, 0))
  plain = dataclasses.replace(
      cfg, model=dataclasses.replace(cfg.model, pattern='attention/mlp'))
  want = _run(plain, params, *batch)
  valid = np.asarray(batch[2]) > 0
  np.testing.assert_allclose(
      got.logits[valid], want.logits[valid], atol=1e-4)
