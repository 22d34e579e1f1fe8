"""A layer's memories: route, group, project, convolve, update, read, combine.

Pure functions of arrays, for one shard of the batch; `mom` makes the
parameters.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mom_jax import config, dispatch, pallas, routing, rules
from mom_jax.models import rows, shift

Cache = dict[str, jax.Array]


class Weights(NamedTuple):
  """Parameters of one layer, in the activations' type but for constants.

  G is the number of memories with projections of their own, the shared one
  last; 1 with `single_kv_proj`. F = U K (1 + n) + H n V is what the short
  convolution runs over: queries, and n keys and values a token, U of the H
  heads with queries and keys of their own. In an untied model S is the number
  of modalities, and G counts memories times S, those of a memory side by side;
  else S is 1.
  """

  query_SDX: jax.Array
  memory_GDX: jax.Array  # keys, values and gates side by side
  second_GRX: dict[str, jax.Array]  # gates of low rank, by name
  conv_WF: jax.Array | None
  conv_F: jax.Array | None  # its bias
  shares: shift.Shares | None
  constants: dict[str, jax.Array]
  router_M: jax.Array | None  # router state


def rule_of(mixer: config.Mixer) -> rules.Rule:
  """The rule of a layer's memories.

  Raises:
    ValueError: settings of the mixer name no rule.
  """
  return rules.get(
      mixer.rule, mixer.feature_map, mixer.normaliser, mixer.writes)


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
  H, n = mixer.num_heads, mixer.writes
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
  if mixer.router in ('expert_choice', 'threshold'):
    raise ValueError(
        f'config.model.mixer.router={mixer.router!r} picks tokens for a'
        ' memory; memories need a router that picks memories for a token,'
        ' such as softmax_topk.'
    )
  return router


def allowed(valid_BT: jax.Array, M: int) -> jax.Array:
  """[B, T, M]: any memory may take a token that is no padding."""
  return jnp.broadcast_to(valid_BT[..., None], (*valid_BT.shape, M))


class Read:
  """Route, group, project, convolve, update, read and combine one shard."""

  def __init__(self, mixer: config.Mixer):
    self.mixer, self.rule = mixer, rule_of(mixer)

  def __call__(self, batched, weights: Weights):
    (x_BTD, scores_BTM, segment_BT, modality_BT, cache, first_BTHV,
     given) = batched
    mixer = self.mixer
    B, T, D = x_BTD.shape
    N, H = B * T, mixer.num_heads
    x_ND = x_BTD.reshape(N, D)
    modality_N = None if modality_BT is None else modality_BT.reshape(N)
    assignment = self.route(
        scores_BTM, segment_BT > 0, weights.router_M, given)
    chunk = min(mixer.chunk, 1 << (T - 1).bit_length())
    layout = dispatch.group(
        assignment.row_R, assignment.group_R, num_tokens=N,
        num_groups=self.groups * B, align=chunk, choices=assignment.choices,
    )
    segment_P = dispatch.take(segment_BT.reshape(N), layout)
    old = {}
    if cache is not None:
      # Slots run memory by memory, the cache row by row.
      old = {name: _memory_major(a) for name, a in cache.items()}
      old['state_BGHKV'] = cache['state_BGHKV'].reshape(
          -1, *cache['state_BGHKV'].shape[2:])
      segment_P = jnp.minimum(segment_P, 1)
    u_PF, gates, x_PD = self.project(
        x_ND, modality_N, layout, segment_P, old.get('before_BG1D'), weights)
    c_PF = u_PF
    if weights.conv_WF is not None:
      c_PF = rows.short_conv(
          u_PF, weights.conv_WF, layout, segment_P, old.get('window_BGWF'))
    if weights.conv_F is not None:  # padding stays zero
      c_PF = jnp.where(
          self.real(layout)[:, None], c_PF + weights.conv_F[None], 0)
    place_P = rows.place(layout, segment_P, old.get('count_BG'))
    q, k, v = self.heads(c_PF)
    if self.rule.first:
      v, first_BTHV = self.residual(
          v, gates, weights.constants, layout, assignment, first_BTHV, B, T)
    o_PHV, state_GHKV = self.update(
        q, k, v, gates, weights.constants, layout, segment_P, place_P,
        old.get('state_BGHKV'), chunk, B,
    )
    o_NHV = dispatch.ungroup(o_PHV, layout, assignment.weight_R, N)
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
    return o_NHV.reshape(B, T, H, -1), cache, assignment.aux, first_BTHV

  @property
  def groups(self) -> int:
    return self.mixer.num_memories + self.mixer.shared

  def choose(self, scores_BTM, valid_BT, router_M) -> routing.Assignment:
    """Asks the router."""
    return router_of(self.mixer).route(
        scores_BTM, allowed(valid_BT, self.mixer.num_memories), router_M,
        top_k=self.mixer.top_k, capacity=1.0, pool='sequence',
    )

  def route(
      self, scores_BTM, valid_BT, router_M, given
  ) -> routing.Assignment:
    """Rows of the routed memories, then of the shared one; m B + b is a group.

    Memory-major groups keep the rows of one memory together over the whole
    batch, so that its projections are one matmul.

    Args:
      given: (selected, weight) where the router's own choice does not count.
    """
    mixer = self.mixer
    B, T, M = scores_BTM.shape
    if given is None:
      routed = self.choose(scores_BTM, valid_BT, router_M)
    else:
      routed = routing.from_mask(*given, allowed(valid_BT, M), None)
    A = routed.choices
    memory_NA = routed.group_R.reshape(B * T, A)
    weight_NA = routed.weight_R.reshape(B * T, A)
    hot_NAM = memory_NA[..., None] == jnp.arange(M)[None, None]
    aux = routed.aux | {
        'weights_BTE': jnp.where(hot_NAM, weight_NA[..., None], 0).sum(
            1).reshape(B, T, M)}
    if mixer.shared:
      shared_N1 = jnp.where(valid_BT.reshape(-1, 1), M, -1)
      memory_NA = jnp.concatenate([memory_NA, shared_N1], 1)
      weight_NA = jnp.concatenate(
          [weight_NA, jnp.ones_like(weight_NA[:, :1])], 1)
      A += 1
    sample_N1 = jnp.repeat(jnp.arange(B), T)[:, None]
    group_NA = jnp.where(memory_NA < 0, -1, memory_NA * B + sample_N1)
    return routing.Assignment(
        jnp.repeat(jnp.arange(B * T), A), group_NA.reshape(-1),
        weight_NA.reshape(-1), aux, A,
    )

  def project(
      self, x_ND, modality_N, layout, segment_P, before_G1D, weights):
    """Queries, keys, values [P, F], gates by name, and what shifted rows read.
    """
    mixer, shares = self.mixer, weights.shares
    rule, H, n = self.rule, mixer.num_heads, mixer.writes
    D, K, V = x_ND.shape[1], mixer.key_dim, mixer.value_dim
    low = ranks(mixer, D)
    U = mixer.key_heads or H
    sizes = {'key': (U * n * K,), 'value': (H * n * V,)}
    for name, gate in rule.gates.items():
      sizes[name] = (H, n) if gate.every_write else (H,)
      sizes[name] += gate.size(K, V)
    widths = [low.get(name, math.prod(size)) for name, size in sizes.items()]
    starts = [sum(widths[:i]) for i in range(1, len(widths))]
    modality_P = None
    if modality_N is not None:
      modality_P = dispatch.take(modality_N + 1, layout) - 1
    if mixer.single_kv_proj:
      times = lambda x_PD, w_GDX: _times(x_PD, w_GDX, modality_P)
    else:
      times = functools.partial(
          _times_memory, layout, self.groups, modality_P)
    mine, x_PD = lambda x: x, None
    if shares is not None:
      x_PD = dispatch.take(x_ND, layout)
      before_PD = rows.before(x_PD, 1, layout, segment_P, before_G1D)
      read = shift.mix(x_PD, before_PD, shares)
      parts = jnp.split(weights.memory_GDX, starts, axis=2)
      other = {name: gate.reads for name, gate in rule.gates.items()}
      made = {name: times(read[other.get(name) or name], w)
              for name, w in zip(sizes, parts)}
      q_PX = _times(read['query'], weights.query_SDX, modality_P)
    else:
      q_PX = dispatch.take(
          _times(x_ND, weights.query_SDX, modality_N), layout)
      if mixer.single_kv_proj:  # project tokens, then take rows
        mine = lambda x: dispatch.take(x, layout)
        times = lambda x_ND, w_GDX: _times(x_ND, w_GDX, modality_N)
        kvg = times(x_ND, weights.memory_GDX)
      else:
        kvg = times(dispatch.take(x_ND, layout), weights.memory_GDX)
      made = dict(zip(sizes, jnp.split(kvg, starts, axis=1)))
    gates = {}
    for name in rule.gates:
      x = made[name]
      if name in weights.second_GRX:
        inner = rule.gates[name].inner or (lambda x: x)
        x = times(inner(x), weights.second_GRX[name])
      gates[name] = mine(x).astype(jnp.float32).reshape(-1, *sizes[name])
    u_PF = jnp.concatenate(
        [q_PX, mine(jnp.concatenate([made['key'], made['value']], 1))], 1)
    return u_PF, gates, x_PD

  def real(self, layout):
    """Which slots hold a row."""
    return layout.row_P < layout.row_R.shape[0]

  def heads(self, c_PF):
    """Queries [P, H, K], keys and values [P, H, n, ...]."""
    mixer = self.mixer
    H, K, n, P = mixer.num_heads, mixer.key_dim, mixer.writes, len(c_PF)
    U = mixer.key_heads or H
    silu = self.rule.silu if mixer.conv_width else ''
    q, k, v = (
        jax.nn.silu(x) if name in silu else x for name, x in zip(
            'qkv', jnp.split(c_PF, (U * K, U * K * (1 + n)), axis=1)))
    each = lambda x: x if U == H else jnp.repeat(x, H // U, axis=1)
    return (each(q.reshape(P, U, K)), each(k.reshape(P, U, n, K)),
            v.reshape(P, H, n, -1))

  def residual(self, v, gates, constants, layout, assignment, first_BTHV, B, T):
    """Values moved towards those of the first layer, and these by token."""
    is_first = constants['depth'] == 0
    v_PHV = v[:, :, 0]
    mean_R = assignment.weight_R / (1 + self.mixer.shared)
    first_NHV = dispatch.ungroup(v_PHV, layout, mean_R, B * T)
    if first_BTHV is not None:
      first_NHV = jnp.where(
          is_first, first_NHV, first_BTHV.reshape(first_NHV.shape))
    share_PHV = jax.nn.sigmoid(
        gates[self.rule.first] + constants['first_bias'][None])
    share_PHV = jnp.where(is_first, 0, share_PHV).astype(v.dtype)
    v_PHV += share_PHV * (dispatch.take(first_NHV, layout) - v_PHV)
    return v_PHV[:, :, None], first_NHV.reshape(B, T, *first_NHV.shape[1:])

  def update(self, q, k, v, gates, constants, layout, segment_P, place_P,
             state_GHKV, chunk, B):
    """Runs the memories over their rows and reads them."""
    mixer = self.mixer
    group_N = layout.group_P[::chunk]
    # Slots are ordered by m B + b; states lie by b (M + shared) + m.
    name_N = group_N % B * self.groups + group_N // B
    return rules.run(
        self.rule, q, k, v, gates, constants, self.real(layout), place=place_P,
        group_N=jnp.where(group_N < 0, -1, name_N), segment_R=segment_P,
        initial_state_GHKV=state_GHKV, num_groups=B * self.groups,
        chunk=chunk, backend=mixer.backend,
    )


def _times(x_RD, w_SDX, modality_R):
  """x w, or x times its modality's matrix, 0 where that is -1."""
  if modality_R is None:
    return x_RD @ w_SDX[0]
  return dispatch.matmul(x_RD, w_SDX, modality_R)


def _times_memory(layout, memories, modality_P, x_PD, w_GDX):
  """x times the matrix of its memory, or of its memory and modality."""
  samples = len(layout.start_G) // memories
  if modality_P is None:
    used = (layout.group_P >= 0).sum(dtype=jnp.int32)
    bound = layout.start_G[::samples]
    slots_G = jnp.diff(jnp.append(bound, used))
    return pallas.grouped_matmul(x_PD, w_GDX, slots_G)
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
