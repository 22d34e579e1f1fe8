"""Mixture of modality-aware experts, a channel mixer (arXiv 2407.21770)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from mom_jax import balance, config, dispatch, pallas, routing, sharding
from mom_jax.models import layers


class Weights(NamedTuple):
  """Parameters of the experts in the activations' type, and router state."""

  gate_up_EDX: jax.Array  # gate and up side by side, X = 2 F
  down_EFD: jax.Array
  state_E: jax.Array | None


class Moma(nn.Module):
  """Each modality has a group of SwiGLU experts; a router picks within it.

    y_t = sum_j w_tj (silu(x_t W_gate^j) * (x_t W_up^j)) W_down^j

  over the experts j of the token's modality that take it; a token that none
  takes gets 0. Experts never see another modality. With one expert a modality
  ("1t1i") there is nothing to route: no router, weight 1, an FFN per modality.

  Router state is a parameter named as `Router.buffer` says, without gradient;
  its next value is in `aux['buffers']`, from this batch and for the next. It is
  computed without the noise, which inference does not have.

  Source: arXiv 2407.21770, eq. 1 to 5, where expert choice routes and a second
  network stands in at inference; the causal routers, which need none, are ours.
  """

  cfg: config.Model

  @nn.compact
  def __call__(
      self, x_BTD: Float[Array, 'B T D'], modality_BT: Int[Array, 'B T']
  ) -> tuple[Float[Array, 'B T D'], dict[str, Any]]:
    """Mixes channels.

    Args:
      x_BTD: input of the experts.
      modality_BT: modality of each input token; -1 marks padding, which no
        expert takes and whose output is 0.
    Returns:
      (y, aux): `aux['selected_BTE']` says which experts took a token, `entropy`
      is the router's, in nats, `buffers` the next router state by name.
    """
    moma, D, E = self.cfg.moma, self.cfg.width, sum(self.cfg.moma.experts)
    router = routing.get(moma.router, 'config.model.moma.router')
    logits_BTE = scores_BTE = state_E = None
    if max(moma.experts) > 1:
      logits_BTE = scores_BTE = layers.Einsum(
          'btd,de->bte', (D, E), ('embed', None), dtype=jnp.float32,
          name='router',
      )(x_BTD)
      if moma.noise and self.has_rng('routing'):
        scores_BTE = routing.add_noise(self.make_rng('routing'), logits_BTE)
      if router.buffer:
        init = lambda key, shape: router.init_state(shape[0])
        state_E = jax.lax.stop_gradient(
            layers.param(self, router.buffer, (E,), (None,), init))
    run = sharding.batch_local(functools.partial(_experts, moma))
    y_BTD, route = run(
        (x_BTD, scores_BTE, modality_BT), self._weights(x_BTD.dtype, state_E)
    )
    aux = {
        'selected_BTE': route['selected_BTE'],
        'entropy': balance.entropy(route['probs_BTE'], modality_BT >= 0),
        'buffers': {},
    }
    if state_E is not None:
      rate = {'balance_bias': moma.balance_rate,
              'threshold': moma.threshold_rate}
      aux['buffers'][router.buffer] = router.update(
          state_E, jax.lax.stop_gradient(logits_BTE),
          _allowed(modality_BT, moma.experts), route['selected_BTE'],
          rate=rate[router.buffer], top_k=moma.top_k, capacity=moma.capacity,
          groups=moma.experts,
      )
    return y_BTD, aux

  def _weights(self, dtype: Any, state_E: jax.Array | None) -> Weights:
    D, F, E = self.cfg.width, self.cfg.moma.hidden, sum(self.cfg.moma.experts)
    gate_up_ED2F = layers.param(
        self, 'gate_up', (E, D, 2, F), ('expert', 'embed', None, 'mlp'),
        layers.normal_init)
    down_EFD = layers.param(
        self, 'down', (E, F, D), ('expert', 'mlp', 'embed'),
        layers.normal_init)
    return Weights(
        gate_up_ED2F.reshape(E, D, 2 * F).astype(dtype),
        down_EFD.astype(dtype), state_E,
    )


def _experts(moma: config.Moma, batched, weights: Weights):
  """Route, group, run the experts and combine, for one shard."""
  x_BTD, scores_BTE, modality_BT = batched
  B, T, D = x_BTD.shape
  N, E = B * T, sum(moma.experts)
  if scores_BTE is None:
    assignment = _one_each(modality_BT, moma.experts)
  else:
    assignment = routing.get(moma.router).route(
        scores_BTE, _allowed(modality_BT, moma.experts), weights.state_E,
        top_k=moma.top_k, capacity=moma.capacity, pool=moma.pool,
        groups=moma.experts,
    )
  layout = dispatch.group(
      assignment.row_R, assignment.group_R, num_tokens=N, num_groups=E,
      choices=assignment.choices,
  )
  matmul = functools.partial(
      pallas.grouped_matmul, group_sizes=layout.count_G, backend=moma.backend)
  x_PD = dispatch.take(x_BTD.reshape(N, D), layout)
  gate_PF, up_PF = jnp.split(matmul(x_PD, weights.gate_up_EDX), 2, axis=1)
  y_PD = matmul(jax.nn.silu(gate_PF) * up_PF, weights.down_EFD)
  y_ND = dispatch.ungroup(y_PD, layout, assignment.weight_R, N)
  return y_ND.reshape(B, T, D), assignment.aux


def _allowed(modality_BT, experts):
  """Which experts a token may use: those of its modality."""
  modality_E = np.repeat(np.arange(len(experts)), experts)
  return modality_BT[..., None] == jnp.asarray(modality_E)[None, None]


def _one_each(modality_BT, experts) -> routing.Assignment:
  """The only expert of a token's modality, with weight 1."""
  allowed_BTE = _allowed(modality_BT, experts)
  valid_N = allowed_BTE.any(-1).reshape(-1)
  return routing.Assignment(
      jnp.arange(valid_N.size),
      jnp.where(valid_N, modality_BT.reshape(-1), -1),
      valid_N.astype(jnp.float32),
      {'selected_BTE': allowed_BTE,
       'probs_BTE': allowed_BTE.astype(jnp.float32)},
      1,
  )
