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
from mom_jax.models import layers

Cache = dict[str, jax.Array]


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
  constants: dict[str, jax.Array]


class Mom(nn.Module):
  """Mixture-of-Memories: each token writes to and reads from few memories.

  A router sends a token to K of M memories; each memory is a linear-recurrent
  state that advances on its own tokens only. One shared memory sees all:

    o_t = sum_j w_tj q_t^(j) S_t^(m_j) + q_t S_t^shared
    y_t = W_o (RMSNorm(o_t) * silu(W_g x_t))

  Convolution, decay and state never cross a document or a memory, in training
  as in decoding; the official code's training mode lets the convolution do so
  (and so see the future), ours has no such mode. One memory without a shared
  one is the plain layer and has no router.

  Source: arXiv 2502.13685, eq. 3 to 8; `rules` for the update.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: Cache | None,
      segment_BT: Int[Array, 'B T'],
  ) -> tuple[Float[Array, 'B T D'], Cache | None, dict[str, Any]]:
    """Mixes tokens.

    Args:
      x_BTD: normalised residual stream.
      cache: states and convolution windows so far, or None in training.
      segment_BT: document of each token; 0 marks padding, which no memory sees
        and whose output is zero. With a cache, any other number is the same
        document going on.
    Returns:
      (y, cache, aux): `aux['selected_BTE']` says which memories took a token,
      `balance` is the Switch loss, `entropy` the router's, in nats.
    """
    mixer, D = self.cfg.mixer, self.cfg.width
    H, V, M = mixer.num_heads, mixer.value_dim, mixer.num_memories
    scores_BTM = jnp.zeros(x_BTD.shape[:2] + (1,), jnp.float32)
    if M > 1:
      scores_BTM = layers.Einsum(
          'btd,dm->btm', (D, M), ('embed', None), init=layers.mom_init,
          dtype=jnp.float32, name='router',
      )(x_BTD)
    read = sharding.batch_local(_Read(mixer))
    o_BTHV, cache, route = read(
        (x_BTD, scores_BTM, segment_BT, cache), self._weights(x_BTD.dtype)
    )
    o_BTHV = layers.RMSNorm(self.cfg.norm_eps, name='norm')(o_BTHV)
    if mixer.output_gate:
      gate_BTHV = layers.Einsum(
          'btd,dhv->bthv', (D, H, V), ('embed', 'heads', 'kv'),
          init=layers.mom_init, name='gate',
      )(x_BTD)
      o_BTHV = o_BTHV * jax.nn.silu(gate_BTHV)
    y_BTD = layers.Einsum(
        'bthv,hvd->btd', (H, V, D), ('heads', 'kv', 'embed'),
        init=layers.mom_init, name='output',
    )(o_BTHV)
    y_BTD = jnp.where((segment_BT > 0)[..., None], y_BTD, 0)
    return y_BTD, cache, self._aux(scores_BTM, segment_BT > 0, route)

  def _weights(self, dtype: Any) -> Weights:
    """Makes the parameters that `_Read` uses."""
    mixer, D = self.cfg.mixer, self.cfg.width
    H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
    rule, n = rules.get(mixer.rule), mixer.writes
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
      size, rank = gate.size(K, V), gate.inner(V)
      own = (H * n if gate.every_write else H, *size)
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
    constants = {
        name: param(name, constant.shape(H, K, V),
                    heads[: len(constant.shape(H, K, V))], constant.init)
        for name, constant in rule.constants.items()
    }
    return Weights(
        query_DHK.reshape(D, -1).astype(dtype),
        jnp.concatenate(
            [w.reshape(G, D, -1) for w in memory_GDX], -1).astype(dtype),
        second_GRX,
        jnp.concatenate(
            [w.reshape(len(w), -1) for w in conv_WF], -1).astype(dtype)
        if conv_WF else None,
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


def init_cache(cfg: config.Model, batch: int) -> Cache:
  """Empty memories: states in float32 and the convolution's last inputs."""
  mixer = cfg.mixer
  H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
  G = mixer.num_memories + mixer.shared
  width = H * (K + mixer.writes * (K + V))
  window = (batch, G, max(mixer.conv_width - 1, 0), width)
  return {
      'state_BGHKV': jnp.zeros((batch, G, H, K, V), jnp.float32),
      'window_BGWF': jnp.zeros(window, jnp.dtype(cfg.dtype)),
  }


class _Read:
  """Route, group, project, convolve, update, read and combine one shard."""

  def __init__(self, mixer: config.Mixer):
    self.mixer = mixer

  def __call__(self, batched, weights: Weights):
    x_BTD, scores_BTM, segment_BT, cache = batched
    mixer = self.mixer
    B, T, D = x_BTD.shape
    N, H, V = B * T, mixer.num_heads, mixer.value_dim
    x_ND = x_BTD.reshape(N, D)
    assignment = self.route(scores_BTM, segment_BT > 0)
    chunk = min(mixer.chunk, 1 << (T - 1).bit_length())
    layout = dispatch.group(
        assignment.row_R, assignment.group_R, num_tokens=N,
        num_groups=self.groups * B, align=chunk, choices=assignment.choices,
    )
    segment_P = dispatch.take(segment_BT.reshape(N), layout)
    u_PF, gates = self.project(x_ND, layout, weights)
    window_GWF = state_GHKV = None
    if cache is not None:
      # Slots run memory by memory, the cache row by row.
      window_GWF = _memory_major(cache['window_BGWF'])
      state_GHKV = cache['state_BGHKV'].reshape(-1, *cache[
          'state_BGHKV'].shape[2:])
      segment_P = jnp.minimum(segment_P, 1)
    c_PF = u_PF
    if weights.conv_WF is not None:
      c_PF = short_conv(u_PF, weights.conv_WF, layout, segment_P, window_GWF)
    o_PHV, state_GHKV = self.update(
        c_PF, gates, weights.constants, layout, segment_P, state_GHKV, chunk, B,
    )
    o_NHV = dispatch.ungroup(o_PHV, layout, assignment.weight_R, N)
    if cache is not None:
      window_GWF = _last_inputs(u_PF, layout, window_GWF)
      cache = {
          'state_BGHKV': state_GHKV.reshape(cache['state_BGHKV'].shape),
          'window_BGWF': window_GWF.reshape(
              self.groups, B, *window_GWF.shape[1:]).swapaxes(0, 1),
      }
    return o_NHV.reshape(B, T, H, V), cache, assignment.aux

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

  def project(self, x_ND, layout, weights):
    """Queries, keys, values [P, F] and gates by name, zero in padding slots."""
    mixer = self.mixer
    H, n = mixer.num_heads, mixer.writes
    q_PX = dispatch.take(x_ND @ weights.query_DX, layout)
    if mixer.single_kv_proj:
      times = lambda x, w_GDX: x @ w_GDX[0]
      mine = lambda x: dispatch.take(x, layout)
      rows = x_ND
    else:
      used = (layout.group_P >= 0).sum(dtype=jnp.int32)
      bound = layout.start_G[:: len(layout.start_G) // self.groups]
      slots_G = jnp.diff(jnp.append(bound, used))
      times = lambda x, w_GDX: pallas.grouped_matmul(x, w_GDX, slots_G)
      mine = lambda x: x
      rows = dispatch.take(x_ND, layout)
    kvg = times(rows, weights.memory_GDX)
    first = H * n * (mixer.key_dim + mixer.value_dim)
    u_PF = jnp.concatenate([q_PX, mine(kvg[:, :first])], 1)
    gates = {}
    for name, gate in rules.get(mixer.rule).gates.items():
      size = gate.size(mixer.key_dim, mixer.value_dim)
      own = (H, n, *size) if gate.every_write else (H, *size)
      width = gate.inner(mixer.value_dim) or math.prod(own)
      made = kvg[:, first : first + width]
      first += width
      if name in weights.second_GRX:
        made = times(made, weights.second_GRX[name])
      gates[name] = mine(made).astype(jnp.float32).reshape(-1, *own)
    return u_PF, gates

  def update(self, c_PF, gates, constants, layout, segment_P, state_GHKV,
             chunk, B):
    """Runs the memories over their rows and reads them."""
    mixer, rule = self.mixer, rules.get(self.mixer.rule)
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
        layout.row_P < layout.row_R.shape[0],
        group_N=jnp.where(group_N < 0, -1, name_N), segment_R=segment_P,
        initial_state_GHKV=state_GHKV, num_groups=B * self.groups,
        chunk=chunk, backend=mixer.backend,
    )


def short_conv(
    u_PF: Float[Array, 'P F'],
    conv_WF: Float[Array, 'W F'],
    layout: dispatch.Layout,
    segment_P: Int[Array, 'P'],
    window_GWF: Float[Array, 'G w F'] | None,
) -> Float[Array, 'P F']:
  """Causal depthwise convolution along each group's own rows.

    c_p = sum_j conv[W - 1 - j] * u_{p - j}

  Rows before a group's first, or of another document, count as zero; with a
  cache, rows before the first are the last W - 1 of `window_GWF`.
  """
  W = conv_WF.shape[0]
  group_P = jnp.maximum(layout.group_P, 0)
  place_P = jnp.arange(len(u_PF)) - layout.start_G[group_P]
  c_PF = u_PF * conv_WF[-1][None]
  for j in range(1, W):
    before_PF = jnp.pad(u_PF, ((j, 0), (0, 0)))[:-j]
    same_P = segment_P == jnp.pad(segment_P, (j, 0))[:-j]
    inside_P = place_P >= j
    before_PF = jnp.where((inside_P & same_P)[:, None], before_PF, 0)
    if window_GWF is not None:
      cached_PF = window_GWF[group_P, jnp.minimum(W - 1 - j + place_P, W - 2)]
      cached_PF = jnp.where((segment_P > 0)[:, None], cached_PF, 0)
      before_PF = jnp.where(inside_P[:, None], before_PF, cached_PF)
    c_PF += before_PF * conv_WF[W - 1 - j][None]
  return c_PF


def _last_inputs(u_PF, layout, window_GWF):
  """The last W - 1 inputs of every group, old ones where it got fewer."""
  W1 = window_GWF.shape[1]
  if not W1:
    return window_GWF
  back_W = jnp.arange(W1, 0, -1)
  place_GW = layout.count_G[:, None] - back_W[None]
  new_GWF = u_PF[jnp.maximum(layout.start_G[:, None] + place_GW, 0)]
  # Group g keeps its newest W1 - count old inputs, moved to the front.
  old_GW = jnp.clip(W1 + place_GW, 0, W1 - 1)
  old_GWF = jnp.take_along_axis(window_GWF, old_GW[..., None], 1)
  return jnp.where(place_GW[..., None] >= 0, new_GWF, old_GWF)


def _memory_major(x_BG):
  """[B, G, ...] to [G * B, ...]."""
  B, G, *rest = x_BG.shape
  return x_BG.swapaxes(0, 1).reshape(G * B, *rest)
