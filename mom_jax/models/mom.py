"""Mixture-of-Memories token mixer (arXiv 2502.13685)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mom_jax import routing, rules
from mom_jax.models import (
  history,
  layers,
  memories,
  memory_params,
  outputs,
  projection,
  token_shift,
)
from mom_jax.parallel import per_device, sharding
from mom_jax.routing import balance

LAST_TOKEN = 'last_BD'  # in the cache, for token shift of the output gate


class Mom(nn.Module):
  """Mixture-of-Memories: each token updates and reads few of the memories.

  A router sends a token to `top_k` of M memories; each is a linear-recurrent
  state that advances on its own tokens only. One shared memory sees all:

    o_t = sum_j w_tj q_t^(j) S_t^(m_j) + q_t S_t^shared
    y_t = (RMSNorm(o_t) * silu(x_t W_z)) W_o    W_z, W_o: gate, output

  `pallas/chunk_memory/reference.py` defines the recurrence itself, row by row;
  `rules` maps a memory-update rule to it.

  Convolution, decay and state never cross a document or a memory, in training
  as in decoding; the official code's training mode lets the convolution do so
  (and so see the future), ours has no such mode. One memory without a shared
  one is the plain layer and has no router. The collection 'errors' may hold
  'error_prob', the fraction of decisions that are wrong at random (rng
  'errors'), to see what they cost.

    layer = Mom(width=512, num_memories=4, top_k=2, num_heads=4, key_dim=128,
                router='softmax_topk_bias')
    variables = layer.init(key, x_BTD)  # {'params': ..., 'router': ...}

    def loss(params):
      y_BTD, _, aux = layer.apply(variables | {'params': params}, x_BTD)
      return task_loss(y_BTD) + aux.loss, aux.state

    grads, state = jax.grad(loss, has_aux=True)(variables['params'])
    params = optimizer_step(variables['params'], grads)
    variables = {'params': params, 'router': state}

  'router' is there only for routers that keep a state, here balance biases.

  Attributes:
    width: D of the residual stream.
    num_memories, top_k, shared: routed memories M, memories A per token, and
      whether one memory more sees every token.
    rule: memory-update rule, a key of `rules.RULES`.
    num_heads, key_heads: heads H, and those of them with queries and keys of
      their own, each shared by H / key_heads value heads; 0 is all.
    key_dim, value_dim: sizes of a head's key and value; None is key_dim.
    router: a key of `routing.ROUTERS` by which tokens pick memories.
    balance_rate: step of the balance bias of routers that have one.
    balance_weight, z_weight: of the balance loss and of mean log(Z)^2 of the
      router in `aux.loss`.
    single_kv_proj: all memories use one set of key, value and gate projections.
    num_householder: keys and values of a token, one update after another.
    conv_width, conv_bias: taps of the short convolution, 0 for none (nor the
      SiLU after it), and whether it has a bias.
    low_ranks: ranks of the rule's low-rank gates, in its order; () is as
      published.
    feature_map, normaliser: of additive rules, see `rules.get`.
    output_norm, norm_eps: norm of the output (`layers.OutputNorm`).
    output_gate, gate_rank: silu, sigmoid, inner_sigmoid, none,
      silu_before_norm or self_silu (`Mom._norm_and_gate`); rank of its
      projection, 0 for a full matrix.
    num_modality_copies: copies of projections and norms, one per modality
      (arXiv 2411.04996); 0 is one for all. States, router, convolution and the
      rule's constants are shared.
    chunk: tokens per chunk of the recurrence, a power of two.
    backend: of `pallas.chunk_memory`.
    router_collection: Flax collection of the router's state.

  Source: arXiv 2502.13685, eq. 3 to 8; `rules` for the update;
  `reference.mom_ref` is the definition, token by token.
  """

  width: int
  num_memories: int = 4
  top_k: int = 2
  shared: bool = True
  rule: str = 'gated_delta'
  num_heads: int = 4
  key_heads: int = 0
  key_dim: int = 128
  value_dim: int | None = None
  router: str = 'softmax_topk'
  balance_rate: float = 0.001
  balance_weight: float = 0.01
  z_weight: float = 0.0
  single_kv_proj: bool = False
  num_householder: int = 1
  conv_width: int = 4
  conv_bias: bool = False
  low_ranks: tuple[int, ...] = ()
  feature_map: str = 'identity'
  normaliser: bool = False
  output_norm: str = 'head'
  norm_eps: float = 1e-6
  output_gate: str = 'silu'
  gate_rank: int = 0
  num_modality_copies: int = 0
  chunk: int = 64
  backend: str = 'auto'
  router_collection: str = 'router'

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      cache: history.Cache | None = None,
      segment_BT: Int[Array, 'B T'] | None = None,
      modality_BT: Int[Array, 'B T'] | None = None,
      layer_info: layers.LayerInfo | None = None,
  ) -> tuple[Float[Array, 'B T D'], history.Cache | None, outputs.LayerAux]:
    """Mix tokens.

    Training has no cache; prefill and decoding are the same function with one.

    Args:
      x_BTD: normalised residual stream.
      cache: states and last rows so far (of `init_cache`), or None.
      segment_BT: document of each token; 0 marks padding, which no memory sees
        and whose output is zero. None is one document. With a cache, any other
        number continues the same document.
      modality_BT: of each token, -1 on padding; needed with
        `num_modality_copies`.
      layer_info: constants of this layer and v_first (`layers.LayerInfo`);
        None if it is the only layer.
    Returns:
      (y, cache, aux).
    """
    if segment_BT is None:
      segment_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    if layer_info is None:
      layer_info = layers.LayerInfo(only_layer(self))
    rule, router = memory_params.rule_of(self), memories.router_of(self.router)
    placement = memories.memory_placement(
        self.num_memories, self.top_k, self.shared, cache is not None)
    # One token is a chunk of 1, which selects the decoding kernels.
    chunk = min(self.chunk, 1 << (x_BTD.shape[1] - 1).bit_length())
    weights = self._weights(x_BTD.dtype, layer_info.constants, placement)
    tokens = self._tokens(
        x_BTD, cache, segment_BT, modality_BT, layer_info, weights)

    def memory_outputs(
        projections: projection.Projections, tokens: memories.MomTokens
    ) -> memories.MemoryOutput:
      """Run one device's memories; compute the outputs of its tokens."""
      local = projections.weights
      assigned, decisions = memories.assign(                  # eq. 3, 4: w_tj
          router, tokens, local.router_state_M, self.top_k, self.shared)
      rows = memories.plan_rows(tokens, assigned, placement, chunk)
      past = history.past_of(rows.layout, rows.segment_P, tokens.cache)
      projected = projections.project(rows, tokens.x_ND, past)  # eq. 5: x W_k
      inputs = projections.update_inputs(rows, projected, past)  # convolution
      inputs, v_first_BTHV = memories.move_to_v_first(
          rule, inputs, local.constants, rows, tokens.v_first_BTHV,
          self.shared)
      o_PHX, state_GHKV = memories.update(                    # eq. 6, 8: S, o
          rule, inputs, local.constants, rows, past, chunk, self.backend)
      o_BTHX = rows.combine(o_PHX)                            # eq. 7: sum w o
      cache = past.cache_after(
          {'window_BGWF': inputs.conv_input_PF,
           'before_BG1D': projected.x_PD}, state_GHKV)
      return memories.MemoryOutput(o_BTHX, cache, decisions, v_first_BTHV)

    def on_device(tokens, weights):
      projections = projection.Projections.of(self, weights)
      return memories.in_rounds(
          functools.partial(memory_outputs, projections), tokens, placement)

    run = per_device.batch_local(on_device, **self._splits(weights, cache))
    out = layers.unless_initializing(self, run)(tokens, weights)
    gate_BTD, cache = self._gate_input(
        x_BTD, segment_BT, weights.shift, cache, out.cache)
    y_BTHV = self._norm_and_gate(out.o_BTHX, gate_BTD, tokens.modality_BT)
    y_BTD = self._einsum(                                     # y = ... W_o
        'bthv,hvd->btd', (*y_BTHV.shape[2:], self.width),
        (*memory_params.HEADS, 'embed'), 'output')(y_BTHV, tokens.modality_BT)
    y_BTD = jnp.where(tokens.valid_BT[..., None], y_BTD, 0)
    aux = layers.unless_initializing(self, self._aux)(tokens, out, weights)
    return y_BTD, cache, aux

  def init_cache(
      self, batch: int, dtype: Any = jnp.float32
  ) -> history.Cache:
    """Make the cache of memories that took no rows; its size is fixed.

    Args:
      dtype: of the activations.
    Returns:
      A dict, with G = M + shared:
        state_BGHKV: states, float32 [B, G, H, *rule.state_shape(K, V)].
        window_BGWF: last conv_width - 1 inputs of each memory's convolution:
          F = U K (1 + n) + H n V columns of queries, keys and values, for U
          heads with keys of their own and n updates per token.
        count_BG: rows that each memory took, int32. It never starts again: all
          rows of a cache are one document.
        before_BG1D, last_BD: with token shift only, the last row of each memory
          and the last token.
    """
    rule = memory_params.rule_of(self)
    H, U, K, V, n = memory_params.HeadSizes.of(self)
    G, F = self.num_memories + self.shared, U * K * (1 + n) + H * n * V
    cache = {
        'state_BGHKV': jnp.zeros(
            (batch, G, H, *rule.state_shape(K, V)), jnp.float32),
        'window_BGWF': jnp.zeros(
            (batch, G, max(self.conv_width - 1, 0), F), dtype),
        'count_BG': jnp.zeros((batch, G), jnp.int32),
    }
    if rule.shift:
      cache['before_BG1D'] = jnp.zeros((batch, G, 1, self.width), dtype)
      cache[LAST_TOKEN] = jnp.zeros((batch, self.width), dtype)
    return cache

  def _tokens(
      self, x_BTD, cache, segment_BT, modality_BT, layer_info, weights):
    """Compute the router logits of the tokens, eq. 3."""
    logits_BTM = jnp.zeros((*x_BTD.shape[:2], 1), jnp.float32)
    if self.num_memories > 1:
      logits_BTM = layers.Einsum(
          'btd,dm->btm', (self.width, self.num_memories), ('embed', None),
          init=layers.mom_init, dtype=jnp.float32, name='router',
      )(x_BTD)
    if not self.num_modality_copies:
      modality_BT = None
    if cache is not None:
      cache = {k: v for k, v in cache.items() if k != LAST_TOKEN}
    tokens = memories.MomTokens(
        x_BTD, logits_BTM, segment_BT, modality_BT, layer_info.v_first_BTHV,
        None, cache)
    tokens = jax.tree.map(jnp.asarray, tokens)  # no numpy arrays
    return tokens._replace(
        forced=self._forced(tokens, weights.router_state_M))

  def _forced(self, tokens, router_state_M):
    """Make a selection with random errors; None if no errors are asked for."""
    if not self.has_variable('errors', 'error_prob') or self.num_memories == 1:
      return None
    router = memories.router_of(self.router)
    chosen = memories.ask_router(router, tokens, router_state_M, self.top_k)
    return routing.with_random_errors(
        self.make_rng('errors'), self.get_variable('errors', 'error_prob'),
        router, chosen.selected_BTE, chosen.probs_BTE,
        routing.RouterInputs(tokens.logits_BTM, memories.allowed(tokens)))

  def _weights(self, dtype, constants, placement) -> memory_params.Weights:
    """Make the parameters of the memories."""
    copies = self.num_modality_copies
    table = memory_params.table(
        self, self.width, copies, constants['layer_fraction'])
    params = {name: layers.param(self, name, *spec)
              for name, spec in table.items()}
    router, router_state_M = memories.router_of(self.router), None
    if router.state and self.num_memories > 1:
      router_state_M = layers.router_state(
          self, self.router_collection, router.state.name, self.num_memories,
          router.state.init)
    shift = token_shift.coefficients(
        self, memory_params.rule_of(self), self.width,
        constants['layer_fraction'], dtype)
    return memory_params.weights_of(
        params, self, copies, placement, dtype, constants, shift,
        router_state_M)

  def _splits(self, weights, cache) -> dict[str, Any]:
    """Name the axes that `batch_local` splits tokens, weights and result along.

    With a cache only the batch is split.
    """
    if cache is not None:
      batch = PartitionSpec('batch')
      return dict(batched=batch, out=batch)
    for name in ('num_heads', 'key_heads'):
      sharding.split_size(
          'heads', getattr(self, name), f'config.model.mixer.{name}')
    tokens = sharding.BATCH_TIME
    heads = PartitionSpec(*tokens, 'heads')
    per_memory = not self.single_kv_proj and self.num_memories + self.shared > 1
    return dict(
        batched=memories.MomTokens(
            x_BTD=tokens, logits_BTM=tokens, segment_BT=tokens,
            modality_BT=tokens, v_first_BTHV=heads, forced=tokens, cache=None),
        shared=memory_params.split(
            memory_params.rule_of(self), weights, per_memory),
        out=memories.MemoryOutput(
            o_BTHX=heads, cache=None, decisions=tokens, v_first_BTHV=heads))

  def _gate_input(self, x_BTD, segment_BT, shift, old, cache):
    """Return the output gate's input, and the cache with the last token."""
    if shift is None:
      return x_BTD, cache
    last_BD = None if old is None else old[LAST_TOKEN]
    before_BTD, last_BD = history.token_before(x_BTD, segment_BT, last_BD)
    if cache is not None:
      cache = cache | {LAST_TOKEN: last_BD}
    return token_shift.mix(x_BTD, before_BTD, shift)['output'], cache

  def _norm_and_gate(self, o_BTHX, x_BTD, modality_BT):
    """Normalise the output, add the rule's skip, apply the gate."""
    V, kind = self.value_dim or self.key_dim, self.output_gate
    o_BTHV, skip_BTHV = o_BTHX[..., :V], o_BTHX[..., V:]
    gate_BTHV = self._gate(x_BTD, modality_BT)
    norm = functools.partial(
        layers.OutputNorm(
            self.output_norm, self.norm_eps, self.num_modality_copies,
            name='norm'),
        modality_BT=modality_BT)
    if kind == 'self_silu':
      return norm(jax.nn.silu(o_BTHV))
    if kind == 'silu_before_norm':
      return norm(o_BTHV * gate_BTHV)
    o_BTHV = norm(o_BTHV)
    if skip_BTHV.shape[-1]:
      o_BTHV = o_BTHV + skip_BTHV
    return o_BTHV if gate_BTHV is None else o_BTHV * gate_BTHV

  def _gate(self, x_BTD, modality_BT):
    """Compute the output gate [B, T, H, V]; None if x has no part in it."""
    kind, D, r = self.output_gate, self.width, self.gate_rank
    if kind in ('none', 'self_silu'):
      return None
    if r:
      x_BTD = self._einsum(
          'btd,dr->btr', (D, r), ('embed', None), 'gate_in')(
              x_BTD, modality_BT)
      if kind == 'inner_sigmoid':
        x_BTD = jax.nn.sigmoid(x_BTD)
    H, V = self.num_heads, self.value_dim or self.key_dim
    gate_BTHV = self._einsum(
        'btd,dhv->bthv', (r or D, H, V),
        (None if r else 'embed', *memory_params.HEADS), 'gate')(
            x_BTD, modality_BT)
    if kind.startswith('silu'):
      return jax.nn.silu(gate_BTHV)
    return jax.nn.sigmoid(gate_BTHV) if kind == 'sigmoid' else gate_BTHV

  def _einsum(self, eq, shape, axes, name) -> layers.Einsum:
    return layers.Einsum(
        eq, shape, axes, init=layers.mom_init,
        modalities=self.num_modality_copies, name=name)

  def _aux(self, tokens, out, weights) -> outputs.LayerAux:
    """Compute the router's statistics, losses and next state."""
    router, decisions = memories.router_of(self.router), out.decisions
    if self.num_memories == 1:
      return outputs.no_router()._replace(v_first_BTHV=out.v_first_BTHV)
    state = {}
    if weights.router_state_M is not None:
      inputs = routing.RouterInputs(
          jax.lax.stop_gradient(tokens.logits_BTM), memories.allowed(tokens),
          weights.router_state_M)
      state[router.state.name] = router.state.update(
          inputs, decisions.selected_BTM, routing.RouterSettings(
              top_k=self.top_k, update_rate=getattr(self, router.state.rate)))
    stats = balance.router_stats(
        tokens.logits_BTM, decisions.probs_BTM, decisions.selected_BTM,
        decisions.weight_BTM, tokens.valid_BT)
    loss = balance.router_loss(stats, self.balance_weight, self.z_weight)
    return outputs.LayerAux(loss, state, stats, out.v_first_BTHV)


def only_layer(settings: memory_params.Settings) -> dict[str, jax.Array]:
  """Make the constants of a model's only layer."""
  return jax.tree.map(lambda a: a[0], layer_values(settings, 1, None))


def layer_values(
    settings: memory_params.Settings,
    num_layers: int,
    stacked: dict[str, jax.Array] | None,
) -> dict[str, jax.Array]:
  """Make the constants of `num_layers` layers, [L, ...] each.

  Args:
    stacked: the rule's cross-layer parameters, [L, ...] each; None takes zeros.
  """
  rule = memory_params.rule_of(settings)
  if stacked is None:
    stacked = {
        name: jnp.zeros((num_layers, *shape))
        for name, (shape, _, _) in memory_params.cross_layer(settings).items()}
  return rules.layer_values(rule, stacked, num_layers)
