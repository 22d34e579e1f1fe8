"""Training of auxiliary routers: they learn, and nothing else changes."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from mom_jax import config, models, routing, train
from mom_jax.data import pipeline
from mom_jax.inference import decode, sampling
from mom_jax.models import eval_modes, moma, outputs
from mom_jax.parallel import sharding
from mom_jax.training import (
  aux_router,
  checkpoint,
  metrics,
  optimizer,
  step,
)

PATTERN = 'model.pattern=mod/attention/moma'
FIRST = (PATTERN, 'model.moma.router=expert_choice', 'train.steps=2',
         'model.moma.noise=True', 'train.eval_every=0', 'checkpoint.every=9')


@pytest.fixture(scope='module', autouse=True)
def one_device():
  patch = pytest.MonkeyPatch()
  mesh = sharding.make_mesh(1, 1, devices=jax.devices()[:1])
  patch.setattr(sharding, 'make_mesh', lambda **sizes: mesh)
  yield
  patch.undo()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('stages')


@pytest.fixture(scope='module')
def first(folder, one_device):
  """A finished first stage: (config, workdir)."""
  cfg = tiny_run.make_config(folder, *FIRST)
  train.fit(cfg, folder / 'first')
  return cfg, folder / 'first'


@pytest.fixture(scope='module')
def second(first):
  """(config, workdir, final metrics) of its second stage."""
  cfg, workdir = first
  cfg = config.load(workdir / 'config.json', [
      'train.stage=aux_router', f'train.init_from={workdir}', 'train.steps=12',
      'checkpoint.every=6', 'optimizer.learning_rate=0.03',
      'optimizer.weight_decay=0'])
  target = workdir.with_name('second')
  return cfg, target, train.fit(cfg, target)


def _leaves(params):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def test_auxiliary_routers_move_and_nothing_else(first, second):
  """Thresholds, too, stay those of the first stage."""
  before = _leaves(checkpoint.load_params(first[1])[1])
  after = _leaves(checkpoint.load_params(second[1])[1])
  new = set(after) - set(before)
  assert {name.split('/')[2] for name in new} == {'channel', 'mod'}
  assert all('/auxiliary/' in name for name in new)
  for name, leaf in before.items():
    np.testing.assert_array_equal(after[name], leaf, err_msg=name)
  cfg = aux_router.prepare(second[0])
  start = _leaves(nn.meta.unbox(
      models.init_params(cfg, jax.random.key(cfg.train.seed))))
  for name in new:
    assert np.abs(after[name] - start[name]).max() > 1e-3, name


def test_metrics_say_how_well_they_predict(second):
  """By layer, part and modality; better than at the start; also at the end of
  a validation, causal and not."""
  cfg, workdir, final = second
  records = [r for r in metrics.read_jsonl(workdir) if 'aux_router_loss' in r]
  assert records[-1]['aux_router_loss'] < records[0]['aux_router_loss'] - 0.05
  assert final['accuracy/channel'] > records[0]['accuracy/channel']
  for key in ('accuracy', 'recall'):
    for part in ('layer_00/mod', 'layer_00/channel', 'layer_01/channel'):
      for modality in ('text', 'image'):
        assert 0 <= final[f'{key}/{part}/{modality}'] <= 1
  assert 0 <= final['precision/layer_01/channel/image'] <= 1
  assert {'val_loss', 'val_loss_noncausal', 'loss_noncausal'} <= set(final)
  assert 'loss' not in final


def test_the_run_is_one_of_auxiliary_routers(second):
  """Its config says so, and the same command goes on with it."""
  cfg, workdir, final = second
  made = config.load(workdir / 'config.json')
  assert made.model.moma.router == made.model.mod.router == 'aux_causal'
  again = train.fit(cfg, workdir)
  assert again['step'] == 12


@functools.partial(jax.jit, static_argnums=0)
def _apply(cfg, params, batch):
  return models.LM(cfg).apply(
      {'params': params}, batch.tokens, batch.modality, batch.segment)


def test_labels_are_the_selections_of_the_first_stage(first, second):
  """On the same pool, without noise; counted by modality.

  The counts are from a step of the second stage, the selections from the first
  model's own forward pass.
  """
  cfg = aux_router.prepare(second[0])
  params = checkpoint.load_params(second[1])[1]
  batch = jax.tree.map(jnp.asarray, next(pipeline.train_iterator(cfg)))
  got = jax.jit(lambda p: step.gradient(
      cfg, p, batch, jax.random.key(0)).output.agreement)(params)
  want = {
      (layer, part): np.asarray(aux.stats.selected_BTE) for layer, part, aux
      in outputs.layers(_apply(first[0], params, batch).aux) if aux.stats}
  for layer, part, count_S in outputs.layers(got):
    for s in range(2):
      mine = np.asarray((batch.modality == s) & (batch.segment > 0))
      selected = count_S.both[s] + count_S.selected[s]
      assert selected == want[layer, part][mine].sum()
      # Two experts each of the tokens that the block works on.
      decisions = mine.sum()
      if part == 'channel':
        decisions = 2 * want[layer, 'mod'][mine].sum()
      assert sum(count_S)[s] == decisions


def test_loss_is_the_cross_entropy_of_all_decisions():
  rng = np.random.default_rng(0)
  logit = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
  allowed = np.array(moma.Moma.allowed(
      jnp.asarray(rng.integers(-1, 2, (3, 5))), (2, 2)))[None].repeat(2, 0)
  label = allowed & (rng.random(logit.shape) < 0.3)
  p = 1 / (1 + np.exp(-logit))
  each = -np.where(label, np.log(p), np.log(1 - p))
  none = outputs.no_router()
  stats = routing.RouterStats(
      jnp.asarray(label), jnp.zeros(2), aux_logits_BTE=jnp.asarray(logit),
      allowed_BTE=jnp.asarray(allowed))
  aux = (outputs.BlockAux(none, none._replace(stats=stats)),)
  np.testing.assert_allclose(
      aux_router.loss(aux), each[allowed].mean(), rtol=1e-5)


def test_only_auxiliary_routers_are_trained():
  params = {'embed': {'embedding': jnp.ones(2)}, 'units': {'block_0': {
      'channel': {'threshold': jnp.ones(2), 'router': {'kernel': jnp.ones(2)},
                  'auxiliary': {'output': jnp.ones(2)}}}}}
  tx = optimizer.make(config.Optimizer(), params, 'aux_router')
  updates, _ = tx.update(
      jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  assert [k for k, v in _leaves(updates).items() if np.asarray(v).any()] == [
      'units/block_0/channel/auxiliary/output']


def test_generation_equals_the_full_forward(second):
  """Of the checkpoint that the second stage leaves; a token at a time."""
  cfg, params, _ = checkpoint.load_params(second[1])
  assert decode.causal_mode(cfg) == cfg
  grammar = sampling.Grammar(
      text_size=256, eos=256, boi=257, eoi=258, image_start=260, codes=16,
      tokens_per_image=4)
  prompt = [256, 65, 32, 257, 262]
  got = decode.generate(
      cfg, params, [prompt, [256]], grammar,
      sampling.SamplingParams(0.0, 0, 1.0, 0.0), jax.random.key(0),
      max_new_tokens=12)[0]
  tokens = list(prompt)
  whole = jax.jit(lambda t, m, s: models.LM(cfg).apply(
      {'params': params}, t, m, s).logits)
  for i in range(12):
    row = np.zeros((1, 20), np.int32)
    row[0, :len(tokens)] = tokens
    logits = whole(row, (row >= 260).astype(np.int32),
                   (np.arange(20)[None] < len(tokens)).astype(np.int32))
    allowed = sampling.allowed_next(
        grammar, jnp.array([sampling.remaining_in(grammar, tokens)]), 12 - i,
        cfg.model.vocab_size)
    last = jnp.where(allowed, logits[:, len(tokens) - 1], -jnp.inf)
    tokens.append(int(last.argmax()))
    if tokens[-1] == 256:
      break
  assert got == tokens[len(prompt):]


def test_every_mode_of_the_second_stage(second):
  cfg = aux_router.prepare(second[0])
  assert {name: c.model.moma.router for name, c in eval_modes.modes(cfg).items()
          } == {'causal': 'aux_causal', 'noncausal': 'expert_choice_oracle',
                'causal_threshold': 'threshold'}


@pytest.mark.parametrize('overrides, message', [
    (['train.stage=aux_router'], "train.stage='aux_router' needs the model"),
    (['model.moma.router=aux_causal'], 'is for a model that is trained'),
    (['model.moma.router=expert_choice_oracle'], 'is for a model that is'),
    (['train.stage=aux_router', 'train.init_from=x'],
     'with config.train.stage=main alone'),
])
def test_stages_that_cannot_be(overrides, message):
  with pytest.raises(config.UserError, match=message):
    config.override(config.Config(), overrides)


def test_the_first_stage_must_be_of_the_same_model(first, tmp_path):
  cfg, workdir = first
  stage = ['train.stage=aux_router', f'train.init_from={workdir}']
  wider = config.override(cfg, [*stage, 'model.moma.capacity=2'])
  with pytest.raises(config.UserError, match=(
      'holds another model: it differs in config.model.moma.capacity: 1.0 -> '
      '2.0. Take --config from that run')):
    train.fit(wider, tmp_path / 'run')
  missing = config.override(cfg, [*stage[:1], 'train.init_from=nowhere'])
  with pytest.raises(config.UserError, match='nowhere holds no run'):
    train.fit(missing, tmp_path / 'run')
  tokens = config.override(cfg, [*stage, 'data.tokenizer.codes=8'])
  with pytest.raises(config.UserError, match='gives other tokens than the run'):
    train.fit(tokens, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_no_checkpoint_to_start_from(first, tmp_path):
  cfg, workdir = first
  bare = tmp_path / 'bare'
  bare.mkdir()
  for name in ('config.json', 'vocabulary.json'):
    if (workdir / name).is_file():
      (bare / name).write_bytes((workdir / name).read_bytes())
  values = json.loads((bare / 'config.json').read_text())
  assert values['train']['stage'] == 'main'
  with pytest.raises(config.UserError, match='no checkpoint yet'):
    aux_router.start(config.override(cfg, [
        'train.stage=aux_router', f'train.init_from={bare}']), {})
