"""State, training step and evaluation: the compiled part of a run.

  gradients of the micro-batches, summed -> clip, Adam, decay -> parameters

The total loss is the cross-entropy, plus the z-loss of the logits and the
balance and z-loss of the memory routers with the weights of `config.loss`;
experts add none. In stage aux_router it is that of the auxiliary routers.

The outputs of micro-batches are added, so that a batch cut into micro-batches
trains like a whole one (except for the balance loss over layers or the model,
a mean over micro-batches by their tokens, and the router state, a mean over
micro-batches).
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
from jax import numpy as jnp

from mom_jax import config, models
from mom_jax.models import eval_modes, outputs
from mom_jax.parallel import sharding
from mom_jax.routing import balance
from mom_jax.training import aux_router, losses, optimizer

Params = Any


class Counters(NamedTuple):
  """Counts of steps, int32.

  A non-finite step is one whose loss or gradient is not finite; it changes
  nothing but these counters.

  Attributes:
    step: steps done.
    consecutive_nonfinite: non-finite steps since the last finite one.
    total_nonfinite: all non-finite steps.
  """

  step: jax.Array
  consecutive_nonfinite: jax.Array
  total_nonfinite: jax.Array


class State(NamedTuple):
  """Everything that a training step changes.

  Attributes:
    params: float32 parameters and router state.
    optimizer: optax state.
    counters: counts of steps.
    ema: averaged parameters, or None.
  """

  params: Params
  optimizer: Any
  counters: Counters
  ema: Params | None

  @property
  def trees(self) -> dict[str, Any]:
    """The fields by name, as a checkpoint holds them; without `ema` if None."""
    return {k: v for k, v in self._asdict().items() if v is not None}


class MicrobatchOutput(NamedTuple):
  """Outputs of a micro-batch besides its gradient; every leaf adds up.

  Attributes:
    sums: cross-entropy by modality.
    balance_loss: balance loss of the token mixers, before its weight.
    routing: `RoutingCounts` of every router.
    agreement: decisions of auxiliary routers, in their stage.
    router_state: that of the next step.
  """

  sums: losses.Sums
  balance_loss: jax.Array
  routing: tuple[outputs.BlockAux, ...]
  agreement: tuple[outputs.BlockAux, ...]
  router_state: dict[str, Any]


class RoutingCounts(NamedTuple):
  """Counts of a router's decisions in a batch.

  Attributes:
    load_E: tokens that each expert or memory took.
    entropy: mean over tokens, nats.
    taken_3: tokens that no expert, one and more of them took.
  """

  load_E: jax.Array
  entropy: jax.Array
  taken_3: jax.Array


class Valid(NamedTuple):
  """Tokens that are no padding, and samples that have such: counts or shares.
  """

  tokens: Any
  samples: Any


class Gradient(NamedTuple):
  """Loss, outputs and gradient of a batch or micro-batch; all add up."""

  total_loss: jax.Array
  output: MicrobatchOutput
  grads: Params


class StepMetrics(NamedTuple):
  """Measurements of one training step.

  Attributes:
    sums, balance_loss, routing, agreement: of the batch, as in
      `MicrobatchOutput`.
    total_loss: the scalar that the step minimises.
    learning_rate, grad_norm, param_norm: of the step.
    tokens: tokens of the batch, padding left out.
    consecutive_nonfinite, total_nonfinite: after the step, as in `Counters`.
    finite: whether each part's gradient is finite, by `finite_parts`.
  """

  sums: losses.Sums
  balance_loss: jax.Array
  routing: tuple[outputs.BlockAux, ...]
  agreement: tuple[outputs.BlockAux, ...]
  total_loss: jax.Array
  learning_rate: jax.Array
  grad_norm: jax.Array
  param_norm: jax.Array
  tokens: jax.Array
  consecutive_nonfinite: jax.Array
  total_nonfinite: jax.Array
  finite: dict[str, jax.Array]


def unbox(boxed: Any) -> Params:
  """Take parameters out of flax's boxes."""
  return jax.tree.map(
      lambda x: getattr(x, 'value', x), boxed,
      is_leaf=lambda x: hasattr(x, 'names'),
  )


def init(cfg: config.Config, mesh: jax.sharding.Mesh) -> tuple[
    Callable[[], State], State
]:
  """Return a function that makes the first state, and the state's shapes.

  Returns:
    (make, abstract): make() computes the state, sharded; abstract is a State of
    ShapeDtypeStruct with shardings.
  Raises:
    ValueError: no such model, or it does not fit this mesh.
  """
  key = jax.random.key(cfg.train.seed)
  boxed = jax.eval_shape(lambda: models.init_params(cfg, key))
  layout = sharding.param_shardings(boxed, mesh, cfg.mesh.strategy)

  def make() -> State:
    return _first_state(cfg, unbox(models.init_params(cfg, key)))

  shapes = jax.eval_shape(
      lambda params: _first_state(cfg, params), unbox(boxed))
  shardings = _like_params(shapes, layout, sharding.replicated_sharding(mesh))
  abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes, shardings,
  )
  return jax.jit(
      make, out_shardings=shardings,
      compiler_options=_quickly_compiled(mesh)), abstract


def _first_state(cfg: config.Config, params: Params) -> State:
  """Make the state of step 0."""
  tx = optimizer.make(cfg.optimizer, params, cfg.train.stage)
  zero = jnp.zeros((), jnp.int32)
  counters = Counters(zero, zero, zero)
  ema = jax.tree.map(jnp.copy, params) if cfg.optimizer.ema else None
  return State(params, tx.init(params), counters, ema)


def _quickly_compiled(mesh: jax.sharding.Mesh) -> dict[str, Any] | None:
  """Return compiler options of a program that runs once.

  On a CPU, LLVM takes two thirds of the time for code that then runs for a
  tenth of a second.
  """
  if mesh.devices.flat[0].platform != 'cpu':
    return None
  return {'xla_backend_optimization_level': 0}


def _like_params(tree: Any, layout: Any, otherwise: Any) -> Any:
  """Shard a leaf whose path ends with a parameter's like that parameter."""
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
) -> Callable[[State, Any], tuple[State, StepMetrics]]:
  """Return the jitted training step (state, batch) -> (state, metrics).

  The state is donated. A step whose loss or gradient is not finite changes
  nothing but the counters.
  """
  lr_schedule = optimizer.lr_schedule(cfg.optimizer, cfg.train.steps)
  stage = cfg.train.stage
  tx = optimizer.make(cfg.optimizer, abstract.params, stage)
  base_key = jax.random.key(cfg.train.seed)

  def step(state: State, batch: Any) -> tuple[State, StepMetrics]:
    step_index = state.counters.step
    total_loss, output, grads = gradient(
        cfg, state.params, batch, jax.random.fold_in(base_key, step_index))
    grad_norm = optimizer.global_norm(optimizer.trainable(grads, stage))
    is_finite = jnp.isfinite(total_loss) & jnp.isfinite(grad_norm)
    updates, opt = tx.update(grads, state.optimizer, state.params)
    lr = lr_schedule(step_index)
    params = jax.tree.map(lambda p, u: p - lr * u, state.params, updates)
    params = outputs.apply_router_state(params, output.router_state)
    ema = state.ema
    if ema is not None:
      ema = optimizer.update_ema(ema, params, step_index, cfg.optimizer.ema)

    def keep_if_finite(new, old):
      return jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)

    state = State(
        keep_if_finite(params, state.params),
        keep_if_finite(opt, state.optimizer),
        _counted(state.counters, is_finite),
        keep_if_finite(ema, state.ema),
    )
    return state, StepMetrics(
        sums=output.sums,
        balance_loss=output.balance_loss,
        routing=output.routing,
        agreement=output.agreement,
        total_loss=total_loss,
        learning_rate=lr,
        grad_norm=grad_norm,
        param_norm=optimizer.global_norm(
            optimizer.trainable(state.params, stage)),
        tokens=(batch.segment > 0).sum(),
        consecutive_nonfinite=state.counters.consecutive_nonfinite,
        total_nonfinite=state.counters.total_nonfinite,
        finite=finite_parts(grads),
    )

  shardings = jax.tree.map(lambda x: x.sharding, abstract)
  mesh = shardings.counters.step.mesh
  return jax.jit(
      step, donate_argnums=0,
      out_shardings=(shardings, sharding.replicated_sharding(mesh)),
  )


def _counted(counters: Counters, is_finite: jax.Array) -> Counters:
  """Count one more step."""
  nonfinite = (~is_finite).astype(jnp.int32)
  return Counters(
      step=counters.step + 1,
      consecutive_nonfinite=(counters.consecutive_nonfinite + 1) * nonfinite,
      total_nonfinite=counters.total_nonfinite + nonfinite,
  )


def gradient(
    cfg: config.Config, params: Params, batch: Any, key: jax.Array
) -> Gradient:
  """Compute loss, outputs and gradient, micro-batch by micro-batch."""
  A = cfg.train.grad_accum_steps
  target = losses.targets(*batch)
  count_S = losses.count(
      target.modality, target.weight, len(cfg.model.modalities))

  whole = _valid(batch)

  def one(micro, key):
    def loss(params):
      share = Valid(1, 1)
      if A > 1:
        share = jax.tree.map(
            lambda a, b: a / jnp.maximum(b, 1), _valid(micro), whole)
      return _loss(cfg, params, micro, key, count_S, share)

    (total_loss, output), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return Gradient(total_loss, output, grads)

  if A == 1:
    return one(batch, key)
  # Every A-th sequence, so that each device keeps its sequences.
  micros = jax.tree.map(
      lambda x: x.reshape(-1, A, *x.shape[1:]).swapaxes(0, 1), batch)
  keys = jax.random.split(key, A)

  def add(total, inputs):
    micro, key = inputs
    micro = jax.tree.map(sharding.constrain_batch, micro)
    return jax.tree.map(jnp.add, total, one(micro, key)), None

  first = jax.tree.map(lambda x: x[0], micros)
  zeros = jax.tree.map(
      lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, first, keys[0])
  )
  total, _ = jax.lax.scan(add, zeros, (micros, keys))
  return total


def _valid(batch: Any) -> Valid:
  """Count tokens that are no padding, and samples with such."""
  valid_BT = batch.segment > 0
  return Valid(valid_BT.sum(), valid_BT.any(1).sum())


def _loss(cfg, params, batch, key, count_S, share):
  """Compute a micro-batch's part of the batch's total loss, and outputs.

  Args:
    share: of the batch's `Valid` in this micro-batch.
  """
  fraction = 1 / cfg.train.grad_accum_steps
  modalities = len(cfg.model.modalities)
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
  routed = _routing(out.aux, batch.segment > 0, share.tokens)
  if not main:
    agreement = aux_router.agreement(out.aux, batch.modality, modalities)
    output = MicrobatchOutput(sums, jnp.zeros(()), routed, agreement, {})
    return share.tokens * aux_router.loss(out.aux), output
  mixed = [
      block.mixer.stats for block in out.aux if block.mixer.stats is not None]
  over = cfg.loss.balance_over
  by = share.samples if over == 'sample' else share.tokens
  balance_loss = by * balance.over_layers(mixed, over)
  router_z = share.tokens * balance.mean_z(mixed)
  total_loss = losses.lm_loss(
      sums, count_S, cfg.loss.modality_weights, cfg.loss.z_loss
  ) + cfg.loss.balance * balance_loss + cfg.loss.router_z * router_z
  state = jax.tree.map(lambda x: fraction * x, outputs.router_state(out.aux))
  return total_loss, MicrobatchOutput(sums, balance_loss, routed, (), state)


def _routing(
    aux: tuple[outputs.BlockAux, ...], valid_BT: jax.Array, fraction: Any
) -> tuple[outputs.BlockAux, ...]:
  """Make the `RoutingCounts` of every router, for `metrics.routing`."""

  def count(part):
    if part.stats is None:
      return None
    took_RBTE = part.stats.selected_BTE & valid_BT[None, ..., None]
    experts_RBT = took_RBTE.sum(-1)
    has = [experts_RBT == 0, experts_RBT == 1, experts_RBT > 1]
    return RoutingCounts(
        took_RBTE.sum((1, 2)),
        fraction * part.stats.entropy,
        jnp.stack([(h & valid_BT[None]).sum((1, 2)) for h in has], -1),
    )

  return outputs.map_parts(count, aux)


def finite_parts(grads: Params) -> dict[str, jax.Array]:
  """Tell for each part of the model whether its gradient's norm is finite.

  The parts are 'embed', 'final_norm', ..., and 'block_0/mixer', ... with one
  value per repeat of the pattern.
  """
  parts: dict[str, list[jax.Array]] = {}
  squares, _ = jax.tree_util.tree_flatten_with_path(
      optimizer.squared_norms(grads))
  for path, square in squares:
    keys = [k.key for k in path]
    name = '/'.join(keys[1:3]) if keys[0] == 'units' else keys[0]
    parts.setdefault(name, []).append(square)
  return {name: jnp.isfinite(sum(parts[name])) for name in parts}


def locate_nonfinite(
    finite: dict[str, Any], routers: tuple[outputs.BlockAux, ...],
    loss_finite: bool, num_blocks: int,
) -> str:
  """Name the layer or part where a step first became non-finite, if it can.

  In the forward pass, router entropies show the first layer with a non-finite
  input; in the backward pass it is the last layer with a non-finite gradient.

  Args:
    finite: `StepMetrics.finite`.
    routers: `StepMetrics.routing`.
    num_blocks: in the pattern.
  """
  gradients = []  # (layer, is the channel mixer, name, is finite)
  for name, fine in finite.items():
    if '/' not in name:
      layer = -1 if name == 'embed' else 1 << 30
      gradients.append((layer, False, name, bool(fine)))
      continue
    block, part = name.split('/')
    for repeat, ok in enumerate(fine):
      layer = outputs.layer_index(
          repeat, outputs.block_index(block), num_blocks)
      gradients.append((layer, part.startswith('channel'),
                        f'layer {layer} {part}', bool(ok)))
  if not loss_finite:
    for layer in outputs.layers(routers):
      if not math.isfinite(layer.value.entropy):
        return f'the input of layer {layer.index} {layer.part}'
  nonfinite = [name for *_, name, ok in sorted(gradients) if not ok]
  return f'the gradient of {nonfinite[-1]}' if nonfinite else 'the loss'


def make_evaluation(
    cfg: config.Config,
) -> dict[str, Callable[[Params, Any], losses.Sums]]:
  """Return jitted functions (params, batch) -> Sums, by suffix of the loss.

  '' is causal; '_noncausal', where experts choose tokens, is true expert
  choice (see `models.eval_modes`).
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
  """Tell if the training loss is causal; auxiliary routers train on none."""
  return cfg.train.stage == 'main' and eval_modes.is_causal(cfg)
