"""Recipes load, and their models have the published numbers of parameters."""

import pathlib
import re

import pytest

from mom_jax import config, routing, rules
from mom_jax.data import encode, synthetic
from mom_jax.models import flops

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
RECIPES = sorted(p.stem for p in CONFIGS.glob('*.py'))
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
  got = flops.count_params(_load(name, *overrides))
  assert [round(n / 1e6, 1) for n in got] == [total, activated]


# Millions, total and activated.
RULE_PARAMETERS = {
    'linear': (492.2, 391.6), 'based': (344.3, 290.9),
    'rebased': (344.3, 290.9), 'retention': (511.1, 410.4),
    'lightning': (511.1, 410.4), 'decay': (511.9, 411.0),
    'mamba2': (398.5, 335.4), 'gla': (515.0, 412.8), 'hgrn2': (486.0, 385.3),
    'gsa': (517.4, 404.1), 'delta': (486.7, 385.8),
    'gated_delta': (512.4, 411.3), 'gated_delta_product': (764.7, 562.8),
    'kda': (562.2, 436.2), 'gated_delta_2': (813.4, 586.9),
    'rwkv6': (534.9, 428.0), 'rwkv7': (706.4, 520.8),
    'ttt_linear': (518.3, 417.4), 'titans': (512.8, 411.6),
}


@pytest.mark.parametrize('rule', sorted(rules.RULES))
def test_every_rule_has_a_recipe(rule):
  """Of the size of mom_380m, which is gated_delta's."""
  cfg = _load(f'rules:{rule}')
  assert cfg.model.mixer.rule == rule
  assert (cfg == _load('mom_380m')) == (rule == 'gated_delta')
  got = tuple(round(n / 1e6, 1) for n in flops.count_params(cfg))
  assert got == RULE_PARAMETERS[rule]


def test_mom_of_the_same_activated_size():
  """The paper's "400M-matched" MoM has MLPs of ratio 2 and untied ends."""
  cfg = _load('mom_380m', *UNTIED, 'model.mlp.hidden=1536')
  assert round(flops.count_params(cfg)[1] / 1e6, 1) == 406.3


# Blocks, width and SwiGLU width of the classes of arXiv 2407.21770, table 1,
# without and with Mixture-of-Depths; counts that it prints, rounded.
CLASSES = {
    'moma_90m': ((8, 512, 1365), (14, 512, 1365)),
    'moma_435m': ((24, 1024, 2730), (40, 1024, 2730)),
    'moma_1b4': ((24, 2048, 5461), (32, 2304, 6144)),
}
PRINTED = {
    'dense': ('92.3M', '436.2M', '1476M'),
    'moe_8x': ('209.7M', '1845M', '7113M'),
    'moe_4t4i': ('209.7M', '1845M', '7113M'),
    'mod': ('111.1M', '637.5M', '2340M'),
    'mod_moe_4t4i': ('316.6M', '2986M', '11853M'),
}
EXPERTS = {'dense': 1, 'moe_1t1i': 2, 'moe_8x': 8, 'moe_4t4i': 8, 'causal': 8,
           'mod': 1, 'mod_moe_1t1i': 2, 'mod_moe_4t4i': 8, 'mot': 2}


@pytest.mark.parametrize('file', CLASSES)
@pytest.mark.parametrize('name', EXPERTS)
def test_moma_parameters(file, name):
  """Exactly: untied embeddings of 65,536 rows, 4 D^2 of attention, experts of
  3 D F; beside them norms and routers, which published counts leave out."""
  cfg = _load(f'{file}:{name}')
  deep, experts = name.startswith('mod'), EXPERTS[name]
  L, D, F = CLASSES[file][deep]
  assert cfg.model.num_layers == L and cfg.model.width == D
  total, activated = flops.count_params(cfg)
  norms = D + L * (2 * D + 2 * cfg.model.attention.head_dim)
  routers = L * D * experts if experts == 8 else 0
  routers += deep * L // 2 * D
  copies = 2 if name == 'mot' else 1
  norms += (copies - 1) * (norms - D)
  bare = 2 * 65536 * D + L * (copies * 4 * D * D + experts * 3 * D * F)
  assert total == bare + norms + routers
  if name in PRINTED:
    printed = PRINTED[name][list(CLASSES).index(file)]
    digits = len(printed.partition('.')[2].strip('M'))
    assert f'{bare / 1e6:.{digits}f}M' == printed
  text = (CONFIGS / f'{file}.py').read_text()
  assert re.search(rf'^  {name} +{round(bare / 1e6, 1)}M|^  {name} +'
                   rf'{round(bare / 1e6)}M', text, re.MULTILINE)
  if not deep:  # a token's experts are as large as the dense model's MLP
    spare = L * (copies - 1) * (
        4 * D * D + 2 * D + 2 * cfg.model.attention.head_dim)
    assert activated == bare + norms + routers - spare - (
        L * (experts - 1) * 3 * D * F)


@pytest.mark.parametrize('file', CLASSES)
def test_models_of_a_class_train_with_nearly_the_same_flops(file):
  """But for routers; Mixture-of-Depths adds 4 to 10 % to the blocks."""
  dense = flops.forward_flops_per_token(_load(f'{file}:dense'))
  for name in ('moe_1t1i', 'mot', 'moe_8x', 'moe_4t4i', 'causal'):
    got = flops.forward_flops_per_token(_load(f'{file}:{name}'))
    assert 1 <= got / dense < 1.002
  deep = flops.forward_flops_per_token(_load(f'{file}:mod'))
  assert 0.9 < deep / dense < 1.15


def test_arms_of_the_evidence_spend_the_same_on_a_token():
  """But for routers; docs/results/moma.md compares them."""
  flop = lambda name: flops.train_flops_per_token(_load(f'moma_small:{name}'))
  dense = flop('dense')
  assert flop('moe_1t1i') == flop('mot') == dense
  for name in ('moe_8x', 'moe_4t4i', 'threshold', 'token_choice', 'upcycled'):
    assert dense < flop(name) < 1.01 * dense
  with pytest.raises(config.UserError, match="'dens' is unknown; known: dense"):
    _load('moma_small:dens')


@pytest.mark.parametrize('arm', [
    'plain', 'single_kv', 'expanded', 'keys', 'shared', 'attention', 'hybrid'
])
def test_arms_on_recall_are_as_large_to_a_token_as_mom(arm):
  """And where the state is expanded, as large a state as all of MoM's."""
  mom, other = (_load(f'recall:mixer={name}') for name in ('mom', arm))
  want, got = (flops.count_params(cfg)[1] for cfg in (mom, other))
  assert abs(got / want - 1) < 0.003
  state = lambda m: (m.num_memories + m.shared) * m.key_dim * m.value_dim
  if arm in ('expanded', 'keys', 'single_kv'):
    assert state(other.model.mixer) == state(mom.model.mixer)


@pytest.mark.parametrize('task', [
    'mqar', 'needle', 'phonebook', 'selective_copy', 'state_tracking', 'text'])
def test_tasks_on_recall_fit_their_rows_and_vocabulary(task):
  cfg = _load(f'recall:task={task},mixer=mom,memories=8,top_k=4')
  assert (cfg.model.mixer.num_memories, cfg.model.mixer.top_k) == (8, 4)
  if task == 'text':
    assert cfg.data.sources == ('kjv',)
    return
  vocabulary = encode.build_vocabulary(cfg)
  for source in cfg.data.sources:
    documents = synthetic.open_documents(source, vocabulary, 'train')
    assert documents.length_N[0] <= cfg.data.seq_len


@pytest.mark.parametrize('argument, words', [
    ('task=mqr', "task 'mqr' is unknown; known: mqar, needle"),
    ('mixer=mam', "mixer 'mam' is unknown; known: mom, single_kv"),
    ('memory=3', "'memory=3' is no argument of this recipe; write name=value,"
     ' with commas, of task, mixer, memories, top_k'),
    ('task=mqar,mom', "'mom' is no argument"),
    ('memories=few', "'memories=few' must be of type int"),
])
def test_arguments_of_recipes_are_checked(argument, words):
  with pytest.raises(config.UserError, match=re.escape(words)):
    _load(f'recall:{argument}')


def test_hybrid_puts_attention_where_the_paper_does():
  model = _load('mom_hybrid_380m').model
  mixers = [model.unit[i % len(model.unit)][0] for i in range(model.num_layers)]
  where = [i for i, mixer in enumerate(mixers) if mixer == 'attention']
  assert where == [7, 15, 23]


def test_wrong_mode_is_a_user_error():
  known = 'known: dense, moe_1t1i, moe_8x, moe_4t4i, causal, mot, mod'
  with pytest.raises(config.UserError, match=known):
    _load('moma_90m:causl')
  with pytest.raises(config.UserError, match="'gated' is unknown; known: base"):
    _load('rules:gated')


@pytest.mark.parametrize('name', sorted(routing.ROUTERS))
def test_moma_checks_the_count_that_its_router_uses(name):
  """`top_k` if tokens pick experts, `capacity` if experts pick tokens."""
  # A stage and a block that allow every router.
  common = (f'model.moma.router={name}', 'model.pattern=mod/mom/moma',
            'train.stage=aux_router', 'train.init_from=run')
  top_k = ('model.moma.experts=4,2', 'model.moma.top_k=3')
  capacity = ('model.moma.experts=1,1', 'model.moma.capacity=0.5')
  used, unused, error = capacity, top_k, 'capacity=0.5 has no effect'
  if routing.ROUTERS[name].exact_k:
    used, unused, error = top_k, capacity, 'top_k=3 exceeds the smallest'
  config.override(config.Config(), common + unused)
  with pytest.raises(config.UserError, match=f'model.moma.{error}'):
    config.override(config.Config(), common + used)
