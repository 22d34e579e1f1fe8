"""Values that layers return beside their output, and a walk over the layers.

A model's `aux` is a tuple with one `BlockAux` per block of the pattern. The
scan over the pattern's repeats stacks every leaf: entry `repeat` of block i is
that of layer `repeat * len(blocks) + i`, which `layer_index` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mom_jax.routing import RouterStats


class LayerAux(NamedTuple):
  """Values of a token mixer, channel mixer or Mixture-of-Depths router.

  Attributes:
    loss: balance and z-loss with the layer's own weights, float32, for use of a
      layer alone; 0 without a router. A language model ignores it:
      `training.step` adds the losses of the memory routers from `stats`, with
      the weights of `config.loss`; other routers add none there.
    state: router state of the next step by name, {} if there is none.
    stats: of the router, None without one.
    v_first_BTHV: values of the first layer, if the mixer's rule asks for them.
  """

  loss: Float[Array, '']
  state: dict[str, jax.Array]
  stats: RouterStats | None
  v_first_BTHV: Float[Array, 'B T H V'] | None = None


class BlockAux(NamedTuple):
  """One value for each part of a block, None where the block lacks the part.

  The values are `LayerAux`, or what `map_parts` makes of them.

  Attributes:
    mixer: of the token mixer.
    channel: of the channel mixer.
    mod: of the router of a Mixture-of-Depths block.
  """

  mixer: Any
  channel: Any = None
  mod: Any = None


class Layer(NamedTuple):
  """A part of one layer: index of the layer, name and value of the part."""

  index: int
  part: str
  value: Any


def no_router() -> LayerAux:
  """Make the `LayerAux` of a layer without a router."""
  return LayerAux(jnp.zeros((), jnp.float32), {}, None)


def map_parts(
    f: Callable[[Any], Any], blocks: Sequence[BlockAux]
) -> tuple[BlockAux, ...]:
  """Apply `f` to the parts that blocks have; it drops one by returning None.
  """
  return tuple(
      BlockAux(*(None if part is None else f(part) for part in block))
      for block in blocks)


def layers(blocks: Sequence[BlockAux]) -> Iterator[Layer]:
  """Go through all parts of all layers, layer by layer.

  Args:
    blocks: values whose every leaf has the pattern's repeats on its leading
      axis, `aux` of a model or what `map_parts` makes of it.
  Yields:
    `Layer` with the value of that layer alone.
  """
  repeats = {len(leaf) for leaf in jax.tree.leaves(blocks)}
  for repeat in range(max(repeats, default=0)):
    for i, block in enumerate(blocks):
      for part, value in zip(block._fields, block):
        if value is not None:
          yield Layer(
              layer_index(repeat, i, len(blocks)), part,
              jax.tree.map(lambda leaf: leaf[repeat], value))  # noqa: B023


def router_state(blocks: Sequence[BlockAux]) -> dict[str, Any]:
  """Collect the next router state, in the shape of a model's parameters."""
  units = {}
  for i, block in enumerate(blocks):
    states = {
        part: aux.state for part, aux in zip(block._fields, block)
        if aux is not None and aux.state}
    if states:
      units[block_name(i)] = states
  return {'units': units}


def apply_router_state(params: Any, state: dict[str, Any]) -> Any:
  """Replace the router state among parameters by that of `router_state`."""
  units = dict(params['units'])
  for block, states in state.get('units', {}).items():
    units[block] = units[block] | {
        part: units[block][part] | new for part, new in states.items()}
  return params | {'units': units}


def layer_index(repeat: int, block: int, num_blocks: int) -> int:
  """Compute the layer's index from the repeat and the block of the pattern."""
  return repeat * num_blocks + block


def block_name(index: int) -> str:
  """Name a block of the pattern, as parameters and caches do."""
  return f'block_{index}'


def block_index(name: str) -> int:
  """Return the index of the block with this `block_name`."""
  return int(name.removeprefix('block_'))
