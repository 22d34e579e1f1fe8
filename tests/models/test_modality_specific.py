"""Laws of Mixture-of-Transformers: each modality has projections of its own.

What any model must hold (causality, packing, decoding and so on) is tested in
`test_lm` with such a case among the others.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config, models
from mom_jax.models import block, flops, layers
from mom_jax.parallel import sharding
from mom_jax.routing import dispatch
from mom_jax.training import optimizer

T, B, D = 12, 3, 16
TINY = (
    'model.width=16', 'model.num_layers=2', 'model.vocab_size=40',
    'model.remat=none', 'model.pattern=mom/moma attention/mlp',
    'model.mixer.num_heads=2', 'model.mixer.key_dim=8',
    'model.mixer.value_dim=8', 'model.mixer.chunk=4',
    'model.mixer.num_memories=3', 'model.attention.num_heads=2',
    'model.attention.num_kv_heads=1', 'model.attention.head_dim=8',
    'model.mlp.hidden=24', 'model.moma.experts=1,1', 'model.moma.hidden=24',
)
# Every way in which a mixer has projections.
MIXERS = {
    'attention': ('attention', {}),
    'low_rank': ('mom', dict(rule='kda', gate_rank=4, output_norm='group')),
    'one_set': ('mom', dict(single_kv_proj=True)),
    'shift': ('mom', dict(
        rule='rwkv7', num_memories=1, top_k=1, shared=False, conv_width=0)),
}
every = pytest.mark.parametrize('case', MIXERS.values(), ids=MIXERS)


def _cfg(*overrides):
  return config.override(config.Config(), TINY + overrides)


@functools.cache
def _pair(name, settings):
  """(apply, params) of a mixer: shared, and one copy per modality."""
  base = _cfg().model
  base = dataclasses.replace(
      base, mixer=dataclasses.replace(base.mixer, **dict(settings)))
  pair = []
  for model in (base, dataclasses.replace(base, modality_specific=True)):
    layer = functools.partial(_call, block.MIXERS[name], model)
    with layers.with_logical_axes():
      init = jax.jit(functools.partial(layer, 'init'))
      params = init(jax.random.key(0), *_batch())['params']
    pair.append((jax.jit(functools.partial(layer, 'apply')), params))
  return pair


def _call(mixer, model, method, variables, x, modality):
  segment = (modality >= 0).astype(jnp.int32)
  tokens = layers.TokenInfo(modality, segment, None)
  return getattr(mixer.make(model), method)(
      variables, x, method=lambda layer, x: mixer.call(
          layer, x, None, tokens, None))


def _mixer(case):
  name, settings = case
  return _pair(name, tuple(settings.items()))


def _batch(seed=1):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  modality = jnp.asarray(rng.integers(0, 2, (B, T)))
  return x, modality.at[1, -3:].set(-1)


def _apply(layer, params, x, modality):
  return layer({'params': nn.meta.unbox(params)}, x, modality)[0]


def _boxes(tree):
  return jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def _copies(shared, specific):
  """The modality-specific parameters, each copy the shared ones."""
  own = dict(_boxes(specific))

  def one(path, leaf):
    value = leaf.value
    if 'modality' in own[path].names:
      at = own[path].names.index('modality')
      value = jnp.stack([value] * 2, at)
    assert value.shape == own[path].value.shape
    return value

  return jax.tree_util.tree_map_with_path(
      one, shared, is_leaf=lambda x: isinstance(x, nn.Partitioned))


@every
def test_equal_copies_are_the_tied_mixer(case):
  (shared, shared_params), (own, own_params) = _mixer(case)
  x, modality = _batch()
  want = _apply(shared, shared_params, x, modality)
  got = _apply(own, _copies(shared_params, own_params), x, modality)
  np.testing.assert_allclose(
      got, want, atol=1e-6 * max(1, float(np.abs(want).max())))
  assert np.abs(want).max() > 1e-4
  np.testing.assert_array_equal(got[1, -3:], 0)


@every
def test_maps_out_are_a_tokens_own_and_maps_in_those_of_its_past(case):
  """Others than those of the first modality reach it through memory only.

  A row of one modality knows nothing of the others' projections; in a mixed
  row each token before the first of another modality does not either.
  """
  _, (layer, params) = _mixer(case)
  x, modality = _batch()
  modality = modality.at[0].set(0).at[1, :5].set(0).at[1, 5].set(1)

  def other(path, leaf):
    if 'modality' not in leaf.names:
      return leaf.value
    at = leaf.names.index('modality')
    index = (slice(None),) * at + (1,)
    return leaf.value.at[index].multiply(-2)

  changed = jax.tree_util.tree_map_with_path(
      other, params, is_leaf=lambda x: isinstance(x, nn.Partitioned))
  a = _apply(layer, params, x, modality)
  b = _apply(layer, changed, x, modality)
  np.testing.assert_array_equal(a[0], b[0])
  np.testing.assert_array_equal(a[1, :5], b[1, :5])
  assert (np.abs(a - b)[1, 5:9].max(-1) > 1e-7).all()
  text_after_image = np.flatnonzero(np.asarray(modality[2]) == 0)[-1]
  assert (np.asarray(modality[2, :text_after_image]) == 1).any()
  assert np.abs(a - b)[2, text_after_image].max() > 1e-7


@functools.cache
def _model(own):
  cfg = _cfg(f'model.modality_specific={own}', 'model.pattern=mom/moma',
             'model.num_layers=1')
  apply = jax.jit(lambda params, *inputs: models.LM(cfg).apply(
      {'params': params}, *inputs).logits)
  return cfg, apply, models.init_params(cfg, jax.random.key(0))


def _tokens():
  tokens = jax.random.randint(jax.random.key(0), (B + 1, T), 0, 40)
  return tokens, (tokens >= 20).astype(jnp.int32)


@pytest.mark.slow_law
def test_equal_copies_are_the_tied_model():
  _, shared, shared_params = _model(False)
  _, own, own_params = _model(True)
  want = shared(nn.meta.unbox(shared_params), *_tokens())
  got = own(_copies(shared_params, own_params), *_tokens())
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_without_mixing_modalities_do_not_meet():
  """Output projections of 0: logits of text know no weight of images, and none
  of their tokens; the norms are their own too."""
  _, apply, params = _model(True)

  def cut(image):
    def one(path, leaf):
      if path[-2].key == 'output':
        return leaf.value * 0
      if 'modality' not in leaf.names:
        return leaf.value
      index = (slice(None),) * leaf.names.index('modality') + (1,)
      return leaf.value.at[index].multiply(image)

    return jax.tree_util.tree_map_with_path(
        one, params, is_leaf=lambda x: isinstance(x, nn.Partitioned))

  tokens, modality = _tokens()
  text = np.asarray(modality) == 0
  a, b = (apply(cut(image), tokens, modality) for image in (1.0, 3.0))
  np.testing.assert_array_equal(a[text], b[text])
  assert (np.abs(a - b)[~text].max(-1) > 1e-6).all()
  other = jnp.where(text, tokens, 39 - tokens % 20)
  c = apply(cut(1.0), other, modality)
  np.testing.assert_array_equal(a[text], c[text])
  assert np.abs(a - c)[~text].max() > 1e-6


def test_counts_copies_once_activated():
  """The same work and the same active weights; all copies in the total."""
  shared, own = _cfg(), _cfg('model.modality_specific=True')
  assert flops.count_params(shared)[1] == flops.count_params(own)[1]
  assert flops.forward_flops_per_token(shared) == (
      flops.forward_flops_per_token(own))
  more = flops.count_params(own)[0] - flops.count_params(shared)[0]
  H, K, memories = 2, 8, 4
  mom = D * H * K * (3 + 2 * memories) + memories * D * H * 2 + K
  attention = D * K * (2 + 1 + 1 + 2) + 2 * K
  assert more == mom + attention + 2 * 2 * D


def test_tied_models_have_no_axis_of_modalities():
  for path, leaf in _boxes(_model(False)[2]):
    assert 'modality' not in leaf.names, path


def test_copies_are_drawn_apart_and_alike():
  """Each as the only one would be: same deviation, other numbers."""
  shared, own = dict(_boxes(_model(False)[2])), _boxes(_model(True)[2])
  found = 0
  for path, leaf in own:
    if 'modality' not in leaf.names or path[-1].key == 'scale':
      continue
    a, b = np.moveaxis(leaf.value, leaf.names.index('modality'), 0)
    one = shared[path].value
    assert a.shape == one.shape and not np.array_equal(a, b)
    if one.size >= 100:
      np.testing.assert_allclose(
          [a.std(), b.std()], one.std(), rtol=8 / np.sqrt(2 * one.size))
      found += 1
  assert found > 4


def test_scales_are_not_decayed_and_maps_are():
  params = nn.meta.unbox(_model(True)[2])
  mask = optimizer.decayed(params, True)
  for path, keep in jax.tree_util.tree_leaves_with_path(mask):
    fixed = path[-1].key in ('scale', 'A_log', 'dt_bias')
    assert keep != fixed, path


def test_two_devices_equal_one():
  _, apply, params = _model(True)
  params = nn.meta.unbox(params)
  tokens, modality = _tokens()
  want = apply(params, tokens, modality)
  cfg = _model(True)[0]
  mesh = sharding.make_mesh(data=1, fsdp=2, devices=jax.devices()[:2])
  boxed = jax.eval_shape(
      lambda key: models.init_params(cfg, key), jax.random.key(0))
  shardings = sharding.param_shardings(boxed, mesh, 'fsdp')
  with jax.set_mesh(mesh):
    batch = jax.device_put((tokens, modality), sharding.batch_sharding(mesh))
    got = apply(jax.device_put(params, shardings), *batch)
  np.testing.assert_allclose(np.asarray(got), want, atol=1e-5)


@pytest.mark.parametrize('groups', [1, 3])
def test_matmul_takes_rows_in_any_order(groups):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=s), jnp.float32)
          for s in ((30, 5), (groups, 5, 4)))
  group = jnp.asarray(rng.integers(-1, groups, 30))
  want = jnp.einsum('rd,rdf->rf', x, w[group]) * (group >= 0)[:, None]
  run = lambda x, w: (dispatch.matmul(x, w, group) ** 2).sum()
  dense = lambda x, w: ((jnp.einsum(
      'rd,rdf->rf', x, w[group]) * (group >= 0)[:, None]) ** 2).sum()
  np.testing.assert_allclose(dispatch.matmul(x, w, group), want, atol=1e-5)
  for a, b in zip(jax.grad(run, (0, 1))(x, w), jax.grad(dense, (0, 1))(x, w)):
    np.testing.assert_allclose(a, b, atol=1e-4)
