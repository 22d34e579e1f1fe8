"""The MoM layer without a language model around it."""

import dataclasses

import contract
import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import config, models
from mom_jax.models import Mom, block
from mom_jax.parallel import sharding

D = 16
LAYER = Mom(width=D, num_memories=4, top_k=2, num_heads=2, key_dim=8, chunk=8,
            router='softmax_topk_bias')


def _x(rows=2, T=12):
  return jax.random.normal(jax.random.key(1), (rows, T, D))


def test_init_gives_plain_arrays_and_keeps_router_state_apart():
  variables = LAYER.init(jax.random.key(0), _x())
  assert set(variables) == {'params', 'router'}
  assert set(variables['router']) == {'balance_bias'}
  assert all(type(leaf) is type(jnp.zeros(())) for leaf in jax.tree.leaves(
      variables, is_leaf=lambda leaf: not isinstance(leaf, dict)))
  jax.tree.map(
      np.testing.assert_array_equal, variables,
      jax.jit(LAYER.init)(jax.random.key(0), _x()))


def test_values_are_as_wide_as_keys_unless_told():
  params = LAYER.init(jax.random.key(0), _x())['params']
  assert params['value'].shape == params['key'].shape
  wide = dataclasses.replace(LAYER, value_dim=4)
  assert wide.init(jax.random.key(0), _x())['params']['value'].shape[-1] == 4


def test_aux_has_the_loss_and_the_next_state():
  """The loss is K of a balanced router, times its weight."""
  layer = dataclasses.replace(LAYER, balance_weight=0.5, z_weight=2.0)
  variables = layer.init(jax.random.key(0), _x())
  _, _, aux = layer.apply(variables, _x())
  stats = aux.stats
  balance = 4 * (stats.load_E * stats.mean_prob_E).sum()
  np.testing.assert_allclose(
      aux.loss, 0.5 * balance + 2 * stats.router_z, rtol=1e-6)
  assert set(aux.state) == set(variables['router'])
  assert not np.array_equal(
      aux.state['balance_bias'], variables['router']['balance_bias'])


def test_gradients_are_those_inside_a_language_model():
  """One block of it: the residual stream is the layer's input plus output."""
  cfg = config.override(config.Config(), [
      f'model.width={D}', 'model.num_layers=1', 'model.pattern=mom/none',
      'model.mixer.num_heads=2', 'model.mixer.key_dim=8',
      'model.mixer.value_dim=8', 'model.mixer.chunk=8', 'model.image_side=0',
      'model.mixer.router=softmax_topk_bias', 'model.remat=none'])
  tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 50)
  weight = jax.random.normal(jax.random.key(3), (2, 12, cfg.model.vocab_size))
  boxed = models.init_params(cfg, jax.random.key(0))
  params = jax.tree.map(
      lambda p: 10 * getattr(p, 'value', p), boxed,
      is_leaf=lambda p: hasattr(p, 'names'))

  def inside(params):
    return (models.LM(cfg).apply({'params': params}, tokens).logits
            * weight).sum()

  layer = dataclasses.replace(
      block.MIXERS['mom'].make(cfg.model), router_collection='router')

  def norm(x, scale):
    square = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(square + cfg.model.norm_eps) * scale[None, None]

  def alone(params):
    one = jax.tree.map(lambda p: p[0], params['units']['block_0'])
    router = {'balance_bias': one['mixer']['balance_bias']}
    mixer = {k: v for k, v in one['mixer'].items() if k not in router}
    table = params['embed']['embedding']
    x = table[tokens]
    y, _, _ = layer.apply(
        {'params': mixer, 'router': router},
        norm(x, one['mixer_norm']['scale']))
    x = norm(x + y, params['final_norm']['scale'])
    return (jnp.einsum('btd,wd->btw', x, table) * weight).sum()

  want, want_grads = jax.jit(jax.value_and_grad(inside))(params)
  got, got_grads = jax.jit(jax.value_and_grad(alone))(params)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      got_grads, want_grads)


def test_a_mesh_gives_what_one_device_gives():
  x = _x(rows=8)
  variables = LAYER.init(jax.random.key(0), x)

  def loss(variables, x):
    y, _, aux = LAYER.apply(variables, x)
    return (y ** 2).sum() + aux.loss

  grad = jax.value_and_grad(lambda p, x: loss(
      {'params': p, 'router': variables['router']}, x))
  want = jax.jit(grad)(variables['params'], x)
  mesh = sharding.make_mesh(data=4, expert=2)
  with jax.set_mesh(mesh):
    got = jax.jit(grad)(variables['params'], x)
  np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
  jax.tree_util.tree_map_with_path(
      lambda path, a, b: contract.gradients_agree(a, b, name=str(path)),
      got[1], want[1])
