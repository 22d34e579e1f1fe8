"""Mixture of modality-aware experts, a channel mixer (arXiv 2407.21770)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from mom_jax import config, pallas, routing
from mom_jax.models import auxiliary, layers, outputs
from mom_jax.parallel import all_to_all, per_device, sharding
from mom_jax.routing import balance, dispatch


class Weights(NamedTuple):
  """Parameters of the experts in the activations' type, and router state.

  By position of `Placement`, which are the experts in order where owners have
  equal shares.
  """

  gate_up_SD2F: jax.Array
  down_SFD: jax.Array
  state_E: jax.Array | None


def local(moma: config.Moma) -> Weights:
  """How they are split inside `per_device.batch_local`."""
  expert = 'expert' if sum(moma.experts) > 1 else None
  return Weights(
      PartitionSpec(expert, sharding.FSDP_SHARDED, None, 'mlp'),
      PartitionSpec(expert, 'mlp', sharding.FSDP_SHARDED), PartitionSpec())


class Moma(nn.Module):
  """Each modality has a group of SwiGLU experts; a router picks within it.

    y_t = sum_j w_tj (silu(x_t W_gate^j) * (x_t W_up^j)) W_down^j

  over the experts j of the token's modality that take it; a token that none
  takes gets 0. Experts never see another modality, unless there is one group
  that all share ("mixed", as the paper's moe_8x). With one expert a modality
  ("1t1i") there is nothing to route: no router, weight 1, an FFN per modality.
  `shared` experts take every token beside those.

  Router state is a parameter named as `Router.state` says, without gradient;
  its next value is in `aux.state`, from this batch and for the next. It is
  computed without the noise, which inference does not have. Auxiliary routers
  are parameters where `aux_causal` routes, and run wherever there are some.

  The collection 'errors' may hold 'error_prob', the share of routing decisions
  that are wrong at random (rng 'errors'), to see what they cost.

  Source: arXiv 2407.21770, eq. 1 to 5; the routers `threshold` and
  `token_choice`, which are causal without a second network, are ours.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D'], modality_BT: Int[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], outputs.LayerAux]:
    """Mixes channels.

    Args:
      x_BTD: input of the experts.
      modality_BT: modality of each input token; -1 marks padding, which no
        expert takes and whose output is 0.
    Returns:
      (y, aux).
    """
    moma, D, E = self.cfg.moma, self.cfg.width, sum(self.cfg.moma.experts)
    router = routing.get(moma.router, 'config.model.moma.router')
    allowed_BTE = allowed(modality_BT, moma.experts)
    logits_BTE = scores_BTE = state_E = auxiliary_BTE = None
    if max(moma.experts) > 1:
      logits_BTE = scores_BTE = layers.Einsum(
          'btd,de->bte', (D, E), ('embed', None), dtype=jnp.float32,
          name='router',
      )(x_BTD)
      if moma.noise and self.has_rng('routing'):
        scores_BTE = routing.add_noise(self.make_rng('routing'), logits_BTE)
      if router.state:
        init = lambda key, shape: router.state.init(shape[0])
        state_E = jax.lax.stop_gradient(
            layers.param(self, router.state.name, (E,), (None,), init))
      if router.needs_aux_logits or self.has_variable('params', 'auxiliary'):
        auxiliary_BTE = auxiliary.Auxiliary(
            moma.experts, name='auxiliary')(x_BTD)
    inputs = routing.RouterInputs(
        scores_BTE, allowed_BTE, aux_logits_BTE=auxiliary_BTE)
    run = per_device.batch_local(
        functools.partial(_experts, moma), shared=local(moma))
    y_BTD, selected_BTE, probs_BTE = run(
        (x_BTD, inputs, self._forced(inputs, state_E)),
        self._weights(x_BTD.dtype, state_E),
    )
    if moma.shared:
      y_BTD += self._shared(x_BTD, modality_BT)
    stats = routing.RouterStats(
        selected_BTE, balance.entropy(probs_BTE, modality_BT >= 0))
    if auxiliary_BTE is not None:
      stats = stats._replace(
          aux_logits_BTE=auxiliary_BTE, allowed_BTE=allowed_BTE)
    state = {}
    if state_E is not None:
      inputs = routing.RouterInputs(
          jax.lax.stop_gradient(logits_BTE), allowed_BTE, state_E)
      state[router.state.name] = router.state.update(
          inputs, selected_BTE, router_settings(moma))
    return y_BTD, outputs.LayerAux(jnp.zeros((), jnp.float32), state, stats)

  def _forced(self, inputs, state_E):
    """A selection, where it is not each shard's own affair."""
    moma = self.cfg.moma
    router = routing.get(moma.router)
    wrong = self.has_variable('errors', 'error_prob')
    # A pool that is not on one device.
    jointly = not router.causal and (
        moma.pool == 'global'
        or moma.pool == 'sequence' and sharding.axis_size('time') > 1)
    if inputs.logits_BTE is None or not (wrong or jointly):
      return None

    def choose(inputs, state_E):
      chosen = route(moma, inputs, state_E)
      return chosen.selected_BTE, chosen.probs_BTE

    if not jointly:
      choose = per_device.batch_local(choose)
    selected_BTE, probs_BTE = choose(inputs, state_E)
    if wrong:
      return routing.with_random_errors(
          self.make_rng('errors'),
          self.get_variable('errors', 'error_prob'), router,
          selected_BTE, probs_BTE, inputs.allowed_BTE)
    return routing.finalize_weights(router, selected_BTE, probs_BTE)

  def _shared(self, x_BTD, modality_BT):
    """The experts of every token, side by side as one."""
    D, F = self.cfg.width, self.cfg.moma.shared * self.cfg.moma.hidden
    h_2BTF = layers.Einsum(
        'btd,dif->ibtf', (D, 2, F), ('embed', None, 'mlp'),
        name='shared_gate_up',
    )(x_BTD)
    y_BTD = layers.Einsum(
        'btf,fd->btd', (F, D), ('mlp', 'embed'), name='shared_down',
    )(jax.nn.silu(h_2BTF[0]) * h_2BTF[1])
    return jnp.where((modality_BT >= 0)[..., None], y_BTD, 0)

  def _weights(self, dtype: Any, state_E: jax.Array | None) -> Weights:
    moma, D = self.cfg.moma, self.cfg.width
    F, E = moma.hidden, sum(moma.experts)
    gate_up_ED2F = layers.param(
        self, 'gate_up', (E, D, 2, F), ('expert', 'embed', None, 'mlp'),
        layers.normal_init)
    down_EFD = layers.param(
        self, 'down', (E, F, D), ('expert', 'mlp', 'embed'),
        layers.normal_init)
    sharding.split_size('mlp', F, 'config.model.moma.hidden')
    placement = _placement(moma)
    return Weights(
        placement.to_rank_order(gate_up_ED2F.astype(dtype)),
        placement.to_rank_order(down_EFD.astype(dtype)), state_E,
    )


def _placement(moma: config.Moma) -> all_to_all.Placement:
  """Who owns which expert: as many tokens are expected at each.

  A device does all for its tokens where there is but one expert.
  """
  E = sum(moma.experts)
  num_ranks = sharding.axis_size('expert') if E > 1 else 1
  return all_to_all.place_groups((1.0,) * E, num_ranks)


def _experts(moma: config.Moma, batched, weights: Weights):
  """Route, group, run the experts and combine, for one shard.

  Where all experts take as many tokens, known before, one batched product
  serves them; else the groups are ragged.
  """
  x_BTD, inputs, forced = batched
  B, T, D = x_BTD.shape
  N, placement = B * T, _placement(moma)
  if forced is not None:
    assignment = routing.from_mask(forced, inputs.allowed_BTE, moma.experts)
  elif inputs.logits_BTE is None:
    assignment = _one_each(inputs.allowed_BTE)
  else:
    assignment = route(moma, inputs, weights.state_E)
  capacity = None if forced is not None else _equal_room(moma, B, T)
  layout = dispatch.group(
      assignment.token_R, placement.position(assignment.group_R), num_tokens=N,
      num_groups=placement.num_positions, capacity=capacity,
      rows_per_token=assignment.rows_per_token,
  )
  y_PD = all_to_all.on_owning_ranks(
      functools.partial(_swiglu, moma, weights, capacity is not None),
      dispatch.gather(x_BTD.reshape(N, D), layout), layout, placement.num_ranks,
      capacity)
  y_ND = dispatch.ungroup(y_PD, layout, assignment.weight_R, N)
  y_ND = per_device.psum(y_ND, 'mlp')
  return (
      y_ND.reshape(B, T, D), assignment.selected_BTE, assignment.probs_BTE)


def _swiglu(moma, weights, equal, x_PD, count_G):
  """Experts on their rows, which come expert by expert."""
  G, D, _, F = weights.gate_up_SD2F.shape
  gate_up_GDX = weights.gate_up_SD2F.reshape(G, D, 2 * F)
  if not equal:
    how = dict(group_sizes=count_G, backend=moma.backend)
    h_PF = pallas.grouped_swiglu(x_PD, gate_up_GDX, **how)
    return pallas.grouped_matmul(h_PF, weights.down_SFD, **how)
  h_GrX = jnp.einsum('grd,gdx->grx', x_PD.reshape(G, -1, D), gate_up_GDX)
  gate_GrF, up_GrF = jnp.split(h_GrX, 2, 2)
  return jnp.einsum(
      'grf,gfd->grd', jax.nn.silu(gate_GrF) * up_GrF, weights.down_SFD,
  ).reshape(len(x_PD), D)


def _equal_room(moma: config.Moma, B: int, T: int) -> int | None:
  """Rows of each expert where they are the same for all, or None.

  Of one group only: how many tokens a modality has differs from batch to batch.
  A kernel that is asked for by name gets the rows as they are.
  """
  if len(moma.experts) > 1 or moma.backend != 'auto':
    return None
  if moma.experts == (1,):
    return B * T
  if routing.get(moma.router).causal:
    return None
  pools, tokens = (B, T) if moma.pool == 'sequence' else (1, B * T)
  return pools * routing.max_tokens_per_expert(
      tokens, moma.capacity, *moma.experts)


def route(
    moma: config.Moma, inputs: routing.RouterInputs, state_E: jax.Array | None
) -> routing.Assignment:
  """Asks the router."""
  return routing.get(moma.router).route(
      inputs._replace(state_E=state_E), router_settings(moma))


def router_settings(moma: config.Moma) -> routing.RouterSettings:
  """Settings of the experts' router."""
  state = routing.get(moma.router).state
  rates = {'balance_bias': moma.balance_rate, 'threshold': moma.threshold_rate}
  return routing.RouterSettings(
      moma.top_k, moma.capacity, moma.pool, moma.experts,
      rates[state.name] if state else 0.0)


def allowed(
    modality: Int[Array, 'B T'], experts: tuple[int, ...]
) -> Bool[Array, 'B T E']:
  """Which experts a token may use: those of its modality, or of the one group.
  """
  if len(experts) == 1:
    valid_BT1 = (modality >= 0)[..., None]
    return jnp.broadcast_to(valid_BT1, (*modality.shape, experts[0]))
  modality_E = np.repeat(np.arange(len(experts)), experts)
  return modality[..., None] == jnp.asarray(modality_E)[None, None]


def _one_each(allowed_BTE) -> routing.Assignment:
  """The only expert that a token may use, with weight 1."""
  N, E = allowed_BTE.shape[0] * allowed_BTE.shape[1], allowed_BTE.shape[2]
  allowed_NE = allowed_BTE.reshape(N, E)
  valid_N = allowed_NE.any(-1)
  return routing.Assignment(
      jnp.arange(N),
      jnp.where(valid_N, jnp.argmax(allowed_NE, -1), -1),
      valid_N.astype(jnp.float32),
      allowed_BTE,
      allowed_BTE.astype(jnp.float32),
      1,
  )
