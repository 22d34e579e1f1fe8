"""Mixture-of-Memories token mixer (arXiv 2502.13685)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mom_jax import (
    balance,
    config,
    dispatch,
    pallas,
    routing,
    rules,
    sharding,
)
from mom_jax.models import layers, rows, shift

Cache = dict[str, jax.Array]
LayerValues = dict[str, jax.Array]


class Weights(NamedTuple):
  """Parameters of one layer, in the activations' type but for constants.

  G is the number of memories with projections of their own, the shared one
  last; 1 with `single_kv_proj`. F = H (K + n (K + V)) is what the short
  convolution runs over: queries, and n keys and values a token.
  """

  query_DX: jax.Array
  memory_GDX: jax.Array  # keys, values and gates side by side
  second_GRX: dict[str, jax.Array]  # gates of low rank, by name
  conv_WF: jax.Array | None
  shares: shift.Shares | None
  constants: dict[str, jax.Array]


def rule_of(mixer: config.Mixer) -> rules.Rule:
  """The rule of a layer's memories.

  Raises:
    ValueError: settings of the mixer name no rule.
  """
  return rules.get(
      mixer.rule, mixer.feature_map, mixer.normaliser, mixer.writes)


class Mom(nn.Module):
  """Mixture-of-Memories: each token writes to and reads from few memories.

  A router sends a token to K of M memories; each memory is a linear-recurrent
  state that advances on its own tokens only. One shared memory sees all:

    o_t = sum_j w_tj q_t^(j) S_t^(m_j) + q_t S_t^shared
    y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))

  Convolution, decay and state never cross a document or a memory, in training
  as in decoding; the official code's training mode lets the convolution do so
  (and so see the future), ours has no such mode. One memory without a shared
  one is the plain layer and has no router. Norm and gate may be others than
  the paper's, `mixer.output_norm` and `mixer.output_gate`.

  Source: arXiv 2502.13685, eq. 3 to 8; `rules` for the update.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: Cache | None,
      segment_BT: Int[Array, 'B T'],
      layer: LayerValues | None = None,
  ) -> tuple[Float[Array, 'B T D'], Cache | None, dict[str, Any]]:
    """Mixes tokens.

    Args:
      x_BTD: normalised residual stream.
      cache: states and convolution windows so far, or None in training.
      segment_BT: document of each token; 0 marks padding, which no memory sees
        and whose output is zero. With a cache, any other number is the same
        document going on.
      layer: 'depth' and the rule's values across layers (`rules.layer_values`);
        None is the only layer of a model.
    Returns:
      (y, cache, aux): `aux['selected_BTE']` says which memories took a token,
      `balance` is the Switch loss, `entropy` the router's, in nats.
    """
    mixer, D = self.cfg.mixer, self.cfg.width
    H, V, M = mixer.num_heads, mixer.value_dim, mixer.num_memories
    if layer is None:
      layer = jax.tree.map(lambda a: a[0], layer_values(self.cfg, 1, None))
    scores_BTM = jnp.zeros(x_BTD.shape[:2] + (1,), jnp.float32)
    if M > 1:
      scores_BTM = layers.Einsum(
          'btd,dm->btm', (D, M), ('embed', None), init=layers.mom_init,
          dtype=jnp.float32, name='router',
      )(x_BTD)
    weights = self._weights(x_BTD.dtype, layer)
    last_BD, inner = None, cache
    if cache is not None:
      last_BD = cache.get('last_BD')
      inner = {k: v for k, v in cache.items() if k != 'last_BD'}
    read = sharding.batch_local(_Read(mixer))
    o_BTHX, inner, route = read((x_BTD, scores_BTM, segment_BT, inner), weights)
    o_BTHV, past_BTHV = o_BTHX[..., :V], o_BTHX[..., V:]
    gate_BTD = x_BTD
    if weights.shares is not None:
      before_BTD, last_BD = rows.token_before(x_BTD, segment_BT, last_BD)
      gate_BTD = shift.mix(x_BTD, before_BTD, weights.shares)['output']
    if cache is not None:
      cache = inner if last_BD is None else inner | {'last_BD': last_BD}
    y_BTHV = self._gated(o_BTHV, past_BTHV, gate_BTD)
    y_BTD = layers.Einsum(
        'bthv,hvd->btd', (H, V, D), ('heads', 'kv', 'embed'),
        init=layers.mom_init, name='output',
    )(y_BTHV)
    y_BTD = jnp.where((segment_BT > 0)[..., None], y_BTD, 0)
    return y_BTD, cache, self._aux(scores_BTM, segment_BT > 0, route)

  def _gated(self, o_BTHV, past_BTHV, x_BTD):
    """Norm, what joins past it, and the output gate."""
    mixer, D = self.cfg.mixer, self.cfg.width
    H, V, kind = mixer.num_heads, mixer.value_dim, mixer.output_gate
    gate_BTHV = None
    if kind not in ('none', 'own'):
      if mixer.gate_rank:
        x_BTD = layers.Einsum(
            'btd,dr->btr', (D, mixer.gate_rank), ('embed', None),
            init=layers.mom_init, name='gate_in',
        )(x_BTD)
        if kind == 'inner_sigmoid':
          x_BTD = jax.nn.sigmoid(x_BTD)
        D = mixer.gate_rank
      gate_BTHV = layers.Einsum(
          'btd,dhv->bthv', (D, H, V),
          (None if mixer.gate_rank else 'embed', 'heads', 'kv'),
          init=layers.mom_init, name='gate',
      )(x_BTD)
      if kind.startswith('silu'):
        gate_BTHV = jax.nn.silu(gate_BTHV)
      elif kind == 'sigmoid':
        gate_BTHV = jax.nn.sigmoid(gate_BTHV)
    norm = layers.ReadNorm(mixer.output_norm, self.cfg.norm_eps, name='norm')
    if kind == 'own':
      return norm(jax.nn.silu(o_BTHV))
    if kind == 'silu_first':
      return norm(o_BTHV * gate_BTHV)
    o_BTHV = norm(o_BTHV)
    if past_BTHV.shape[-1]:
      o_BTHV = o_BTHV + past_BTHV
    return o_BTHV if gate_BTHV is None else o_BTHV * gate_BTHV

  def _weights(self, dtype: Any, layer: LayerValues) -> Weights:
    """Makes the parameters that `_Read` uses."""
    mixer, D = self.cfg.mixer, self.cfg.width
    H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
    rule, n = rule_of(mixer), mixer.writes
    G = 1 if mixer.single_kv_proj else mixer.num_memories + mixer.shared
    param = lambda name, shape, axes, init=layers.mom_init: self.param(
        name, nn.with_logical_partitioning(init, axes), shape
    )
    heads, memory = ('heads', 'kv'), ('memory', 'embed', 'heads')
    query_DHK = param('query', (D, H, K), ('embed', *heads))
    memory_GDX = [
        param('key', (G, D, H * n, K), (*memory, 'kv')),
        param('value', (G, D, H * n, V), (*memory, 'kv')),
    ]
    second_GRX = {}
    for name, gate in rule.gates.items():
      rank = gate.rank and gate.rank(D, K, V)
      own = (H * n if gate.every_write else H, *gate.size(K, V))
      axes = ('heads', 'kv')[: len(own)]
      if rank:
        memory_GDX.append(
            param(f'{name}_in', (G, D, rank), ('memory', 'embed', None)))
        second_GRX[name] = param(
            f'{name}_out', (G, rank, *own), ('memory', None, *axes)
        ).reshape(G, rank, -1).astype(dtype)
      else:
        memory_GDX.append(param(name, (G, D, *own), (*memory[:2], *axes)))
    conv_WF = [
        param(f'conv_{name}', (mixer.conv_width, *own), (None, *heads),
              layers.conv_init)
        for name, own in (
            ('query', (H, K)), ('key', (H * n, K)), ('value', (H * n, V)))
    ] if mixer.conv_width else []
    constants = dict(layer)
    for name, constant in rule.constants.items():
      shape = constant.shape(H, K, V)
      init = lambda key, shape, c=constant: c.init(key, shape, layer['depth'])
      axes = (*heads[: len(shape)], *[None] * (len(shape) - 2))
      constants[name] = param(name, shape, axes, init)
    shares = None
    if rule.shift:
      names = ('query', 'key', 'value', *rule.gates, 'output')
      shares = shift.shares(self, rule, names, D, layer['depth'], dtype)
    return Weights(
        query_DHK.reshape(D, -1).astype(dtype),
        jnp.concatenate(
            [w.reshape(G, D, -1) for w in memory_GDX], -1).astype(dtype),
        second_GRX,
        jnp.concatenate(
            [w.reshape(len(w), -1) for w in conv_WF], -1).astype(dtype)
        if conv_WF else None,
        shares,
        constants,
    )

  def _aux(self, scores_BTM, valid_BT, route) -> dict[str, Any]:
    if self.cfg.mixer.num_memories == 1:
      return {}
    probs_BTM, selected_BTM = route['probs_BTE'], route['selected_BTE']
    load_M, mass_M = balance.load_and_mass(probs_BTM, selected_BTM, valid_BT)
    return {
        'selected_BTE': selected_BTM,
        'load_E': load_M,
        'mass_E': mass_M,
        'balance': balance.switch_loss(probs_BTM, selected_BTM, valid_BT),
        'entropy': balance.entropy(probs_BTM, valid_BT),
    }


def layer_values(
    cfg: config.Model, num_layers: int, stacked: LayerValues | None
) -> LayerValues:
  """What each of `num_layers` layers is told, [L, ...] each.

  Args:
    stacked: the rule's parameters across layers; None takes zeros.
  """
  rule, mixer = rule_of(cfg.mixer), cfg.mixer
  if stacked is None:
    stacked = {
        name: jnp.zeros((num_layers, *c.shape(
            mixer.num_heads, mixer.key_dim, mixer.value_dim)))
        for name, c in rule.stacked.items()}
  return rules.layer_values(rule, stacked, num_layers)


def init_cache(cfg: config.Model, batch: int) -> Cache:
  """Empty memories: states in float32, rows so far, and their last inputs."""
  mixer, rule = cfg.mixer, rule_of(cfg.mixer)
  H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
  G = mixer.num_memories + mixer.shared
  width = H * (K + mixer.writes * (K + V))
  window = (batch, G, max(mixer.conv_width - 1, 0), width)
  dtype = jnp.dtype(cfg.dtype)
  cache = {
      'state_BGHKV': jnp.zeros((batch, G, H, *rule.state(K, V)), jnp.float32),
      'window_BGWF': jnp.zeros(window, dtype),
      'count_BG': jnp.zeros((batch, G), jnp.int32),
  }
  if rule.shift:
    cache['before_BG1D'] = jnp.zeros((batch, G, 1, cfg.width), dtype)
    cache['last_BD'] = jnp.zeros((batch, cfg.width), dtype)
  return cache


class _Read:
  """Route, group, project, convolve, update, read and combine one shard."""

  def __init__(self, mixer: config.Mixer):
    self.mixer = mixer

  def __call__(self, batched, weights: Weights):
    x_BTD, scores_BTM, segment_BT, cache = batched
    mixer = self.mixer
    B, T, D = x_BTD.shape
    N, H = B * T, mixer.num_heads
    x_ND = x_BTD.reshape(N, D)
    assignment = self.route(scores_BTM, segment_BT > 0)
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
        x_ND, layout, segment_P, old.get('before_BG1D'), weights)
    c_PF = u_PF
    if weights.conv_WF is not None:
      c_PF = rows.short_conv(
          u_PF, weights.conv_WF, layout, segment_P, old.get('window_BGWF'))
    place_P = rows.place(layout, segment_P, old.get('count_BG'))
    o_PHV, state_GHKV = self.update(
        c_PF, gates, weights.constants, layout, segment_P, place_P,
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
    return o_NHV.reshape(B, T, H, -1), cache, assignment.aux

  @property
  def groups(self) -> int:
    return self.mixer.num_memories + self.mixer.shared

  def route(self, scores_BTM, valid_BT) -> routing.Assignment:
    """Rows of the routed memories, then of the shared one; m B + b is a group.

    Memory-major groups keep the rows of one memory together over the whole
    batch, so that its projections are one matmul.
    """
    mixer = self.mixer
    B, T, M = scores_BTM.shape
    router = routing.get(mixer.router, 'config.model.mixer.router')
    routed = router.route(
        scores_BTM,
        jnp.broadcast_to(valid_BT[..., None], scores_BTM.shape),
        None, top_k=mixer.top_k, capacity=1.0, pool='sequence',
    )
    A = routed.choices
    if A is None:
      raise ValueError(
          f'config.model.mixer.router={mixer.router!r} picks tokens for a'
          ' memory; memories need a router that picks memories for a token,'
          ' such as softmax_topk.'
      )
    memory_NA = routed.group_R.reshape(B * T, A)
    weight_NA = routed.weight_R.reshape(B * T, A)
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
        weight_NA.reshape(-1), routed.aux, A,
    )

  def project(self, x_ND, layout, segment_P, before_G1D, weights):
    """Queries, keys, values [P, F], gates by name, and what shifted rows read.
    """
    mixer, shares = self.mixer, weights.shares
    rule, H, n = rule_of(mixer), mixer.num_heads, mixer.writes
    D, K, V = x_ND.shape[1], mixer.key_dim, mixer.value_dim
    sizes = {'key': (H * n * K,), 'value': (H * n * V,)}
    for name, gate in rule.gates.items():
      sizes[name] = (H, n) if gate.every_write else (H,)
      sizes[name] += gate.size(K, V)
    widths = [
        rule.gates[name].rank(D, K, V)
        if name in weights.second_GRX else math.prod(size)
        for name, size in sizes.items()]
    starts = [sum(widths[:i]) for i in range(1, len(widths))]
    used = (layout.group_P >= 0).sum(dtype=jnp.int32)
    bound = layout.start_G[:: len(layout.start_G) // self.groups]
    slots_G = jnp.diff(jnp.append(bound, used))
    if mixer.single_kv_proj:
      times = lambda x, w_GDX: x @ w_GDX[0]
    else:
      times = lambda x, w_GDX: pallas.grouped_matmul(x, w_GDX, slots_G)
    mine, x_PD = lambda x: x, None
    if shares is not None:
      x_PD = dispatch.take(x_ND, layout)
      before_PD = rows.before(x_PD, 1, layout, segment_P, before_G1D)
      read = shift.mix(x_PD, before_PD, shares)
      parts = jnp.split(weights.memory_GDX, starts, axis=2)
      made = {name: times(read[name], w) for name, w in zip(sizes, parts)}
      q_PX = read['query'] @ weights.query_DX
    else:
      q_PX = dispatch.take(x_ND @ weights.query_DX, layout)
      if mixer.single_kv_proj:  # project tokens, then take rows
        mine = lambda x: dispatch.take(x, layout)
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

  def update(self, c_PF, gates, constants, layout, segment_P, place_P,
             state_GHKV, chunk, B):
    """Runs the memories over their rows and reads them."""
    mixer, rule = self.mixer, rule_of(self.mixer)
    H, K, n = mixer.num_heads, mixer.key_dim, mixer.writes
    P = c_PF.shape[0]
    silu = rule.silu if mixer.conv_width else ''
    q, k, v = (
        jax.nn.silu(x) if name in silu else x for name, x in zip(
            'qkv', jnp.split(c_PF, (H * K, H * K * (1 + n)), axis=1)))
    group_N = layout.group_P[::chunk]
    # Slots are ordered by m B + b; states lie by b (M + shared) + m.
    name_N = group_N % B * self.groups + group_N // B
    return rules.run(
        rule, q.reshape(P, H, K), k.reshape(P, H, n, K),
        v.reshape(P, H, n, -1), gates, constants,
        layout.row_P < layout.row_R.shape[0], place=place_P,
        group_N=jnp.where(group_N < 0, -1, name_N), segment_R=segment_P,
        initial_state_GHKV=state_GHKV, num_groups=B * self.groups,
        chunk=chunk, backend=mixer.backend,
    )


def _memory_major(x_BG):
  """[B, G, ...] to [G * B, ...]."""
  B, G, *rest = x_BG.shape
  return x_BG.swapaxes(0, 1).reshape(G * B, *rest)


def _batch_major(x_G, B):
  """[G * B, ...], memory by memory, to [B, G, ...]."""
  return x_G.reshape(-1, B, *x_G.shape[1:]).swapaxes(0, 1)
