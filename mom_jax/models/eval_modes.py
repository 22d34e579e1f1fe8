"""Routers with which one trained model is evaluated.

Expert choice sees the future. A model trained so keeps thresholds, and may get
auxiliary routers by aux-router training; with either it is causal. The
parameters are the same; the settings differ in the names of routers alone.
"""

from __future__ import annotations

import dataclasses

from mom_jax import config, routing

_CAUSAL = {'expert_choice': 'threshold'}
_ORACLE = {name: 'expert_choice_oracle'
           for name in ('expert_choice', 'aux_causal')}
_AUX_CAUSAL = {'expert_choice': 'aux_causal'}
_THRESHOLD = {'aux_causal': 'threshold'}


def routers(cfg: config.Config) -> dict[str, str]:
  """Name the routers of 'moma' and of 'mod', where the model has them."""
  model, found = cfg.model, {}
  if any(c == 'moma' for _, c in model.unit) and max(model.moma.experts) > 1:
    found['moma'] = model.moma.router
  if any(model.mod_blocks):
    found['mod'] = model.mod.router
  return found


def is_causal(cfg: config.Config) -> bool:
  """Return True if no router sees the future."""
  return all(routing.get(name).causal for name in routers(cfg).values())


def causal(cfg: config.Config) -> config.Config:
  """Replace expert choice by thresholds."""
  return _replaced(cfg, _CAUSAL)


def oracle(cfg: config.Config) -> config.Config:
  """Replace auxiliary routers by the expert choice that they predict."""
  return _replaced(cfg, _ORACLE)


def aux_causal(cfg: config.Config) -> config.Config:
  """Replace expert choice by auxiliary routers."""
  return _replaced(cfg, _AUX_CAUSAL)


def modes(cfg: config.Config) -> dict[str, config.Config]:
  """Make the evaluation settings by name.

  'causal' is always there. A model trained with expert choice has 'noncausal'
  too, expert choice itself; one with auxiliary routers, which 'causal' uses,
  also has 'causal_threshold'.
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
