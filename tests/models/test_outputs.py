"""The walk over the layers of a model, and router state among parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import models
from mom_jax.models import outputs


def test_layers_come_in_their_order_with_their_own_values():
  """Three repeats of two blocks: block 1 is layers 1, 3 and 5."""
  blocks = (
      outputs.BlockAux(np.array([0, 20, 40])),
      outputs.BlockAux(np.array([10, 30, 50]), np.array([11, 31, 51]),
                       np.array([12, 32, 52])))
  got = [(layer.index, layer.part, int(layer.value))
         for layer in outputs.layers(blocks)]
  assert got == [
      (0, 'mixer', 0),
      (1, 'mixer', 10), (1, 'channel', 11), (1, 'mod', 12),
      (2, 'mixer', 20),
      (3, 'mixer', 30), (3, 'channel', 31), (3, 'mod', 32),
      (4, 'mixer', 40),
      (5, 'mixer', 50), (5, 'channel', 51), (5, 'mod', 52)]


def test_layers_may_hold_trees_or_nothing():
  blocks = [outputs.BlockAux({'a': np.zeros((2, 3)), 'b': np.ones(2)})]
  shapes = [jax.tree.map(np.shape, layer.value)
            for layer in outputs.layers(blocks)]
  assert shapes == [{'a': (3,), 'b': ()}] * 2
  assert not list(outputs.layers([outputs.BlockAux(None)]))
  assert not list(outputs.layers([]))


def test_parts_without_a_value_are_left_out():
  blocks = [outputs.BlockAux(1, None, 3), outputs.BlockAux(5, 6)]
  got = outputs.map_parts(lambda x: 10 * x if x % 2 else None, blocks)
  assert got == (outputs.BlockAux(10, None, 30), outputs.BlockAux(50))


def test_router_state_goes_where_it_came_from():
  none = outputs.no_router()
  aux = (
      outputs.BlockAux(none, none._replace(state={'threshold': jnp.ones(2)})),
      outputs.BlockAux(none._replace(state={'balance_bias': jnp.ones(2)})))
  kernel = {'kernel': jnp.zeros(3)}
  params = {
      'embed': kernel,
      'units': {
          'block_0': {'mixer': kernel,
                      'channel': kernel | {'threshold': jnp.zeros(2)}},
          'block_1': {'mixer': kernel | {'balance_bias': jnp.zeros(2)}}}}
  state = models.outputs.router_state(aux)
  assert state == {'units': {
      'block_0': {'channel': aux[0].channel.state},
      'block_1': {'mixer': aux[1].mixer.state}}}
  new = models.outputs.apply_router_state(params, state)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(new):
    assert (leaf == float(path[-1].key != 'kernel')).all()
  assert models.outputs.apply_router_state(params, {}) == params


def test_names_of_blocks():
  for index in (0, 3, 12):
    assert outputs.block_index(outputs.block_name(index)) == index
