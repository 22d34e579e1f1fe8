"""Recipes load, and their models have the published numbers of parameters."""

import pathlib
import re

import pytest

from mom_jax import config, rules
from mom_jax.models import lm

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
RECIPES = sorted(p.stem for p in CONFIGS.glob('*.py'))
DENSE = ('model.pattern=attention/mlp',)
UNTIED = ('model.tie_embeddings=False',)


def _load(name, *overrides):
  file, _, mode = name.partition(':')
  path = f'{CONFIGS / file}.py' + (f':{mode}' if mode else '')
  return config.load(path, overrides)


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_loads_and_explains_itself(name):
  cfg = _load(name)
  assert config.from_mapping(config.to_config_dict(cfg).to_dict()) == cfg
  text = (CONFIGS / f'{name}.py').read_text()
  assert f'--config=configs/{name}.py' in text
  if name != 'quickstart':
    for heading in ('Source: ', 'Expected', 'Time: '):
      assert re.search(f'^{heading}', text, re.MULTILINE), heading


@pytest.mark.parametrize(
    ('name', 'overrides', 'total', 'activated'),
    [
        ('mom_380m', (), 512.4, 411.3),
        ('mom_380m', UNTIED, 545.1, 444.1),
        ('mom_1b3', (), 1552.9, 1350.8),
        ('mom_1b3', UNTIED, 1618.4, 1416.3),
    ],
)
def test_mom_parameters(name, overrides, total, activated):
  """Millions, to the digits of the published and derived counts."""
  got = lm.count_params(_load(name, *overrides))
  assert [round(n / 1e6, 1) for n in got] == [total, activated]


# Millions, total and activated.
RULE_PARAMETERS = {
    'linear': (511.1, 410.4), 'based': (344.3, 290.9),
    'rebased': (344.3, 290.9), 'retention': (511.1, 410.4),
    'lightning': (511.1, 410.4), 'decay': (511.9, 411.0),
    'mamba2': (511.9, 411.0), 'gla': (515.0, 412.8), 'hgrn2': (486.0, 385.3),
    'gsa': (517.4, 404.1), 'delta': (486.7, 385.8),
    'gated_delta': (512.4, 411.3), 'gated_delta_product': (764.7, 562.8),
    'kda': (562.2, 436.2), 'gated_delta_2': (813.4, 586.9),
    'rwkv6': (534.9, 428.0), 'rwkv7': (651.4, 487.8),
    'ttt_linear': (518.3, 417.4), 'titans': (512.8, 411.6),
}


@pytest.mark.parametrize('rule', sorted(rules.RULES))
def test_every_rule_has_a_recipe(rule):
  """Of the size of mom_380m, which is gated_delta's."""
  cfg = _load(f'rules:{rule}')
  assert cfg.model.mixer.rule == rule
  assert (cfg == _load('mom_380m')) == (rule == 'gated_delta')
  got = tuple(round(n / 1e6, 1) for n in lm.count_params(cfg))
  assert got == RULE_PARAMETERS[rule]


def test_mom_of_the_same_activated_size():
  """The paper's "400M-matched" MoM has MLPs of ratio 2 and untied ends."""
  cfg = _load('mom_380m', *UNTIED, 'model.mlp.hidden=1536')
  assert round(lm.count_params(cfg)[1] / 1e6, 1) == 406.3


@pytest.mark.parametrize(
    ('name', 'sparse', 'dense', 'digits'),
    [
        ('moma_90m', 209.7, 92.3, 1),
        ('moma_435m', 1845, 436.2, 0),
        ('moma_1b4', 7113, 1476, 0),
    ],
)
@pytest.mark.parametrize('mode', ['expert_choice', 'causal'])
def test_moma_parameters(name, mode, sparse, dense, digits):
  """Millions; the published counts leave routers out, D E a layer.

  A token's experts hold as many parameters as the dense model's MLP.
  """
  cfg = _load(f'{name}:{mode}')
  routers = cfg.model.num_layers * cfg.model.width * sum(cfg.model.moma.experts)
  total, activated = lm.count_params(cfg)
  assert round((total - routers) / 1e6, digits) == sparse
  whole, same = lm.count_params(_load(f'{name}:{mode}', *DENSE))
  assert round(whole / 1e6, 1 if dense != 1476 else 0) == dense
  assert whole == same == activated - routers


def test_hybrid_puts_attention_where_the_paper_does():
  model = _load('mom_hybrid_380m').model
  mixers = [model.unit[i % len(model.unit)][0] for i in range(model.num_layers)]
  where = [i for i, mixer in enumerate(mixers) if mixer == 'attention']
  assert where == [7, 15, 23]


def test_wrong_mode_is_a_user_error():
  with pytest.raises(config.UserError, match='causal, expert_choice'):
    _load('moma_90m:causl')
  with pytest.raises(config.UserError, match="'gated' is unknown; known: base"):
    _load('rules:gated')
