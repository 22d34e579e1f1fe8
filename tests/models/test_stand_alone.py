"""Layers in models of somebody else: plain Flax, NNX, with and without a mesh.

What a layer computes is tested elsewhere; here it is how one lives with it.
"""

import dataclasses
import functools
import subprocess
import sys
import time

import contract
from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mom_jax import config, models
from mom_jax.models import Attention, Mom, Moma, block, mlp, outputs
from mom_jax.parallel import sharding

B, T, D, VOCAB = 8, 16, 16, 24

ATTENTION = dict(width=D, num_heads=2)
MOM = dict(width=D, num_memories=4, top_k=1, num_heads=2, key_dim=8,
           router='softmax_topk_bias', balance_rate=0.05)
MOMA = dict(width=D, experts=(4, 4), hidden=16, balance_rate=0.05)
LAYERS = {
    'attention': Attention(**ATTENTION),
    'mlp': mlp.Mlp(width=D, hidden=24),
    'mom': Mom(**MOM),
    'moma': Moma(**MOMA),
    'moma_by_experts': Moma(
        width=D, experts=(8,), hidden=16, router='expert_choice', shared=1),
    'moma_predicted': Moma(
        width=D, experts=(4, 4), hidden=16, router='aux_causal'),
}
STATES = {'mom': 'balance_bias', 'moma': 'balance_bias',
          'moma_by_experts': 'threshold', 'moma_predicted': 'threshold'}
every = pytest.mark.parametrize('name', LAYERS)


def _x(seed=1):
  return jax.random.normal(jax.random.key(seed), (B, T, D))


def _modality():
  return jax.random.randint(jax.random.key(2), (B, T), 0, 2)


@every
def test_init_gives_plain_arrays_and_router_state_apart(name):
  variables = LAYERS[name].init(jax.random.key(0), _x())
  state = {STATES[name]} if name in STATES else set()
  assert set(variables) == {'params', *(['router'] if state else [])}
  assert set(variables.get('router', {})) == state
  assert not state & set(variables['params'])
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(
      variables, is_leaf=lambda x: not isinstance(x, dict)))


@every
def test_init_is_as_fast_outside_jit_as_inside(name):
  """Compiling the numbers to draw is all that takes time."""
  def seconds(init):
    jax.clear_caches()
    start = time.process_time()
    made = jax.block_until_ready(init(jax.random.key(0), _x()))
    return time.process_time() - start, made

  outside, made = seconds(LAYERS[name].init)
  inside, same = seconds(jax.jit(LAYERS[name].init))
  assert outside < 2 * inside + 0.5
  _close(made, same)


def _close(got, want):
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)


@every
def test_documents_modalities_and_caches_are_optional(name):
  """None is one document, and one modality."""
  layer = LAYERS[name]
  variables = layer.init(jax.random.key(0), _x())
  ones, zeros = jnp.ones((B, T), jnp.int32), jnp.zeros((B, T), jnp.int32)
  inputs = {'mlp': (), 'mom': (None, ones, zeros), 'moma': (zeros,),
            'attention': (None, ones, zeros)}[name.split('_')[0]]
  run = jax.jit(layer.apply)
  _close(run(variables, _x()), run(variables, _x(), *inputs))


def test_a_modality_is_asked_for_where_it_matters():
  layer = Attention(width=D, num_heads=2, num_modality_copies=2)
  with pytest.raises(ValueError, match='need the modality of each token'):
    layer.init(jax.random.key(0), _x())


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match='num_heads=3 must be a multiple of'):
    Attention(width=24, num_heads=3, num_kv_heads=2).init(
        jax.random.key(0), jnp.ones((1, 2, 24)))


def test_aux_has_the_loss_of_a_router_with_its_weights():
  """K for each modality if balanced, E if one expert takes all."""
  layer = dataclasses.replace(
      LAYERS['moma'], router='softmax_topk', balance_weight=0.5)
  variables = layer.init(jax.random.key(0), _x())
  assert set(variables) == {'params'}
  even = variables['params'] | {'router': {'kernel': jnp.zeros((D, 8))}}
  _, aux = layer.apply({'params': even}, _x(), _modality())
  # Equal probabilities: P is even whoever is taken.
  np.testing.assert_allclose(aux.loss, 0.5, rtol=1e-6)
  one = jnp.zeros((D, 8)).at[:, jnp.array([0, 4])].set(50.0)
  _, aux = layer.apply(
      {'params': even | {'router': {'kernel': one}}}, jnp.abs(_x()),
      _modality())
  np.testing.assert_allclose(aux.loss, 0.5 * 4, rtol=1e-6)
  weighted = dataclasses.replace(layer, balance_weight=0.0, z_weight=2.0)
  _, aux = weighted.apply({'params': even}, _x(), _modality())
  np.testing.assert_allclose(aux.loss, 2 * np.log(4) ** 2, rtol=1e-6)
  _, aux = LAYERS['mlp'].apply(
      LAYERS['mlp'].init(jax.random.key(0), _x()), _x())
  assert aux.loss == 0 and aux.state == {} and aux.stats is None


class Foreign(nn.Module):
  """A model of somebody else that takes one of each."""

  @nn.compact
  def __call__(self, tokens, modality):
    x = nn.Embed(VOCAB, D)(tokens)
    y, _, mom_aux = Mom(**MOM, name='mom')(nn.RMSNorm()(x))
    x += y
    y, _, _ = Attention(**ATTENTION, name='attention')(nn.RMSNorm()(x))
    x += y
    y, moma_aux = Moma(**MOMA, name='moma')(nn.RMSNorm()(x), modality)
    logits = nn.Dense(VOCAB)(nn.RMSNorm()(x + y))
    return logits, {'mom': mom_aux, 'moma': moma_aux}


def _batch(step=0):
  """Rows that count upwards in steps of 1 to 3; odd tokens are images."""
  keys = jax.random.split(jax.random.key(step))
  first = jax.random.randint(keys[0], (B, 1), 0, VOCAB)
  stride = jax.random.randint(keys[1], (B, 1), 1, 4)
  tokens = (first + stride * jnp.arange(T + 1)[None]) % VOCAB
  return tokens, tokens[:, :-1] % 2


def _loss(params, router, tokens, modality):
  logits, aux = Foreign().apply(
      {'params': params, 'router': router}, tokens[:, :-1], modality)
  loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]).mean()
  return loss + sum(a.loss for a in aux.values()), aux


def _busiest(aux):
  """Fraction of its modality's tokens that the busiest expert took."""
  took_E = np.asarray(aux.stats.selected_BTE).sum((0, 1))
  return max((g / g.sum()).max() for g in np.split(took_E, len(took_E) // 4))


def test_a_foreign_model_learns_and_its_routers_even_out():
  """Fifty steps; biases send all tokens to one memory and one expert first."""
  variables = jax.jit(Foreign().init)(jax.random.key(0), *_inputs())
  params, router = variables['params'], variables['router']
  one = jnp.array([1.0, 0, 0, 0])
  router = {'mom': {'balance_bias': one},
            'moma': {'balance_bias': jnp.concatenate([one, one])}}
  optimizer = optax.adam(1e-2)
  moments = optimizer.init(params)

  @jax.jit
  def step(params, router, moments, tokens, modality):
    (loss, aux), grads = jax.value_and_grad(_loss, has_aux=True)(
        params, router, tokens, modality)
    update, moments = optimizer.update(grads, moments)
    router = {name: a.state for name, a in aux.items()}
    return optax.apply_updates(params, update), router, moments, loss, aux

  losses, busiest = [], []
  for i in range(50):
    params, router, moments, loss, aux = step(
        params, router, moments, *_batch(i))
    losses.append(float(loss))
    busiest.append({name: _busiest(a) for name, a in aux.items()})
  assert losses[0] > 0.9 * np.log(VOCAB)
  assert np.mean(losses[-5:]) < 0.6 * losses[0]
  for name in ('mom', 'moma'):
    assert busiest[0][name] > 0.99
    assert np.mean([b[name] for b in busiest[-5:]]) < 0.5


def _inputs():
  tokens, modality = _batch()
  return tokens[:, :-1], modality


def test_a_foreign_model_on_a_mesh_equals_one_device():
  variables = jax.jit(Foreign().init)(jax.random.key(0), *_inputs())
  run = lambda: jax.jit(jax.value_and_grad(_loss, has_aux=True))(
      variables['params'], variables['router'], *_batch())
  (want, want_aux), want_grads = run()
  with jax.set_mesh(sharding.make_mesh(data=2, expert=2, tensor=2)):
    (got, got_aux), got_grads = jax.device_get(run())
  np.testing.assert_allclose(got, want, rtol=1e-6)
  _close({k: a.state for k, a in got_aux.items()},
         {k: a.state for k, a in want_aux.items()})
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      got_grads, want_grads)


# Mom has this test in test_mom_alone.
INSIDE = {
    'moma': ('attention/moma', ()),
    'mlp': ('attention/mlp', ()),
    'moma_by_experts': ('attention/moma', (
        'model.moma.router=expert_choice', 'model.moma.experts=4',
        'model.moma.shared=1')),
}


@pytest.mark.parametrize('pattern, settings', INSIDE.values(), ids=INSIDE)
def test_gradients_are_those_inside_a_language_model(pattern, settings):
  """The same weights in a model put together by hand."""
  cfg = config.override(config.Config(), [
      f'model.pattern={pattern}', f'model.width={D}', 'model.num_layers=1',
      f'model.vocab_size={VOCAB}',
      'model.attention.num_heads=2', 'model.attention.num_kv_heads=2',
      'model.attention.head_dim=8', 'model.moma.hidden=16',
      'model.mlp.hidden=24', 'model.image_side=0', *settings])
  tokens, modality = _inputs()
  weight = jax.random.normal(jax.random.key(3), (B, T, VOCAB))
  params = jax.tree.map(lambda p: 5 * p, nn.meta.unbox(
      models.init_params(cfg, jax.random.key(0))))

  def inside(params):
    out = models.LM(cfg).apply({'params': params}, tokens, modality)
    return (out.logits * weight).sum()

  def norm(x, params):
    mean = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + cfg.model.norm_eps) * (
        params['scale'][None, None])

  def layer(table, name, params, x, *inputs):
    """Its field `router_collection` says where router state is."""
    module = table[name].make(cfg.model)
    if 'router_collection' in module.__dataclass_fields__:
      module = module.clone(router_collection='router')
    state = {k: params[k] for k in params if k in STATES.values()}
    params = {k: params[k] for k in params if k not in state}
    y, *_, aux = module.apply(
        {'params': params, 'router': state}, x, *inputs)
    assert set(aux.state) == set(state)
    return y

  def by_hand(params):
    block_ = jax.tree.map(lambda p: p[0], params['units']['block_0'])
    table = params['embed']['embedding']
    mixer, channel = pattern.split('/')
    x = table[tokens]
    x += layer(block.MIXERS, mixer, block_['mixer'],
               norm(x, block_['mixer_norm']))
    x += layer(block.CHANNELS, channel, block_['channel'],
               norm(x, block_['channel_norm']),
               *([modality] if channel == 'moma' else []))
    logits = jnp.einsum(
        'btd,wd->btw', norm(x, params['final_norm']), table)
    return (logits * weight).sum()

  want, want_grads = jax.jit(jax.value_and_grad(inside))(params)
  got, got_grads = jax.jit(jax.value_and_grad(by_hand))(params)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      got_grads, want_grads)


class NnxModel(nnx.Module):
  """The same layers in NNX: `ToNNX` makes modules of them."""

  def __init__(self, x, modality, rngs):
    wrap = functools.partial(nnx.bridge.ToNNX, rngs=rngs)
    self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
    self.attention = nnx.bridge.lazy_init(wrap(LAYERS['attention']), x)
    self.moma = nnx.bridge.lazy_init(wrap(LAYERS['moma']), x, modality)
    self.output = nnx.Linear(D, VOCAB, rngs=rngs)

  def __call__(self, tokens, modality):
    x = self.embed(tokens)
    x += self.attention(x)[0]
    y, aux = self.moma(x, modality)
    return self.output(x + y), aux


def test_nnx_trains_with_router_state_between_steps():
  """Parameters are `nnx.Param`; router state is not, and comes from aux."""
  model = NnxModel(_x(), _modality(), nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
  bias = jnp.array([1.0, 0, 0, 0] * 2)
  model.moma.balance_bias[...] = bias
  trained = jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param))
  assert not any('balance_bias' in str(path) for path, _ in trained)

  @nnx.jit
  def step(model, optimizer, tokens, modality):
    def loss(model):
      logits, aux = model(tokens[:, :-1], modality)
      loss = optax.softmax_cross_entropy_with_integer_labels(
          logits, tokens[:, 1:]).mean()
      return loss + aux.loss, aux

    (value, aux), grads = nnx.value_and_grad(loss, has_aux=True)(model)
    optimizer.update(model, grads)
    for name, state in aux.state.items():
      getattr(model.moma, name)[...] = state
    return value, aux

  losses, busiest = [], []
  for i in range(50):
    value, aux = step(model, optimizer, *_batch(i))
    losses.append(float(value))
    busiest.append(_busiest(aux))
  assert np.mean(losses[-5:]) < 0.6 * losses[0]
  assert busiest[0] > 0.99 and np.mean(busiest[-5:]) < 0.5
  assert isinstance(aux, outputs.LayerAux)
  np.testing.assert_array_equal(
      model.moma.balance_bias[...], aux.state['balance_bias'])


NUMPY = """
import jax
import numpy as np
from mom_jax import models, pallas
from mom_jax.routing import dispatch

floats = lambda *shape: np.random.default_rng(0).normal(
    size=shape).astype(np.float32)
x, ints = floats(2, 8, 16), np.zeros((2, 8), np.int32)
for layer, more in (
    (models.Moma(16, (2, 2), hidden=8, shared=1), (ints,)),
    (models.Mom(16, num_heads=2, key_dim=4, value_dim=4, chunk=8),
     (None, ints + 1)),
    (models.Attention(16, num_heads=2), (None, ints + 1))):
  variables = jax.tree.map(np.asarray, layer.init(jax.random.key(0), x, *more))
  layer.apply(variables, x, *more)
sizes, group = np.array([3, 3], np.int32), np.array([0, 1, 0, 1, 1, 0])
pallas.grouped_matmul(floats(6, 4), floats(2, 4, 3), sizes, row_index=group)
pallas.grouped_swiglu(floats(6, 4), floats(2, 4, 6), sizes)
pallas.chunk_memory(
    floats(16, 1, 4), floats(16, 1, 4), floats(16, 1, 4), None, None,
    group_N=np.array([0, 1], np.int32), num_groups=2, chunk=8)
for per_token in (1, None):
  layout = jax.tree.map(np.asarray, dispatch.group(
      np.arange(6), group, num_tokens=6, num_groups=2,
      rows_per_token=per_token))
  dispatch.ungroup(
      dispatch.gather(floats(6, 4), layout), layout, floats(6), 6)
  dispatch.gather_matmul(floats(6, 4), floats(2, 4, 3), sizes, layout)
dispatch.matmul(floats(6, 4), floats(2, 4, 3), group)
"""


def test_numpy_arrays_will_do_outside_jit():
  """Layers, with parameters in NumPy too, and operations.

  In a process of its own: here annotations, which say JAX arrays, are checked.
  """
  done = subprocess.run(
      [sys.executable, '-c', NUMPY], capture_output=True, text=True,
      check=False)
  assert done.returncode == 0, done.stderr
