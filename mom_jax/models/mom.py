"""Mixture-of-Memories token mixer (arXiv 2502.13685)."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mom_jax import config, routing, rules
from mom_jax.models import layers, maps, memories, outputs, rows, shift
from mom_jax.parallel import per_device, sharding
from mom_jax.routing import balance

LayerValues = dict[str, jax.Array]


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

  The collection 'errors' may hold 'error_prob', the share of memories taken
  that are wrong at random (rng 'errors'), to see what they cost.

  In an untied model every map of a token, into a memory and out of it, and the
  norm of what is read are its modality's own (arXiv 2411.04996 for attention).
  What makes memories common ground stays shared: the states, who routes to
  them, convolutions and the rule's constants.

  Source: arXiv 2502.13685, eq. 3 to 8; `rules` for the update.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: memories.Cache | None,
      segment_BT: Int[Array, 'B T'],
      layer: LayerValues | None = None,
      modality_BT: Int[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], memories.Cache | None, outputs.LayerAux]:
    """Mixes tokens.

    Args:
      x_BTD: normalised residual stream.
      cache: states and convolution windows so far, or None in training.
      segment_BT: document of each token; 0 marks padding, which no memory sees
        and whose output is zero. With a cache, any other number is the same
        document going on.
      layer: 'layer_fraction' and the rule's cross-layer values
        (`rules.layer_values`) and, for rules that ask for it, 'first', what
        the first layer returned as such; None is the only layer of a model.
      modality_BT: of each token, -1 on padding; needed by an untied model.
    Returns:
      (y, cache, aux): if the rule asks for it, `aux.v_first_BTHV` is the mean
      of what each token wrote in the first layer, weighted.
    """
    mixer, D = self.cfg.mixer, self.cfg.width
    H, V, M = mixer.num_heads, mixer.value_dim, mixer.num_memories
    if layer is None:
      layer = jax.tree.map(lambda a: a[0], layer_values(self.cfg, 1, None))
    layer = dict(layer)
    first_BTHV = layer.pop('first', None)
    scores_BTM = jnp.zeros(x_BTD.shape[:2] + (1,), jnp.float32)
    if M > 1:
      scores_BTM = layers.Einsum(
          'btd,dm->btm', (D, M), ('embed', None), init=layers.mom_init,
          dtype=jnp.float32, name='router',
      )(x_BTD)
    cached = cache is not None
    weights = self._weights(x_BTD.dtype, layer, cached)
    last_BD, inner = None, cache
    if cache is not None:
      last_BD = cache.get('last_BD')
      inner = {k: v for k, v in cache.items() if k != 'last_BD'}
    if not self.cfg.modality_specific:
      modality_BT = None
    read = self._read(weights, cached)
    forced = self._forced(scores_BTM, segment_BT > 0, weights.router_M)
    o_BTHX, inner, route, first_BTHV = read(
        (x_BTD, scores_BTM, segment_BT, modality_BT, inner, first_BTHV, forced),
        weights)
    o_BTHV, past_BTHV = o_BTHX[..., :V], o_BTHX[..., V:]
    gate_BTD = x_BTD
    if weights.shares is not None:
      before_BTD, last_BD = rows.token_before(x_BTD, segment_BT, last_BD)
      gate_BTD = shift.mix(x_BTD, before_BTD, weights.shares)['output']
    if cache is not None:
      cache = inner if last_BD is None else inner | {'last_BD': last_BD}
    y_BTHV = self._gated(o_BTHV, past_BTHV, gate_BTD, modality_BT)
    y_BTD = layers.Einsum(
        'bthv,hvd->btd', (H, V, D), ('heads', 'kv', 'embed'),
        init=layers.mom_init, modalities=self.cfg.num_modality_copies,
        name='output',
    )(y_BTHV, modality_BT)
    y_BTD = jnp.where((segment_BT > 0)[..., None], y_BTD, 0)
    aux = self._aux(scores_BTM, segment_BT > 0, route, weights.router_M)
    return y_BTD, cache, aux._replace(v_first_BTHV=first_BTHV)

  def _read(self, weights, cached):
    """`memories.Read` with what it says to be split over devices.

    With a cache only the batch is.
    """
    mixer = self.cfg.mixer
    read = memories.Read(mixer, cached)
    if cached:
      rows_ = PartitionSpec('batch')
      return per_device.batch_local(read, batched=rows_, out=rows_)
    rows_ = sharding.BATCH_TIME
    heads = PartitionSpec(*rows_, 'heads')
    return per_device.batch_local(
        read,
        batched=(rows_, rows_, rows_, rows_, None, heads, rows_),
        shared=maps.local(
            memories.rule_of(mixer), weights,
            not mixer.single_kv_proj and mixer.num_memories + mixer.shared > 1),
        out=(heads, None, rows_, heads))

  def _forced(self, scores_BTM, valid_BT, router_M):
    """A selection with wrong decisions, where the caller wants some."""
    mixer = self.cfg.mixer
    if not self.has_variable('errors', 'error_prob') or mixer.num_memories == 1:
      return None
    chosen = memories.Read(mixer).choose(scores_BTM, valid_BT, router_M)
    return routing.with_random_errors(
        self.make_rng('errors'), self.get_variable('errors', 'error_prob'),
        memories.router_of(mixer), chosen.selected_BTE, chosen.probs_BTE,
        memories.allowed(valid_BT, mixer.num_memories))

  def _gated(self, o_BTHV, past_BTHV, x_BTD, modality_BT):
    """Norm, what joins past it, and the output gate."""
    mixer, D = self.cfg.mixer, self.cfg.width
    H, V, kind = mixer.num_heads, mixer.value_dim, mixer.output_gate
    gate_BTHV, copies = None, self.cfg.num_modality_copies
    if kind not in ('none', 'own'):
      if mixer.gate_rank:
        x_BTD = layers.Einsum(
            'btd,dr->btr', (D, mixer.gate_rank), ('embed', None),
            init=layers.mom_init, modalities=copies, name='gate_in',
        )(x_BTD, modality_BT)
        if kind == 'inner_sigmoid':
          x_BTD = jax.nn.sigmoid(x_BTD)
        D = mixer.gate_rank
      gate_BTHV = layers.Einsum(
          'btd,dhv->bthv', (D, H, V),
          (None if mixer.gate_rank else 'embed', 'heads', 'kv'),
          init=layers.mom_init, modalities=copies, name='gate',
      )(x_BTD, modality_BT)
      if kind.startswith('silu'):
        gate_BTHV = jax.nn.silu(gate_BTHV)
      elif kind == 'sigmoid':
        gate_BTHV = jax.nn.sigmoid(gate_BTHV)
    eps = mixer.norm_eps or self.cfg.norm_eps
    norm = functools.partial(
        layers.ReadNorm(mixer.output_norm, eps, copies, name='norm'),
        modality_BT=modality_BT)
    if kind == 'own':
      return norm(jax.nn.silu(o_BTHV))
    if kind == 'silu_first':
      return norm(o_BTHV * gate_BTHV)
    o_BTHV = norm(o_BTHV)
    if past_BTHV.shape[-1]:
      o_BTHV = o_BTHV + past_BTHV
    return o_BTHV if gate_BTHV is None else o_BTHV * gate_BTHV

  def _weights(
      self, dtype: Any, layer: LayerValues, cached: bool
  ) -> maps.Weights:
    """Makes the parameters that `memories.Read` uses."""
    mixer, D = self.cfg.mixer, self.cfg.width
    H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
    rule, n = memories.rule_of(mixer), mixer.num_householder
    U, ranks = mixer.key_heads or H, memories.ranks(mixer, D)
    G = 1 if mixer.single_kv_proj else mixer.num_memories + mixer.shared
    param = lambda name, shape, axes, init=layers.mom_init: layers.param(
        self, name, shape, axes, init)
    # Stacks of maps: of memories, and in an untied model of modalities.
    copies = self.cfg.num_modality_copies
    own = (copies,) if copies else ()
    stack, S = ('modality',) * len(own), math.prod(own)
    heads, memory = ('heads', 'kv'), ('memory', *stack)
    placement = memories.placement_of(mixer, cached)

    def lay(name, shape, axes):
      """[G, S, ...], in the order of ranks."""
      w = param(name, (G, *own, *shape), (*memory, *axes)).astype(dtype)
      w = w if mixer.single_kv_proj else placement.to_rank_order(w)
      return w.reshape(-1, S, *shape)

    query = param('query', (*own, D, U, K), (*stack, 'embed', *heads))
    by_memory = {
        name: lay(name, (D, *size), ('embed', *heads))
        for name, size in (('key', (U * n, K)), ('value', (H * n, V)))
    }
    second = {}
    for name, gate in rule.gates.items():
      rank = ranks.get(name)
      out = (H * n if gate.per_update else H, *gate.size(K, V))
      axes = heads[: len(out)]
      if rank:
        by_memory[name] = lay(f'{name}_in', (D, rank), ('embed', None))
        second[name] = lay(f'{name}_out', (rank, *out), (None, *axes))
      else:
        by_memory[name] = lay(name, (D, *out), ('embed', *axes))
    conv, bias = memories.conv_parts(mixer), {}
    conv_w = {
        name: param(f'conv_{name}', (mixer.conv_width, *size), (None, *heads),
                    layers.conv_init).astype(dtype)
        for name, size in conv.items()}
    if mixer.conv_bias:
      zeros = nn.initializers.zeros_init()
      bias = {
          name: param(f'conv_{name}_bias', size, heads, zeros).astype(dtype)
          for name, size in conv.items()}
    constants = dict(layer)
    for name, constant in rule.constants.items():
      shape = constant.shape(H, K, V)
      init = lambda key, shape, c=constant: c.init(
          key, shape, layer['layer_fraction'])
      axes = (None,) * len(shape)
      if constant.per_head:
        axes = (*heads[: len(shape)], *axes[2:])
      constants[name] = param(name, shape, axes, init)
    router, router_M = memories.router_of(mixer), None
    if router.state and mixer.num_memories > 1:
      first = lambda key, shape: router.state.init(shape[0])
      router_M = jax.lax.stop_gradient(
          param(router.state.name, (mixer.num_memories,), (None,), first))
    shares = None
    if rule.shift:
      shares = shift.shares(
          self, rule, shift.maps(rule), D, layer['layer_fraction'], dtype)
    return maps.Weights(
        query.reshape(S, D, U, K).astype(dtype), by_memory, second, conv_w,
        bias, shares, constants, router_M)

  def _aux(self, scores_BTM, valid_BT, route, router_M) -> outputs.LayerAux:
    mixer, router = self.cfg.mixer, memories.router_of(self.cfg.mixer)
    if mixer.num_memories == 1:
      return outputs.no_router()
    state = {}
    if router_M is not None:
      inputs = memories.router_inputs(
          jax.lax.stop_gradient(scores_BTM), valid_BT, router_M)
      state[router.state.name] = router.state.update(
          inputs, route.selected_BTM, memories.router_settings(mixer))
    probs_BTM, selected_BTM = route.probs_BTM, route.selected_BTM
    load_M, mean_prob_M = balance.load_and_mean_prob(
        probs_BTM, selected_BTM, valid_BT)
    stats = routing.RouterStats(
        selected_BTM,
        balance.entropy(probs_BTM, valid_BT),
        load_M,
        mean_prob_M,
        balance.sample_loss(route.weight_BTM, selected_BTM, valid_BT),
        balance.z_loss(scores_BTM, valid_BT),
    )
    return outputs.LayerAux(jnp.zeros((), jnp.float32), state, stats)


def layer_values(
    cfg: config.Model, num_layers: int, stacked: LayerValues | None
) -> LayerValues:
  """What each of `num_layers` layers is told, [L, ...] each.

  Args:
    stacked: the rule's parameters across layers; None takes zeros.
  """
  rule, mixer = memories.rule_of(cfg.mixer), cfg.mixer
  if stacked is None:
    stacked = {
        name: jnp.zeros((num_layers, *c.shape(
            mixer.num_heads, mixer.key_dim, mixer.value_dim)))
        for name, c in rule.cross_layer.items()}
  return rules.layer_values(rule, stacked, num_layers)


def first_values(
    cfg: config.Model, x_BTD: jax.Array
) -> dict[str, jax.Array]:
  """What 'first' of `layer` begins with, before any layer; {} if none asks.

  Raises:
    ValueError: some blocks do not get all tokens.
  """
  mixer = cfg.mixer
  if not any(name == 'mom' for name, _ in cfg.unit) or (
      memories.rule_of(mixer).v_first_gate is None):
    return {}
  if any(cfg.mod_blocks):
    raise ValueError(
        f'config.model.pattern={cfg.pattern!r} has mod/ blocks, which see a'
        f' part of the tokens; rule={mixer.rule!r} mixes the values of every'
        ' token with those of the first block, so leave mod/ out.'
    )
  shape = (*x_BTD.shape[:2], mixer.num_heads, mixer.value_dim)
  return {'first': jnp.zeros(shape, x_BTD.dtype)}


def init_cache(cfg: config.Model, batch: int) -> memories.Cache:
  """Empty memories: states in float32, rows so far, and their last inputs."""
  mixer, rule = cfg.mixer, memories.rule_of(cfg.mixer)
  H, K, V = mixer.num_heads, mixer.key_dim, mixer.value_dim
  G = mixer.num_memories + mixer.shared
  width = (mixer.key_heads or H) * K * (1 + mixer.num_householder)
  width += H * mixer.num_householder * V
  window = (batch, G, max(mixer.conv_width - 1, 0), width)
  dtype = jnp.dtype(cfg.dtype)
  cache = {
      'state_BGHKV': jnp.zeros(
          (batch, G, H, *rule.state_shape(K, V)), jnp.float32),
      'window_BGWF': jnp.zeros(window, dtype),
      'count_BG': jnp.zeros((batch, G), jnp.int32),
  }
  if rule.shift:
    cache['before_BG1D'] = jnp.zeros((batch, G, 1, cfg.width), dtype)
    cache['last_BD'] = jnp.zeros((batch, cfg.width), dtype)
  return cache
