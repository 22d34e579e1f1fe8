"""Steps of a layer's memories between router and output: pure functions.

Call them inside `per_device.batch_local`, with the tokens and heads of one
device: rows travel to the ranks that own their memories, and outputs back.
"""

from __future__ import annotations

from collections.abc import Callable
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mom_jax import routing, rules
from mom_jax.models import history, projection
from mom_jax.parallel import all_to_all, sharding


class MomTokens(NamedTuple):
  """A layer's tokens, [B, T, ...] each.

  Attributes:
    x_BTD: normalised residual stream.
    logits_BTM: of the router.
    segment_BT: document of each token, 0 on padding.
    modality_BT: of each token, -1 on padding; None where all modalities share
      the projections.
    v_first_BTHV: values of the first layer, for rules that ask for them.
    forced: selection in place of the router's own, if there is one.
    cache: of the memories, if there is one.
  """

  x_BTD: jax.Array
  logits_BTM: jax.Array
  segment_BT: jax.Array
  modality_BT: jax.Array | None
  v_first_BTHV: jax.Array | None
  forced: routing.Selection | None
  cache: history.Cache | None

  @property
  def valid_BT(self) -> jax.Array:
    return self.segment_BT > 0

  @property
  def x_ND(self) -> jax.Array:
    return self.x_BTD.reshape(-1, self.x_BTD.shape[-1])


class RouterDecisions(NamedTuple):
  """Selection, probabilities and routing weights of the router."""

  selected_BTM: jax.Array
  probs_BTM: jax.Array
  weight_BTM: jax.Array


class MemoryOutput(NamedTuple):
  """Result of a layer's memories.

  Attributes:
    o_BTHX: weighted sum of the outputs of a token's memories; X is V, or 2 V
      with the rule's skip.
    cache: with these tokens in it, or None.
    decisions: of the router.
    v_first_BTHV: values of the first layer, for rules that ask for them.
  """

  o_BTHX: jax.Array
  cache: history.Cache | None
  decisions: RouterDecisions
  v_first_BTHV: jax.Array | None


def ask_router(
    router: routing.Router, tokens: MomTokens, router_state_M: Any, top_k: int
) -> routing.Assignment:
  """Ask the router (arXiv 2502.13685, eq. 3 and 4)."""
  inputs = routing.RouterInputs(
      tokens.logits_BTM, allowed(tokens), router_state_M)
  return router.route(inputs, routing.RouterSettings(top_k=top_k))


def allowed(tokens: MomTokens) -> jax.Array:
  """Allow each token that is no padding all memories: a mask [B, T, M]."""
  return jnp.broadcast_to(
      tokens.valid_BT[..., None], tokens.logits_BTM.shape)


def assign(
    router: routing.Router,
    tokens: MomTokens,
    router_state_M: Any,
    top_k: int,
    shared: bool,
) -> tuple[routing.Assignment, RouterDecisions]:
  """Assign tokens to memories, by the router or as `forced` says.

  Returns:
    The assignment; with `shared`, every token that is no padding also has a row
    for memory M with weight 1, which `selected_BTE` and `probs_BTE` leave out;
    and the decisions on the M others.
  """
  B, T, M = tokens.logits_BTM.shape
  if tokens.forced is None:
    assigned = ask_router(router, tokens, router_state_M, top_k)
  else:
    assigned = routing.from_mask(tokens.forced, allowed(tokens), None)
  A = assigned.rows_per_token
  memory_NA = assigned.group_R.reshape(B * T, A)
  weight_NA = assigned.weight_R.reshape(B * T, A)
  hot_NAM = memory_NA[..., None] == jnp.arange(M)[None, None]
  decisions = RouterDecisions(
      assigned.selected_BTE, assigned.probs_BTE,
      jnp.where(hot_NAM, weight_NA[..., None], 0).sum(1).reshape(B, T, M))
  if shared:
    shared_N1 = jnp.where(tokens.valid_BT.reshape(-1, 1), M, -1)
    memory_NA = jnp.concatenate([memory_NA, shared_N1], 1)
    weight_NA = jnp.concatenate(
        [weight_NA, jnp.ones_like(weight_NA[:, :1])], 1)
    A += 1
  return assigned._replace(
      token_R=jnp.repeat(jnp.arange(B * T), A), group_R=memory_NA.reshape(-1),
      weight_R=weight_NA.reshape(-1), rows_per_token=A), decisions


def plan_rows(
    tokens: MomTokens,
    assigned: routing.Assignment,
    placement: all_to_all.Placement,
    chunk: int,
) -> projection.MemoryRows:
  """Plan each row's way to the rank that owns its memory.

  Groups are (memory, sample) pairs, memory by memory: the rows of one memory
  lie together over the whole batch, so that its projections are one matmul.
  """
  B, T = tokens.segment_BT.shape
  N, A = B * T, assigned.rows_per_token
  modality_N = tokens.modality_BT
  sample_NA = jnp.broadcast_to(
      jnp.repeat(jnp.arange(B), T)[:, None], (N, A))
  slot_NA = placement.rank_slot(assigned.group_R.reshape(N, A))
  group_NA = jnp.where(slot_NA < 0, -1, slot_NA * B + sample_NA)
  metadata = [tokens.segment_BT.reshape(N)]
  if modality_N is not None:
    modality_N = modality_N.reshape(N)
    metadata.append(modality_N + 1)
  rows = all_to_all.plan_rows_on_ranks(
      assigned.token_R, group_NA.reshape(-1), num_tokens=N, num_samples=B,
      placement=placement, align=chunk, rows_per_token=A,
      max_rows=N * min(A, placement.groups_per_rank), metadata=metadata)
  segment_P, *modality_P = rows.layout.metadata
  return projection.MemoryRows(
      rows, assigned.weight_R, (B, T), segment_P, placement.groups_per_rank,
      modality_N,
      modality_P[0] - 1 if modality_P else None)


def move_to_v_first(
    rule: rules.Rule,
    inputs: projection.UpdateInputs,
    constants: dict[str, jax.Array],
    rows: projection.MemoryRows,
    v_first_BTHV: jax.Array | None,
    shared: bool,
) -> tuple[projection.UpdateInputs, jax.Array | None]:
  """Move values towards those of the first layer, if the rule does so.

  A token's value is the weighted mean over its memories.

  Args:
    v_first_BTHV: values of the first layer; None in a layer alone.
  Returns:
    (inputs, values of the first layer).
  Source: arXiv 2503.14456, eq. 9.
  """
  if not rule.v_first_gate:
    return inputs, v_first_BTHV
  is_first = constants['layer_fraction'] == 0
  v_PHV = inputs.v_PHnV[:, :, 0]
  mean_NHV = rows.dispatched.ungroup(v_PHV, rows.weight_R / (1 + shared))
  mean_BTHV = mean_NHV.reshape(*rows.shape, *mean_NHV.shape[1:])
  if v_first_BTHV is not None:
    mean_BTHV = jnp.where(is_first, mean_BTHV, v_first_BTHV)
  mix_PHV = jax.nn.sigmoid(
      inputs.gates[rule.v_first_gate] + constants['first_bias'][None])
  mix_PHV = jnp.where(is_first, 0, mix_PHV).astype(v_PHV.dtype)
  v_first_PHV = rows.dispatched.gather(
      mean_BTHV.reshape(-1, *mean_BTHV.shape[2:]))
  v_PHV += mix_PHV * (v_first_PHV - v_PHV)
  return inputs._replace(v_PHnV=v_PHV[:, :, None]), mean_BTHV


def update(
    rule: rules.Rule,
    inputs: projection.UpdateInputs,
    constants: dict[str, jax.Array],
    rows: projection.MemoryRows,
    past: history.Past,
    chunk: int,
    backend: str,
) -> tuple[jax.Array, jax.Array]:
  """Run every memory over its rows: the outputs of rows, the last states.

  States are those of group sample * G + memory, for the G memories of this
  device, so that a cache is [B, G, ...].
  """
  layout, G = rows.layout, rows.num_local_memories
  B = len(layout.start_G) // G
  group_N = layout.group_P[::chunk]
  sample_major_N = group_N % B * G + group_N // B
  continues_G = past.continues_G
  if continues_G is not None:
    continues_G = history.batch_major(continues_G, B).reshape(-1)
  q, k, v, gates, _ = inputs
  return rules.run(
      rule, q, k, v, gates, constants, rows.is_row_P,
      position_in_memory=past.position_in_memory,
      group_N=jnp.where(group_N < 0, -1, sample_major_N),
      segment_R=past.segment_P, initial_state_GHKV=past.state_GHKV,
      continues_G=continues_G, l2_normalised=True, num_groups=B * G,
      chunk=chunk, backend=backend)


def in_rounds(
    f: Callable[[MomTokens], MemoryOutput],
    tokens: MomTokens,
    placement: all_to_all.Placement,
) -> MemoryOutput:
  """Run `f` on all samples, or in gcd(ranks, B) rounds of samples.

  With a share of the samples per round, buffers need no more memory than one
  device would, even if one rank gets every row.
  """
  B = len(tokens.x_BTD)
  rounds = math.gcd(placement.num_ranks, B)
  if rounds == 1:
    return f(tokens)
  split = lambda x: x.reshape(rounds, B // rounds, *x.shape[1:])
  join = lambda x: x.reshape(B, *x.shape[2:])
  return jax.tree.map(join, jax.lax.map(
      jax.checkpoint(f), jax.tree.map(split, tokens)))


def memory_placement(
    num_memories: int, top_k: int, shared: int, has_cache: bool
) -> all_to_all.Placement:
  """Place the memories on ranks; the shared one is to get every token.

  With a cache, or with one memory only, each device keeps all memories of its
  samples.
  """
  M, G = num_memories, num_memories + shared
  ranks = 1 if has_cache or G == 1 else sharding.axis_size('memory')
  return all_to_all.place_groups((top_k / M,) * M + (1.0,) * shared, ranks)


def router_of(name: str) -> routing.Router:
  """Return the router of that name.

  Raises:
    ValueError: there is none, or it picks tokens for a memory.
  """
  router = routing.get(name, 'config.model.mixer.router')
  if not router.exact_k:
    raise ValueError(
        f'config.model.mixer.router={name!r} picks tokens for a memory;'
        ' memories need a router that picks memories for a token, such as'
        ' softmax_topk.'
    )
  return router
