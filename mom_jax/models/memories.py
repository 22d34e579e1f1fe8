"""A layer's memories: route, group, project, convolve, update, read, combine.

Pure functions of arrays, for what one device holds; `mom` makes the parameters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mom_jax import (
  config,
  pallas,
  routing,
  rules,
)
from mom_jax.models import context, maps, rows, shift
from mom_jax.parallel import all_to_all, sharding
from mom_jax.routing import dispatch

Cache = dict[str, jax.Array]

# What the short convolution runs over.
QKV = ('query', 'key', 'value')


class Routed(NamedTuple):
  """Choices of the memories' router, with the weights they have."""

  selected_BTM: jax.Array
  probs_BTM: jax.Array
  weight_BTM: jax.Array


def placement_of(mixer: config.Mixer, cached: bool) -> all_to_all.Placement:
  """Who owns which memory: the shared one gets a row of every token.

  Args:
    cached: a device does all for its samples; so it does where there is but one
      memory.
  """
  M, A, G = mixer.num_memories, mixer.top_k, mixer.num_memories + mixer.shared
  return all_to_all.place_groups(
      (A / M,) * M + (1.0,) * mixer.shared,
      1 if cached or G == 1 else sharding.axis_size('memory'))


def rule_of(mixer: config.Mixer) -> rules.Rule:
  """The rule of a layer's memories.

  Raises:
    ValueError: settings of the mixer name no rule.
  """
  return rules.get(
      mixer.rule, mixer.feature_map, mixer.normaliser, mixer.num_householder)


def ranks(mixer: config.Mixer, D: int) -> dict[str, int]:
  """Columns of the rule's gates that are maps in two steps, by name.

  Raises:
    ValueError: `low_ranks` has not one for each.
  """
  rule, sizes = rule_of(mixer), (D, mixer.key_dim, mixer.value_dim)
  found = {name: gate.rank(*sizes)
           for name, gate in rule.gates.items() if gate.rank}
  if not mixer.low_ranks:
    return found
  if len(mixer.low_ranks) != len(found) or min(mixer.low_ranks) < 1:
    raise ValueError(
        f'config.model.mixer.low_ranks={mixer.low_ranks} needs one number above'
        f' 0 for each of the {len(found)} gates {tuple(found)} of'
        f' rule={mixer.rule!r}; () is as published.'
    )
  return dict(zip(found, mixer.low_ranks))


def conv_parts(mixer: config.Mixer) -> dict[str, tuple[int, int]]:
  """(heads, size) of what the short convolution runs over, by name."""
  H, n = mixer.num_heads, mixer.num_householder
  if not mixer.conv_width:
    return {}
  U = mixer.key_heads or H
  return {'query': (U, mixer.key_dim), 'key': (U * n, mixer.key_dim),
          'value': (H * n, mixer.value_dim)}


def router_of(mixer: config.Mixer) -> routing.Router:
  """The router of the memories.

  Raises:
    ValueError: there is none, or it picks tokens for a memory.
  """
  router = routing.get(mixer.router, 'config.model.mixer.router')
  if not router.exact_k:
    raise ValueError(
        f'config.model.mixer.router={mixer.router!r} picks tokens for a'
        ' memory; memories need a router that picks memories for a token,'
        ' such as softmax_topk.'
    )
  return router


def router_inputs(
    logits_BTM: jax.Array, valid_BT: jax.Array, router_M: jax.Array | None
) -> routing.RouterInputs:
  """Inputs of the memories' router: any memory may take a valid token."""
  allowed_BTM = allowed(valid_BT, logits_BTM.shape[-1])
  return routing.RouterInputs(logits_BTM, allowed_BTM, router_M)


def router_settings(mixer: config.Mixer) -> routing.RouterSettings:
  """Settings of the memories' router."""
  return routing.RouterSettings(
      top_k=mixer.top_k, update_rate=mixer.balance_rate)


def allowed(valid_BT: jax.Array, M: int) -> jax.Array:
  """[B, T, M]: any memory may take a token that is no padding."""
  return jnp.broadcast_to(valid_BT[..., None], (*valid_BT.shape, M))


class Read:
  """Route, group, project, convolve, update, read and combine.

  Inside `per_device.batch_local`: of the heads that this device has, and for
  its part of the tokens, whose rows the ranks of the memories work on. With a
  cache a device does all for its samples.
  """

  def __init__(self, mixer: config.Mixer, cached: bool = False):
    self.rule = rule_of(mixer)
    self.placement = placement_of(mixer, cached)
    if not cached:
      each = functools.partial(sharding.split_size, 'heads')
      mixer = dataclasses.replace(
          mixer,
          num_heads=each(mixer.num_heads, 'config.model.mixer.num_heads'),
          key_heads=each(mixer.key_heads, 'config.model.mixer.key_heads'))
    self.mixer = mixer

  def __call__(self, batched, weights: maps.Weights):
    ranks, B = self.placement.num_ranks, len(batched[0])
    matrices = maps.side_by_side(self.rule, weights)
    rounds = math.gcd(ranks, B)
    if rounds == 1:
      return self.part(batched, matrices, weights.router_M)
    # As many samples at a time as take no more room, if one owner gets all,
    # than one device alone would need.
    part = jax.checkpoint(
        lambda x: self.part(x, matrices, weights.router_M))
    split = lambda x: x.reshape(rounds, B // rounds, *x.shape[1:])
    join = lambda x: x.reshape(B, *x.shape[2:])
    return jax.tree.map(join, jax.lax.map(part, jax.tree.map(split, batched)))

  def part(self, batched, matrices: maps.Matrices, router_M):
    """Some of the samples."""
    (x_BTD, scores_BTM, segment_BT, modality_BT, cache, first_BTHV,
     forced) = batched
    mixer = self.mixer
    B, T, D = x_BTD.shape
    N, H = B * T, mixer.num_heads
    x_ND = x_BTD.reshape(N, D)
    untied = modality_BT is not None
    modality_N = modality_BT.reshape(N) if untied else None
    assignment, routed = self.route(
        scores_BTM, segment_BT > 0, router_M, forced)
    chunk = min(mixer.chunk, 1 << (T - 1).bit_length())
    moves = all_to_all.route_rows(
        assignment.token_R, assignment.group_R, num_tokens=N, num_samples=B,
        placement=self.placement, align=chunk,
        rows_per_token=assignment.rows_per_token,
        max_rows=N * min(
            assignment.rows_per_token, self.placement.groups_per_rank),
        metadata=[segment_BT.reshape(N), *([modality_N + 1] if untied else [])])
    layout = moves.layout
    segment_P = layout.metadata[0]
    modality_P = layout.metadata[1] - 1 if untied else None
    past, old, continues_G = None, {}, None
    if cache is not None:
      # Slots run memory by memory, the cache row by row.
      old = {name: _memory_major(a) for name, a in cache.items()}
      old['state_BGHKV'] = cache['state_BGHKV'].reshape(
          -1, *cache['state_BGHKV'].shape[2:])
      segment_P = jnp.minimum(segment_P, 1)
      past = rows.Past(old['count_BG'], None)
    elif sharding.axis_size('time') > 1:
      past, continues_G = context.past(layout, segment_P)

    def window(name, u_PF, w):
      """The last w of u before these rows."""
      if cache is not None:
        return rows.Window(old[name], None)
      if past is None:
        return None
      return context.window(u_PF, w, layout, segment_P)

    place_P = rows.place(layout, segment_P, past)
    times = functools.partial(
        _times_memory, layout, self.placement.groups_per_rank, modality_P)
    if mixer.single_kv_proj:
      times = functools.partial(_times, modality_P)
    sides, x_PD = self.project(
        x_ND, modality_N, modality_P, moves, segment_P, window, times, matrices)
    u_PF, conv_WF = None, matrices.conv_WF
    if past is not None:
      sides, u_PF = self.after(sides, window, layout, segment_P, D, conv_WF)
      conv_WF = None
    made = self.convolve(
        sides, conv_WF, matrices.conv_F,
        jnp.where(self.real(layout), place_P, -1), D)
    made |= {name: made[name].astype(x_ND.dtype) for name in QKV}
    q, k, v = self.heads(*(made[name] for name in QKV))
    gates = self.gates(made, times, matrices.second_GRX)
    if self.rule.v_first_gate:
      v, first_BTHV = self.residual(
          v, gates, matrices.constants, moves, assignment, first_BTHV, B, T)
    o_PHV, state_GHKV = self.update(
        q, k, v, gates, matrices.constants, layout, segment_P, place_P,
        old.get('state_BGHKV'), continues_G, chunk)
    o_NF = moves.ungroup(o_PHV.reshape(len(o_PHV), -1), assignment.weight_R)
    if cache is not None:
      new = {
          'window_BGWF': rows.last_inputs(u_PF, layout, old['window_BGWF']),
          'count_BG': old['count_BG'] + layout.count_G,
      }
      if x_PD is not None:
        new['before_BG1D'] = rows.last_inputs(
            x_PD, layout, old['before_BG1D'])
      cache = {name: _batch_major(a, B) for name, a in new.items()} | {
          'state_BGHKV': state_GHKV.reshape(cache['state_BGHKV'].shape)}
    return o_NF.reshape(B, T, H, -1), cache, routed, first_BTHV

  def choose(self, scores_BTM, valid_BT, router_M) -> routing.Assignment:
    """Asks the router."""
    inputs = router_inputs(scores_BTM, valid_BT, router_M)
    return router_of(self.mixer).route(inputs, router_settings(self.mixer))

  def route(self, scores_BTM, valid_BT, router_M, forced):
    """Rows of the routed memories, then of the shared one; s B + b is a group
    for the memory in slot s.

    Memory-major groups keep the rows of one memory together over the whole
    batch, so that its projections are one matmul.

    Args:
      forced: a selection where the router's own choice does not count.
    Returns:
      (assignment to groups, `Routed` to memories).
    """
    mixer = self.mixer
    B, T, M = scores_BTM.shape
    if forced is None:
      routed = self.choose(scores_BTM, valid_BT, router_M)
    else:
      routed = routing.from_mask(forced, allowed(valid_BT, M), None)
    A = routed.rows_per_token
    memory_NA = routed.group_R.reshape(B * T, A)
    weight_NA = routed.weight_R.reshape(B * T, A)
    hot_NAM = memory_NA[..., None] == jnp.arange(M)[None, None]
    weight_BTM = jnp.where(hot_NAM, weight_NA[..., None], 0).sum(
        1).reshape(B, T, M)
    if mixer.shared:
      shared_N1 = jnp.where(valid_BT.reshape(-1, 1), M, -1)
      memory_NA = jnp.concatenate([memory_NA, shared_N1], 1)
      weight_NA = jnp.concatenate(
          [weight_NA, jnp.ones_like(weight_NA[:, :1])], 1)
      A += 1
    sample_N1 = jnp.repeat(jnp.arange(B), T)[:, None]
    slot_NA = self.placement.position(memory_NA)
    group_NA = jnp.where(slot_NA < 0, -1, slot_NA * B + sample_N1)
    assignment = routing.Assignment(
        jnp.repeat(jnp.arange(B * T), A), group_NA.reshape(-1),
        weight_NA.reshape(-1), routed.selected_BTE, routed.probs_BTE, A,
    )
    return assignment, Routed(
        routed.selected_BTE, routed.probs_BTE, weight_BTM)

  def sizes(self) -> dict[str, tuple[int, ...]]:
    """Of what a row has of each map, by name, heads first."""
    mixer, H, n = self.mixer, self.mixer.num_heads, self.mixer.num_householder
    K, V, U = mixer.key_dim, mixer.value_dim, mixer.key_heads or H
    sizes = {'query': (U, K), 'key': (U, n, K), 'value': (H, n, V)}
    for name, gate in self.rule.gates.items():
      sizes[name] = (H, n) if gate.per_update else (H,)
      sizes[name] += gate.size(K, V)
    return sizes

  def widths(self, D: int) -> dict[str, int]:
    """Columns of each map's matrix by name."""
    low = ranks(self.mixer, D)
    return {name: low.get(name, math.prod(size))
            for name, size in self.sizes().items()}

  def project(self, x_ND, modality_N, modality_P, moves, segment_P, window,
              times, weights: maps.Matrices):
    """What maps make of rows, side by side, by their names; and what shifted
    rows read.

    Args:
      times: (rows, stacked matrices) -> each row by that of its memory.
    """
    _, *names = widths = self.widths(x_ND.shape[1])
    if weights.shares is not None:
      x_PD = moves.gather(x_ND)
      before_PD = rows.before(
          x_PD, 1, moves.layout, segment_P, window('before_BG1D', x_PD, 1))
      read = shift.mix(x_PD, before_PD, weights.shares)
      other = {name: gate.input_of for name, gate in self.rule.gates.items()}
      matrices = _apart(weights.memory_GDX, names, widths)
      return {
          ('query',): _times(modality_P, read['query'], weights.query_SDX)
      } | {(name,): times(read[other.get(name) or name], w_GDX)
           for name, w_GDX in matrices.items()}, x_PD
    # `convolve` makes zeros of padding, and the rule has no use for its gates.
    take = functools.partial(moves.gather, zeros=False)
    query_PX = take(_times(modality_N, x_ND, weights.query_SDX))
    if self.mixer.single_kv_proj:  # project tokens, then take rows
      rest_PX = take(_times(modality_N, x_ND, weights.memory_GDX))
    elif modality_P is None:  # by memory alone
      rest_PX = dispatch.gather_matmul(
          moves.send(x_ND), weights.memory_GDX,
          _slots(moves.layout, self.placement.groups_per_rank), moves.layout)
    else:
      rest_PX = times(take(x_ND), weights.memory_GDX)
    return {('query',): query_PX, tuple(names): rest_PX}, None

  def after(self, sides, window, layout, segment_P, D, conv_WF):
    """`sides` apart, convolved with what was before these rows, in float32; and
    what the convolution ran over."""
    widths = self.widths(D)
    apart = {}
    for names, x_PX in sides.items():
      apart |= _apart(x_PX, names, widths)
    c_PF = u_PF = jnp.concatenate([apart[name] for name in QKV], 1)
    if conv_WF is not None:
      c_PF = rows.short_conv(
          u_PF.astype(jnp.float32), conv_WF.astype(jnp.float32), layout,
          segment_P, window('window_BGWF', u_PF, len(conv_WF) - 1))
    apart |= _apart(c_PF, QKV, widths)
    return {(name,): x for name, x in apart.items()}, u_PF

  def convolve(self, sides, conv_WF, conv_F, reach_P, D):
    """Convolved, through SiLU, of unit length, padding zero; apart by name."""
    mixer, rule, widths = self.mixer, self.rule, self.widths(D)

    def part(name):
      if name not in QKV:
        return pallas.Part(widths[name], conv=False)
      return pallas.Part(
          widths[name], silu=mixer.conv_width > 0 and name[0] in rule.silu,
          l2_dim=mixer.key_dim if name[0] in rule.l2_normalised else 0)

    made = pallas.short_conv(
        tuple(sides.values()), conv_WF, conv_F, reach_P,
        tuple(tuple(map(part, names)) for names in sides))
    return dict(zip((name for names in sides for name in names), made))

  def gates(self, made, times, second_GRX):
    """The rule's gates [P, *size], float32, by name."""
    gates, sizes = {}, self.sizes()
    for name, gate in self.rule.gates.items():
      x_PX = made[name]
      if name in second_GRX:
        inner = gate.activation or (lambda x: x)
        x_PX = times(inner(x_PX), second_GRX[name])
      gates[name] = x_PX.astype(jnp.float32).reshape(-1, *sizes[name])
    return gates

  def real(self, layout):
    """Which slots hold a row."""
    return layout.row_P < layout.token_R.shape[0]

  def heads(self, q_PX, k_PX, v_PX):
    """Queries [P, H, K], keys and values [P, H, n, ...]."""
    sizes, H = self.sizes(), self.mixer.num_heads
    q, k, v = (x.reshape(-1, *sizes[name])
               for name, x in zip(QKV, (q_PX, k_PX, v_PX)))
    U = q.shape[1]
    each = lambda x: x if U == H else jnp.repeat(x, H // U, axis=1)
    return each(q), each(k), v

  def residual(self, v, gates, constants, moves, assignment, first_BTHV, B, T):
    """Values moved towards those of the first layer, and these by token."""
    is_first = constants['layer_fraction'] == 0
    v_PHV = v[:, :, 0]
    mean_R = assignment.weight_R / (1 + self.mixer.shared)
    first_NHV = moves.ungroup(v_PHV, mean_R)
    if first_BTHV is not None:
      first_NHV = jnp.where(
          is_first, first_NHV, first_BTHV.reshape(first_NHV.shape))
    share_PHV = jax.nn.sigmoid(
        gates[self.rule.v_first_gate] + constants['first_bias'][None])
    share_PHV = jnp.where(is_first, 0, share_PHV).astype(v.dtype)
    v_PHV += share_PHV * (moves.gather(first_NHV) - v_PHV)
    return v_PHV[:, :, None], first_NHV.reshape(B, T, *first_NHV.shape[1:])

  def update(self, q, k, v, gates, constants, layout, segment_P, place_P,
             state_GHKV, continues_G, chunk):
    """Runs the memories over their rows and reads them."""
    mixer, G = self.mixer, len(layout.start_G)
    B = G // self.placement.groups_per_rank
    group_N = layout.group_P[::chunk]
    # Slots are ordered by m B + b; states lie by b (M + shared) + m.
    name_N = group_N % B * self.placement.groups_per_rank + group_N // B
    if continues_G is not None:
      continues_G = _batch_major(continues_G, B).reshape(G)
    return rules.run(
        self.rule, q, k, v, gates, constants, self.real(layout),
        position_in_memory=place_P, group_N=jnp.where(group_N < 0, -1, name_N),
        segment_R=segment_P, initial_state_GHKV=state_GHKV,
        continues_G=continues_G, l2_normalised=True, num_groups=G, chunk=chunk,
        backend=mixer.backend,
    )


def _apart(x, names, widths):
  """What lies side by side along the last axis, by name."""
  starts = np.cumsum([widths[name] for name in names])[:-1]
  return dict(zip(names, jnp.split(x, starts, axis=-1)))


def _times(modality_R, x_RD, w_SDX):
  """x w, or x times its modality's matrix, 0 where that is -1."""
  if modality_R is None:
    return x_RD @ w_SDX[0]
  return dispatch.matmul(x_RD, w_SDX, modality_R)


def _slots(layout, memories):
  """Slots of each memory."""
  used = (layout.group_P >= 0).sum(dtype=jnp.int32)
  bound = layout.start_G[::len(layout.start_G) // memories]
  return jnp.diff(jnp.append(bound, used))


def _times_memory(layout, memories, modality_P, x_PD, w_GDX):
  """x times the matrix of its memory, or of its memory and modality."""
  samples = len(layout.start_G) // memories
  if modality_P is None:
    return pallas.grouped_matmul(x_PD, w_GDX, _slots(layout, memories))
  copies = len(w_GDX) // memories
  own_P = layout.group_P // samples * copies + modality_P
  return dispatch.matmul(x_PD, w_GDX, jnp.where(modality_P < 0, -1, own_P))


def _memory_major(x_BG):
  """[B, G, ...] to [G * B, ...]."""
  B, G, *rest = x_BG.shape
  return x_BG.swapaxes(0, 1).reshape(G * B, *rest)


def _batch_major(x_G, B):
  """[G * B, ...], memory by memory, to [B, G, ...]."""
  return x_G.reshape(len(x_G) // B, B, *x_G.shape[1:]).swapaxes(0, 1)
