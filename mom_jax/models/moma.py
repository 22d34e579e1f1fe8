"""Mixture of modality-aware experts, a channel mixer (arXiv 2407.21770)."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mom_jax import pallas, routing
from mom_jax.models import auxiliary, layers, outputs
from mom_jax.parallel import all_to_all, per_device, sharding
from mom_jax.routing import balance, dispatch


class MomaTokens(NamedTuple):
  """A layer's tokens with a selection, or with the inputs of the router.

  Attributes:
    router_inputs: inputs of the router, but for its state.
    forced: a selection in place of the router's, or None.
  """

  x_BTD: Float[Array, 'B T D']
  router_inputs: routing.RouterInputs
  forced: routing.Selection | None


class Weights(NamedTuple):
  """Parameters of the experts in the activations' type, and router state.

  Experts are in the order of `all_to_all.Placement`.
  """

  gate_up_GD2F: jax.Array
  down_GFD: jax.Array
  state_E: jax.Array | None


class Mixed(NamedTuple):
  """Output of the routed experts and the assignment that made it."""

  y_BTD: Float[Array, 'B T D']
  selected_BTE: Bool[Array, 'B T E']
  probs_BTE: Float[Array, 'B T E']


class Moma(nn.Module):
  """SwiGLU experts in modality groups, with a router within each group.

    y_t = sum_e g_te SwiGLU_e(x_t)

  over the experts e of the token's modality that take it; a token that none
  takes gets 0. Experts never see another modality, unless all share one
  modality group ("mixed", as the paper's moe_8x). With one expert per modality
  ("1t1i") there is nothing to route: no router, weight 1, an FFN per modality.

    layer = Moma(width=512, experts=(4, 4), hidden=1024)
    variables = layer.init(key, x_BTD, modality_BT)   # 'params' and 'router'
    y_BTD, aux = layer.apply(variables, x_BTD, modality_BT)
    loss = task_loss(y_BTD) + aux.loss
    variables['router'] = aux.state                   # after the step

  Router state has no gradient (`mom.Mom` shows a complete step); `aux.state` is
  that of the next step, computed without the noise, which inference does not
  have. Auxiliary routers are parameters where `aux_causal` routes, and run
  wherever there are some.

  The collection 'errors' may hold 'error_prob', the fraction of routing
  decisions that are wrong at random (rng 'errors'), to see what they cost.

  Attributes:
    width: D of the residual stream.
    experts: number of experts of each modality group, in order; a single
      number is one modality group, which all modalities share.
    hidden: F of each expert; None is 8/3 D.
    shared: experts beside these that take every token, with weight 1.
    router: a key of `routing.ROUTERS`.
    top_k, capacity, pool: see `routing.RouterSettings`.
    noise: Gumbel-sigmoid noise on the logits where there is an rng 'routing'.
    balance_rate, threshold_rate: steps of the balance bias and of thresholds,
      for routers that have them.
    balance_weight, z_weight: of the balance loss and of the mean log(Z)^2 of
      the router in `aux.loss`.
    backend: of `pallas.grouped_matmul`.
    router_collection: Flax collection of the router's state.

  Source: arXiv 2407.21770; the routers `threshold` and `token_choice`, which
  are causal without a second network, are ours. `reference.moma_ref` is the
  definition, token by token.
  """

  width: int
  experts: tuple[int, ...] = (4, 4)
  hidden: int | None = None
  shared: int = 0
  router: str = 'token_choice'
  top_k: int = 1
  capacity: float = 1.0
  pool: str = 'sequence'
  noise: bool = False
  balance_rate: float = 0.001
  threshold_rate: float = 0.01
  balance_weight: float = 0.0
  z_weight: float = 0.0
  backend: str = 'auto'
  router_collection: str = 'router'

  @nn.compact
  def __call__(
      self,
      x_BTD: Float[Array, 'B T D'],
      modality_BT: Int[Array, 'B T'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], outputs.LayerAux]:
    """Mix channels.

    Args:
      x_BTD: input of the experts.
      modality_BT: modality of each token; -1 marks padding, which no expert
        takes and whose output is 0. None is 0 everywhere.
    Returns:
      (y, aux).
    """
    x_BTD = jnp.asarray(x_BTD)
    if modality_BT is None:
      modality_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
    modality_BT = jnp.asarray(modality_BT)
    router, settings = self._router(), self._settings()
    inputs = self._inputs(x_BTD, modality_BT)             # a = x W_g
    noisy = self._with_noise(inputs)                      # a + G' - G'', eq. 5
    tokens = MomaTokens(
        x_BTD, noisy._replace(state_E=None), self._forced(noisy, settings))
    weights = self._weights(x_BTD.dtype, inputs.state_E)
    placement = _placement(sum(self.experts))

    def experts_on_device(tokens: MomaTokens, weights: Weights) -> Mixed:
      """Run the tokens of one device through experts on any device."""
      B, T, D = tokens.x_BTD.shape
      assignment = _assign(                               # g_te, eq. 1
          router, tokens, weights.state_E, settings)
      capacity = self._equal_capacity(tokens)
      layout = dispatch.group(                            # S_e, by expert
          assignment.token_R, placement.rank_slot(assignment.group_R),
          num_tokens=B * T, num_groups=placement.num_slots,
          capacity=capacity, rows_per_token=assignment.rows_per_token)
      x_PD = dispatch.gather(tokens.x_BTD.reshape(B * T, D), layout)

      def experts(x_PD, count_G):
        swiglu = _ragged_swiglu if capacity is None else _equal_swiglu
        return swiglu(x_PD, count_G, weights, self.backend)

      y_PD = all_to_all.on_owning_ranks(                  # SwiGLU_e(x_t)
          experts, x_PD, layout, placement.num_ranks, capacity)
      y_ND = dispatch.ungroup(                            # sum_e g_te ...
          y_PD, layout, assignment.weight_R, B * T)
      y_ND = per_device.psum(y_ND, 'mlp')
      return Mixed(y_ND.reshape(B, T, D), assignment.selected_BTE,
                   assignment.probs_BTE)

    run = per_device.batch_local(
        experts_on_device, shared=_weight_specs(sum(self.experts)))
    mixed = layers.unless_initializing(self, run)(tokens, weights)
    y_BTD = self._add_shared(mixed.y_BTD, x_BTD, modality_BT)
    aux = layers.unless_initializing(self, self._aux)(inputs, mixed)
    return y_BTD, aux

  def _router(self) -> routing.Router:
    """Return the router, `ONE_EXPERT` where there is nothing to route."""
    return ONE_EXPERT if max(self.experts) == 1 else routing.get(self.router)

  def _settings(self) -> routing.RouterSettings:
    """Make the router's settings."""
    state = self._router().state
    return routing.RouterSettings(
        self.top_k, self.capacity, self.pool, self.experts,
        getattr(self, state.rate) if state else 0.0)

  def _inputs(self, x_BTD, modality_BT) -> routing.RouterInputs:
    """Compute the router's inputs, without noise."""
    inputs = routing.RouterInputs(None, Moma.allowed(modality_BT, self.experts))
    router, E = self._router(), sum(self.experts)
    if router is ONE_EXPERT:
      return inputs
    logits_BTE = layers.Einsum(
        'btd,de->bte', (self.width, E), ('embed', None), dtype=jnp.float32,
        name='router')(x_BTD)
    inputs = inputs._replace(logits_BTE=logits_BTE)
    if router.state:
      inputs = inputs._replace(state_E=layers.router_state(
          self, self.router_collection, router.state.name, E,
          router.state.init))
    if router.needs_aux_logits or self.has_variable('params', 'auxiliary'):
      network = auxiliary.AuxRouter(self.experts, name='auxiliary')
      inputs = inputs._replace(aux_logits_BTE=network(x_BTD))
    return inputs

  def _with_noise(self, inputs):
    if inputs.logits_BTE is None or not (
        self.noise and self.has_rng('routing')):
      return inputs
    return inputs._replace(logits_BTE=routing.add_noise(
        self.make_rng('routing'), inputs.logits_BTE))

  def _forced(self, inputs, settings) -> routing.Selection | None:
    """Make a selection on the whole batch, where devices cannot select alone.

    That is expert choice with a pool over several devices, and random errors.
    None otherwise.
    """
    router = self._router()
    errors = self.has_variable('errors', 'error_prob')
    jointly = not router.causal and (
        self.pool == 'global'
        or self.pool == 'sequence' and sharding.axis_size('time') > 1)
    if router is ONE_EXPERT or not (errors or jointly):
      return None

    def choose(inputs, state_E):
      chosen = router.route(inputs._replace(state_E=state_E), settings)
      return chosen.selected_BTE, chosen.probs_BTE

    if not jointly:
      choose = per_device.batch_local(choose)
    chosen = choose(inputs._replace(state_E=None), inputs.state_E)
    if errors:
      return routing.with_random_errors(
          self.make_rng('errors'), self.get_variable('errors', 'error_prob'),
          router, *chosen, inputs)
    return routing.finalize_weights(router, *chosen, inputs)

  def _weights(self, dtype: Any, state_E: jax.Array | None) -> Weights:
    """Make the parameters of the routed experts."""
    D, F, E = self.width, self._hidden(), sum(self.experts)
    gate_up_ED2F = layers.param(
        self, 'gate_up', (E, D, 2, F), ('expert', 'embed', None, 'mlp'),
        layers.normal_init)
    down_EFD = layers.param(
        self, 'down', (E, F, D), ('expert', 'mlp', 'embed'),
        layers.normal_init)
    sharding.split_size('mlp', F, 'hidden')
    placement = _placement(E)
    return Weights(
        placement.to_rank_order(gate_up_ED2F.astype(dtype)),
        placement.to_rank_order(down_EFD.astype(dtype)), state_E)

  def _hidden(self) -> int:
    return self.hidden or 8 * self.width // 3

  def _equal_capacity(self, tokens: MomaTokens) -> int | None:
    """Return the rows of each expert if all have equally many, else None.

    One batched matmul then serves all experts. This needs a single modality
    group, since the tokens of a modality vary by batch; a backend named
    explicitly always gets ragged rows.
    """
    if (len(self.experts) > 1 or self.backend != 'auto'
        or tokens.forced is not None):
      return None
    B, T = tokens.x_BTD.shape[:2]
    if self.experts == (1,):
      return B * T
    if self._router().causal:
      return None
    pools, pool_size = (B, T) if self.pool == 'sequence' else (1, B * T)
    return pools * routing.max_tokens_per_expert(
        pool_size, self.capacity, *self.experts)

  def _add_shared(self, y_BTD, x_BTD, modality_BT):
    """Add the shared experts, concatenated to one."""
    if not self.shared:
      return y_BTD
    D, F = self.width, self.shared * self._hidden()
    h_2BTF = layers.Einsum(
        'btd,dif->ibtf', (D, 2, F), ('embed', None, 'mlp'),
        name='shared_gate_up')(x_BTD)
    shared_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='shared_down',
    )(jax.nn.silu(h_2BTF[0]) * h_2BTF[1])
    return y_BTD + jnp.where((modality_BT >= 0)[..., None], shared_BTD, 0)

  def _aux(self, inputs, mixed) -> outputs.LayerAux:
    """Compute losses, next state and statistics of the router."""
    router, valid_BT = self._router(), inputs.allowed_BTE.any(-1)
    stats = routing.RouterStats(
        mixed.selected_BTE, balance.entropy(mixed.probs_BTE, valid_BT))
    if inputs.aux_logits_BTE is not None:
      stats = stats._replace(
          aux_logits_BTE=inputs.aux_logits_BTE, allowed_BTE=inputs.allowed_BTE)
    loss = jnp.zeros((), jnp.float32)
    if self.balance_weight:
      loss += self.balance_weight * _balance_loss(
          mixed, inputs.allowed_BTE, self.experts)
    if self.z_weight and router is not ONE_EXPERT:
      logits_BTE = jnp.where(
          inputs.allowed_BTE, inputs.logits_BTE, jnp.finfo(jnp.float32).min)
      loss += self.z_weight * balance.z_loss(logits_BTE, valid_BT)
    state = {}
    if router.state:
      inputs = jax.lax.stop_gradient(inputs)
      state[router.state.name] = router.state.update(
          inputs, mixed.selected_BTE, self._settings())
    return outputs.LayerAux(loss, state, stats)

  @staticmethod
  def allowed(
      modality: Int[Array, 'B T'], experts: tuple[int, ...]
  ) -> Bool[Array, 'B T E']:
    """Mark the experts that a token may use: those of its modality group."""
    if len(experts) == 1:
      valid_BT1 = (modality >= 0)[..., None]
      return jnp.broadcast_to(valid_BT1, (*modality.shape, experts[0]))
    modality_E = np.repeat(np.arange(len(experts)), experts)
    return modality[..., None] == jnp.asarray(modality_E)[None, None]


def _assign(router, tokens, state_E, settings) -> routing.Assignment:
  """Assign tokens to the routed experts, by the router or as forced."""
  inputs = tokens.router_inputs._replace(state_E=state_E)
  if tokens.forced is not None:
    return routing.from_mask(
        tokens.forced, inputs.allowed_BTE, settings.experts)
  return router.route(inputs, settings)


def _only_expert(
    inputs: routing.RouterInputs, settings: routing.RouterSettings
) -> routing.Assignment:
  """Assign each token to the one expert that it may use, with weight 1."""
  del settings
  B, T, E = inputs.allowed_BTE.shape
  allowed_NE = inputs.allowed_BTE.reshape(B * T, E)
  valid_N = allowed_NE.any(-1)
  return routing.Assignment(
      jnp.arange(B * T),
      jnp.where(valid_N, jnp.argmax(allowed_NE, -1), -1),
      valid_N.astype(jnp.float32),
      inputs.allowed_BTE,
      inputs.allowed_BTE.astype(jnp.float32),
      1,
  )


# In place of a router where each modality has one expert: no logits, no state.
ONE_EXPERT = routing.Router('one_expert', _only_expert)


def _placement(num_experts: int) -> all_to_all.Placement:
  """Place the experts on expert-parallel ranks, expecting equal loads.

  With one expert only, each device keeps it for its own tokens.
  """
  num_ranks = sharding.axis_size('expert') if num_experts > 1 else 1
  return all_to_all.place_groups((1.0,) * num_experts, num_ranks)


def _weight_specs(num_experts: int) -> Weights:
  """Name the axes that `batch_local` splits the weights along."""
  expert = 'expert' if num_experts > 1 else None
  return Weights(
      PartitionSpec(expert, sharding.FSDP_SHARDED, None, 'mlp'),
      PartitionSpec(expert, 'mlp', sharding.FSDP_SHARDED), PartitionSpec())


def _ragged_swiglu(x_PD, count_G, weights, backend):
  """Run experts on rows that lie expert by expert, `count_G` of each."""
  G, D, _, F = weights.gate_up_GD2F.shape
  settings = dict(group_sizes=count_G, backend=backend)
  h_PF = pallas.grouped_swiglu(
      x_PD, weights.gate_up_GD2F.reshape(G, D, 2 * F), **settings)
  return pallas.grouped_matmul(h_PF, weights.down_GFD, **settings)


def _equal_swiglu(x_PD, count_G, weights, backend):
  """Run experts with equally many rows, by dense products."""
  del count_G, backend
  G, D, _, F = weights.gate_up_GD2F.shape
  h_GRX = jnp.einsum(
      'grd,gdx->grx', x_PD.reshape(G, -1, D),
      weights.gate_up_GD2F.reshape(G, D, 2 * F))
  gate_GRF, up_GRF = jnp.split(h_GRX, 2, 2)
  return jnp.einsum(
      'grf,gfd->grd', jax.nn.silu(gate_GRF) * up_GRF, weights.down_GFD,
  ).reshape(len(x_PD), D)


def _balance_loss(mixed, allowed_BTE, experts):
  """Average the balance losses of the modality groups."""
  losses = []
  for end, size in zip(np.cumsum(experts), experts):
    members = slice(end - size, end)
    losses.append(balance.switch_loss(*balance.load_and_mean_prob(
        mixed.probs_BTE[..., members], mixed.selected_BTE[..., members],
        allowed_BTE[..., members.start])))
  return sum(losses) / len(losses)
