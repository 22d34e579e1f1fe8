"""What runs on the devices: state, training step, evaluation step.

  gradients of the micro-batches, summed -> clip, Adam, decay -> parameters

All that a micro-batch returns adds up over micro-batches, so that a batch cut
in pieces trains as the whole one does (but for the balance loss and the router
state, which are means over the pieces).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp
import optax

from mom_jax import config, models
from mom_jax.models import eval_modes
from mom_jax.parallel import sharding
from mom_jax.routing import balance
from mom_jax.training import aux_router, losses, optimizer

Params = Any


class State(NamedTuple):
  """What a step changes.

  Attributes:
    params: float32 parameters and router state.
    optimizer: optax state.
    counters: int32 'step', steps done; 'bad_row' and 'bad_total', non-finite
      steps in a row and in all, which changed nothing but these counters.
    ema: averaged parameters, or None.
  """

  params: Params
  optimizer: Any
  counters: dict[str, jax.Array]
  ema: Params | None


class Piece(NamedTuple):
  """What a micro-batch returns beside its gradient; every leaf adds up."""

  sums: losses.Sums
  balance: jax.Array
  routing: dict[str, Any]
  agreement: dict[str, Any]  # of auxiliary routers, in their stage
  buffers: dict[str, Any]


def unbox(boxed: Any) -> Params:
  """Parameters without flax's boxes."""
  return jax.tree.map(
      lambda x: getattr(x, 'value', x), boxed,
      is_leaf=lambda x: hasattr(x, 'names'),
  )


def init(cfg: config.Config, mesh: jax.sharding.Mesh) -> tuple[
    Callable[[], State], State
]:
  """How to make the first state, and its shapes with their shardings.

  Returns:
    (make, abstract): make() computes the state where it belongs; abstract is a
    State of ShapeDtypeStruct.
  Raises:
    ValueError: no such model, or it cannot lie on this mesh.
  """
  key = jax.random.key(cfg.train.seed)
  boxed = jax.eval_shape(lambda: models.init_params(cfg, key))
  layout = sharding.param_shardings(boxed, mesh, cfg.mesh.strategy)

  def make() -> State:
    params = unbox(models.init_params(cfg, key))
    tx = optimizer.make(cfg.optimizer, params, cfg.train.stage)
    zero = jnp.zeros((), jnp.int32)
    counters = {'step': zero, 'bad_row': zero, 'bad_total': zero}
    ema = jax.tree.map(jnp.copy, params) if cfg.optimizer.ema else None
    return State(params, tx.init(params), counters, ema)

  shapes = jax.eval_shape(make)
  shardings = _like_params(shapes, layout, sharding.replicated(mesh))
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings,
  )
  return jax.jit(make, out_shardings=shardings), abstract


def _like_params(tree: Any, layout: Any, otherwise: Any) -> Any:
  """A leaf whose path ends with a parameter's lies as the parameter does."""
  flat, _ = jax.tree_util.tree_flatten_with_path(layout)
  known = {tuple(k.key for k in path): s for path, s in flat}

  def one(path, _):
    names = []
    for part in reversed(path):
      if not isinstance(part, jax.tree_util.DictKey):
        break
      names.insert(0, part.key)
    return known.get(tuple(names), otherwise)

  return jax.tree_util.tree_map_with_path(one, tree)


def make_step(
    cfg: config.Config, abstract: State
) -> Callable[[State, Any], tuple[State, dict[str, Any]]]:
  """The jitted training step (state, batch) -> (state, metrics).

  The state is donated. A step whose loss or gradient is not finite changes
  nothing but the counters.
  """
  rate = optimizer.schedule(cfg.optimizer, cfg.train.steps)
  stage = cfg.train.stage
  tx = optimizer.make(cfg.optimizer, abstract.params, stage)
  root = jax.random.key(cfg.train.seed)

  def step(state: State, batch: Any) -> tuple[State, dict[str, Any]]:
    number = state.counters['step']
    key = jax.random.fold_in(root, number)
    objective, piece, grads = _gradient(cfg, state.params, batch, key)
    grad_norm = optax.tree.norm(optimizer.trainable(grads, stage))
    good = jnp.isfinite(objective) & jnp.isfinite(grad_norm)
    updates, opt = tx.update(grads, state.optimizer, state.params)
    lr = rate(number)
    params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
    params = models.apply_buffers(params, piece.buffers)
    ema = state.ema
    if ema is not None:
      ema = optimizer.average(ema, params, number, cfg.optimizer.ema)
    kept = lambda new, old: jax.tree.map(
        lambda a, b: jnp.where(good, a, b), new, old)
    bad = (~good).astype(jnp.int32)
    state = State(
        kept(params, state.params),
        kept(opt, state.optimizer),
        {
            'step': number + 1,
            'bad_row': (state.counters['bad_row'] + 1) * bad,
            'bad_total': state.counters['bad_total'] + bad,
        },
        kept(ema, state.ema),
    )
    return state, {
        'sums': piece.sums,
        'balance': piece.balance,
        'routing': piece.routing,
        'agreement': piece.agreement,
        'objective': objective,
        'learning_rate': lr,
        'grad_norm': grad_norm,
        'param_norm': optax.tree.norm(
            optimizer.trainable(state.params, stage)),
        'tokens': (batch.segment > 0).sum(),
        'bad_row': state.counters['bad_row'],
        'bad_total': state.counters['bad_total'],
        'finite': _finite(grads),
    }

  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  mesh = shardings.counters['step'].mesh
  return jax.jit(
      step, donate_argnums=0,
      out_shardings=(shardings, sharding.replicated(mesh)),
  )


def _gradient(cfg: config.Config, params: Params, batch: Any, key: jax.Array):
  """(objective, Piece, gradient) of a batch, micro-batch by micro-batch."""
  A = cfg.train.accumulate
  _, modality_BT, weight_BT = losses.targets(*batch)
  count_S = losses.count(modality_BT, weight_BT, len(cfg.model.modalities))

  def one(micro, key):
    loss = lambda p: _loss(cfg, p, micro, key, count_S)
    (objective, piece), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return objective, piece, grads

  if A == 1:
    return one(batch, key)
  # Every A-th row, so that each device keeps its rows.
  pieces = jax.tree.map(
      lambda x: x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1), batch)
  keys = jax.random.split(key, A)

  def add(total, piece):
    micro, key = piece
    micro = jax.tree.map(sharding.constrain_batch, micro)
    return jax.tree.map(jnp.add, total, one(micro, key)), None

  first = jax.tree.map(lambda x: x[0], pieces)
  zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first, keys[0])
  )
  total, _ = jax.lax.scan(add, zeros, (pieces, keys))
  return total


def _loss(cfg, params, batch, key, count_S):
  """Objective of a micro-batch, a share of the whole batch's."""
  share, modalities = 1 / cfg.train.accumulate, len(cfg.model.modalities)
  main = cfg.train.stage == 'main'
  noise_key, routing_key = jax.random.split(key)
  rngs = {'routing': routing_key} if main and cfg.model.moma.noise else None
  inputs_BT = batch.tokens
  if main:
    inputs_BT = losses.noised_inputs(
        noise_key, *batch[:3], cfg.loss.input_noise)
  out = models.LM(cfg if main else eval_modes.oracle(cfg)).apply(
      {'params': params}, inputs_BT, batch.modality, batch.segment, rngs=rngs
  )
  sums = losses.cross_entropy(
      out.logits, *losses.targets(*batch), modalities)
  routed = _routing(out.aux, batch.segment > 0, share)
  if not main:
    agreement = aux_router.agreement(out.aux, batch.modality, modalities)
    piece = Piece(sums, jnp.zeros(()), routed, agreement, {'units': {}})
    return share * aux_router.loss(out.aux), piece
  parts = [
      part for block in out.aux['units'].values() for part in block.values()]
  mixed = [part for part in parts if 'mass_E' in part]
  switch = share * balance.over_layers(mixed, cfg.loss.balance_over)
  router_z = share * balance.mean_z(mixed)
  objective = losses.objective(
      sums, count_S, cfg.loss.modality_weights, cfg.loss.z_loss
  ) + cfg.loss.balance * switch + cfg.loss.router_z * router_z
  buffers = {
      name: {
          part: {'buffers': jax.tree.map(
              lambda x: share * x, values.get('buffers', {}))}
          for part, values in block.items()
      }
      for name, block in out.aux['units'].items()
  }
  return objective, Piece(sums, switch, routed, {}, {'units': buffers})


def _routing(aux: dict[str, Any], valid_BT: jax.Array, share: float):
  """Counts of what the routers did, for `metrics.routing`."""

  def one(values):
    took_RBTE = values['selected_BTE'] & valid_BT[None, ..., None]
    each_RBT = took_RBTE.sum(-1)
    has = [each_RBT == 0, each_RBT == 1, each_RBT > 1]
    return {
        'load_RE': took_RBTE.sum((1, 2)),
        'entropy_R': share * values['entropy'],
        'taken_R3': jnp.stack(
            [(h & valid_BT[None]).sum((1, 2)) for h in has], -1),
    }

  return {
      name: {
          part: one(values) for part, values in block.items()
          if 'selected_BTE' in values
      }
      for name, block in aux['units'].items()
  }


def _finite(grads: Params) -> dict[str, jax.Array]:
  """Whether the gradient of each part is finite, of units by repeat."""
  out: dict[str, jax.Array] = {}
  for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
    keys = [k.key for k in path]
    in_unit = keys[0] == 'units'
    name = '/'.join(keys[1:3]) if in_unit else keys[0]
    fine = jnp.isfinite(g).all(tuple(range(int(in_unit), g.ndim)))
    out[name] = out[name] & fine if name in out else fine
  return out


def offender(
    finite: dict[str, Any], routers: dict[str, Any], loss_finite: bool,
    unit: int,
) -> str:
  """Where a non-finite step went wrong first, as far as can be told.

  Forward, a router's entropy shows the first layer that was fed something not
  finite; backward, it is the last layer with such a gradient.

  Args:
    finite, routers: 'finite' and 'routing' of the step's metrics.
    unit: blocks in the pattern.
  """
  places = []  # (layer, whether the mixer comes, name, finite)
  for name, fine in finite.items():
    if '/' not in name:
      place = -1 if name == 'embed' else 1 << 30
      places.append((place, 0, name, bool(fine)))
      continue
    block, part = name.split('/')
    for repeat, ok in enumerate(fine):
      layer = repeat * unit + int(block.removeprefix('block_'))
      places.append((layer, part.startswith('channel'),
                     f'layer {layer} {part}', bool(ok)))
  if not loss_finite:
    for layer, part, entropy in sorted(
        (repeat * unit + int(block.removeprefix('block_')), part, float(e))
        for block, parts in routers.items()
        for part, values in parts.items()
        for repeat, e in enumerate(values['entropy_R'])
    ):
      if entropy != entropy or abs(entropy) == float('inf'):
        return f'the input of layer {layer} {part}'
  bad = [place for place in places if not place[-1]]
  return f'the gradient of {max(bad)[2]}' if bad else 'the loss'


def make_evaluation(
    cfg: config.Config,
) -> dict[str, Callable[[Params, Any], losses.Sums]]:
  """Jitted (params, batch) -> Sums, by suffix of the loss's name.

  '' is causal, '_noncausal' true expert choice where experts choose; see
  `models.modes`.
  """

  def evaluation(cfg):
    def sums(params, batch):
      out = models.LM(cfg).apply(
          {'params': params}, batch.tokens, batch.modality, batch.segment)
      return losses.cross_entropy(
          out.logits, *losses.targets(*batch), len(cfg.model.modalities))

    return jax.jit(sums)

  known = eval_modes.modes(cfg)
  return {
      suffix: evaluation(known[name])
      for suffix, name in (('', 'causal'), ('_noncausal', 'noncausal'))
      if name in known
  }


def causal(cfg: config.Config) -> bool:
  """Whether the training loss is causal; the second stage runs the oracle."""
  return cfg.train.stage == 'main' and eval_modes.is_causal(cfg)
