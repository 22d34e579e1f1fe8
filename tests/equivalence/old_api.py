"""What the comparison calls of the old package; this file never changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mom_jax import config, models, sharding, step
from mom_jax.data import pipeline
from mom_jax.models import modes


def load(recipe, overrides):
  return config.load(recipe, overrides)


def settings(cfg):
  return {key: value for key, value, _ in config.settings(cfg)}


def mesh(cfg, devices):
  return sharding.make_mesh(**cfg.mesh.sizes, devices=devices)


def init(cfg, key):
  return step.unbox(models.init_params(cfg, key))


def abstract_params(cfg):
  return jax.eval_shape(lambda: init(cfg, jax.random.key(0)))


def causal(cfg):
  return modes.causal(cfg)


def logits(cfg, params, tokens, modality, segment):
  out = models.LM(cfg).apply({'params': params}, tokens, modality, segment)
  return out.logits


def cache(cfg, batch, max_len):
  return models.init_cache(cfg, batch, max_len)


def with_cache(cfg, params, tokens, modality, valid, cache):
  out = models.LM(cfg).apply(
      {'params': params}, tokens, modality, valid, cache)
  return out.logits, out.cache


def batch(tokens, modality, segment, weight):
  return pipeline.Batch(tokens, modality, segment, weight)


def train_step(cfg, mesh, params, batch):
  """(state, metrics) of the first step."""
  _, abstract = step.init(cfg, mesh)
  state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract)
  copied = None if state.ema is None else jax.tree.map(jnp.copy, params)
  state = state._replace(params=params, ema=copied)
  state = jax.tree.map(
      lambda x, s: jax.device_put(x, s.sharding), state, abstract)
  batch = sharding.shard_batch(batch, mesh)
  return step.make_step(cfg, abstract)(state, batch)
