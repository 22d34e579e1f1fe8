"""The cost of a training step from its jaxpr, for GPUs: nothing is compiled.

Exact are the state of a device, the matrix products of the step, and the
residuals that the backward pass keeps. Assumed: XLA fuses elementwise work into
the products; parameters sharded over the batch axes are all-gathered in the
activations' type in both passes of every micro-batch, and their gradients
reduce-scattered; gradients of replicated parameters are all-reduced once per
step. Traffic of activations is not counted.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from mom_jax import chips, config, models
from mom_jax.data import Batch
from mom_jax.parallel import sharding
from mom_jax.planning import compiled, traffic
from mom_jax.planning.cost import Cost
from mom_jax.training import losses, step


def plan_step(
    cfg: config.Config, topology: chips.Topology
) -> compiled.PlannedStep:
  """Adds up a step; needs as many CPU devices as the topology has GPUs.

  Raises:
    UserError: jax was started with fewer CPU devices.
    ValueError: the settings do not fit the mesh.
  """
  devices = jax.devices('cpu')
  if len(devices) < topology.devices:
    raise config.UserError(
        f'--topology={topology.name} needs {topology.devices} CPU devices to'
        f' stand in for GPUs and jax has {len(devices)}; set'
        f' JAX_NUM_CPU_DEVICES={topology.devices}.')
  mesh = sharding.make_mesh(
      **cfg.mesh.sizes, devices=devices[:topology.devices])
  micro = cfg.data.batch_size // cfg.train.grad_accum_steps
  sharding.check_batch(micro, sharding.batch_shards(mesh))
  with jax.set_mesh(mesh):
    _, abstract = step.init(cfg, mesh)
    run = step.make_step(cfg, abstract)
    jaxpr = jax.make_jaxpr(run)(abstract, _batch(cfg, cfg.data.batch_size))
    kept = residual_bytes(cfg, abstract.params, _batch(cfg, micro))
  cost = Cost()
  flops, moved = matmul_cost(jaxpr.jaxpr, cost.unknown_loops)
  state = compiled.state_bytes(abstract)
  cost.flops = flops / topology.devices
  # Products, and every state array read and written by the update.
  cost.hbm_bytes = moved / topology.devices + 2 * sum(state.values())
  cost.busy_s = max(cost.flops / topology.chip.flops,
                    cost.hbm_bytes / topology.chip.hbm)
  cost.collectives = list(_parameter_collectives(
      cfg, abstract.params, mesh, topology))
  # Overlap is up to the compiler; at best the slower of both remains.
  cost.exposed_s = max(0.0, cost.ici_s + cost.dcn_s - cost.busy_s)
  memory = state | {
      'gradients': state['parameters'],
      'batch': 16.0 * cfg.data.batch_size * cfg.data.seq_len
               / sharding.batch_shards(mesh),
      'activations kept': kept / topology.devices}
  return compiled.PlannedStep(cost, memory, dict(mesh.shape))


def _batch(cfg: config.Config, rows: int) -> Batch:
  shape = (rows, cfg.data.seq_len)
  integer, real = (
      jax.ShapeDtypeStruct(shape, dtype) for dtype in (np.int32, np.float32))
  return Batch(integer, integer, integer, real)


def residual_bytes(cfg: config.Config, params: Any, batch: Batch) -> float:
  """Bytes that the forward pass of a micro-batch keeps for the backward one.

  Parameters that it keeps as they are do not count.
  """

  def forward(params, batch):
    def loss(params):
      out = models.LM(cfg).apply(
          {'params': params}, batch.tokens, batch.modality, batch.segment,
          rngs={'routing': jax.random.key(0)})
      return losses.cross_entropy(
          out.logits, *losses.targets(*batch),
          len(cfg.model.modalities)).loss_S.sum()

    return jax.tree.leaves(jax.vjp(loss, params)[1])

  jaxpr = jax.make_jaxpr(forward)(params, batch).jaxpr
  given = set(map(id, jaxpr.invars))
  kept = {id(v): v.aval for v in jaxpr.outvars
          if id(v) not in given and hasattr(v, 'count')}
  return float(sum(_bytes(aval) for aval in kept.values()))


def matmul_cost(
    jaxpr: Any, unknown_loops: list[str], times: int = 1
) -> tuple[float, float]:
  """(FLOPs, bytes of operands and results) of all matrix products.

  Args:
    unknown_loops: gets the loops whose iterations depend on data; they count
      once.
    times: runs of the jaxpr, on all devices together.
  """
  flops = moved = 0.0
  for eqn in jaxpr.eqns:
    name, inner = eqn.primitive.name, times
    if name == 'scan':
      inner *= eqn.params['length']
    elif name == 'while':
      unknown_loops.append(str(eqn.source_info.name_stack) or 'while')
    elif name == 'shard_map':
      mesh, manual = eqn.params['mesh'], eqn.params.get('manual_axes')
      inner *= math.prod(mesh.shape[a] for a in manual or mesh.axis_names)
    if name in ('dot_general', 'ragged_dot', 'ragged_dot_general'):
      flops += times * _flops(eqn)
      moved += times * sum(
          _bytes(v.aval) for v in (*eqn.invars, *eqn.outvars))
    parts = [matmul_cost(sub, unknown_loops, inner)
             for sub in _sub_jaxprs(eqn)]
    if name == 'cond' and parts:
      parts = [max(parts)]
    flops += sum(f for f, _ in parts)
    moved += sum(m for _, m in parts)
  return flops, moved


def _sub_jaxprs(eqn: Any):
  """The jaxprs that an equation runs, each once."""
  for value in eqn.params.values():
    for item in value if isinstance(value, (tuple, list)) else (value,):
      item = getattr(item, 'jaxpr', item)
      if hasattr(item, 'eqns'):
        yield item


def _flops(eqn: Any) -> float:
  out, lhs = eqn.outvars[0].aval, eqn.invars[0].aval
  if eqn.primitive.name == 'dot_general':
    (summed, _), _ = eqn.params['dimension_numbers']
  else:
    numbers = eqn.params.get('ragged_dot_dimension_numbers')
    if numbers is None:
      return 2.0 * out.size * lhs.shape[-1]
    (summed, _), _ = numbers.dot_dimension_numbers
    if set(numbers.lhs_ragged_dimensions) <= set(summed):
      # Rows are summed over group by group: each counts once.
      return 2.0 * out.size / out.shape[0] * math.prod(
          lhs.shape[d] for d in summed)
  return 2.0 * out.size * math.prod(lhs.shape[d] for d in summed)


def _bytes(aval: Any) -> float:
  return float(aval.size * jnp.dtype(aval.dtype).itemsize) if jnp.issubdtype(
      aval.dtype, jnp.number) or aval.dtype == bool else 0.0


def _parameter_collectives(cfg, params, mesh, topology):
  """(collective, number of runs) for parameters and their gradients."""
  itemsize = jnp.dtype(cfg.model.dtype).itemsize
  order = mesh.devices.reshape(-1).tolist()
  node = {d: n // topology.chip.host for n, d in enumerate(order)}

  def locations(devices):
    return [traffic.Location(node[d], (order.index(d) % topology.chip.host,))
            for d in devices]

  sizes: dict[frozenset[str], float] = {}  # elements by axes that shard them
  for x in jax.tree.leaves(params):
    axes = frozenset(
        a for part in x.sharding.spec if part is not None
        for a in (part if isinstance(part, tuple) else (part,)))
    local_size = float(np.prod(x.sharding.shard_shape(x.shape)))
    sharding_axes = axes & set(sharding.BATCH_AXES)
    sizes[sharding_axes] = sizes.get(sharding_axes, 0.0) + (
        local_size * math.prod(mesh.shape[a] for a in sharding_axes))
  for sharding_axes, size in sizes.items():
    replica_axes = frozenset(sharding.BATCH_AXES) - sharding_axes
    shards = locations(_first_group(mesh, sharding_axes))
    replicas = locations(_first_group(mesh, replica_axes))
    if len(shards) > 1:
      for kind, passes in (('all-gather', 2), ('reduce-scatter', 1)):
        yield (_collective(kind, itemsize * size, shards, topology),
               passes * cfg.train.grad_accum_steps)
    if len(replicas) > 1:
      yield _collective(
          'all-reduce', 4 * size / len(shards), replicas, topology), 1


def _collective(kind, array_bytes, members, topology) -> traffic.Collective:
  moved = traffic.transfer(kind, array_bytes, members, topology)
  return traffic.Collective(
      kind, array_bytes, len(members), False, 'parameters', moved)


def _first_group(mesh, axes) -> list[Any]:
  """Devices of the first group along some axes of the mesh."""
  index = tuple(slice(None) if a in axes else 0 for a in mesh.axis_names)
  return np.reshape(mesh.devices[index], -1).tolist()
