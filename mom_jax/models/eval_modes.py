"""The routers under which one trained model runs.

Expert choice sees the future. A model trained so keeps thresholds, and may get
auxiliary routers in a second stage of training; with either it is causal. The
parameters are the same, the settings differ in the names of routers alone.
"""

from __future__ import annotations

import dataclasses

from mom_jax import config, routing

_CAUSAL = {'expert_choice': 'threshold'}
_ORACLE = {name: 'expert_choice_oracle'
           for name in ('expert_choice', 'aux_causal')}
_SECOND_STAGE = {'expert_choice': 'aux_causal'}
_THRESHOLD = {'aux_causal': 'threshold'}


def routers(cfg: config.Config) -> dict[str, str]:
  """Routers of experts and depth that have something to decide."""
  model, found = cfg.model, {}
  if any(c == 'moma' for _, c in model.unit) and max(model.moma.experts) > 1:
    found['moma'] = model.moma.router
  if any(model.depths):
    found['depth'] = model.depth.router
  return found


def is_causal(cfg: config.Config) -> bool:
  """Whether no router of experts or depth sees the future."""
  return all(routing.get(name).causal for name in routers(cfg).values())


def causal(cfg: config.Config) -> config.Config:
  """With thresholds in place of expert choice."""
  return _replaced(cfg, _CAUSAL)


def oracle(cfg: config.Config) -> config.Config:
  """With true expert choice: what causal routers are to come near."""
  return _replaced(cfg, _ORACLE)


def second_stage(cfg: config.Config) -> config.Config:
  """With auxiliary routers in place of expert choice."""
  return _replaced(cfg, _SECOND_STAGE)


def modes(cfg: config.Config) -> dict[str, config.Config]:
  """Settings by name: 'causal', and others where experts chose in training.

  'noncausal' is true expert choice, 'causal_threshold' are thresholds where
  'causal' is auxiliary routers.
  """
  known = {'causal': causal(cfg)}
  if oracle(cfg) != cfg:
    known['noncausal'] = oracle(cfg)
  if _replaced(cfg, _THRESHOLD) != cfg:
    known['causal_threshold'] = _replaced(cfg, _THRESHOLD)
  return known


def _replaced(cfg: config.Config, names: dict[str, str]) -> config.Config:
  model = cfg.model
  for part, name in routers(cfg).items():
    settings = dataclasses.replace(
        getattr(model, part), router=names.get(name, name))
    model = dataclasses.replace(model, **{part: settings})
  return dataclasses.replace(cfg, model=model)
