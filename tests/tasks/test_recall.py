"""Synthetic tasks on models: exact scores of trivial ones, and a real run."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import untrained_run

from mom_jax import config, evaluate
from mom_jax.data import synthetic, tokenizers
from mom_jax.data.text import Symbols
from mom_jax.tasks import recall, run

SMALL = {  # all of one length, for one compilation
    'mqar': 'mqar:pairs=3:length=24', 'needle': 'needle:length=24',
    'phonebook': 'phonebook:entries=3',
    'selective_copy': 'selective_copy:items=3:length=24',
    'state_tracking': 'state_tracking:length=22',
}


def _documents(text, count=19):
  vocabulary = tokenizers.Vocabulary(Symbols(b'64'), None)
  return synthetic.open_documents(text, vocabulary, 'validation', count)


def _model(documents, tokens_BT, right=lambda row, place: True):
  """Looks the next token up, where `right`, and takes the one after it else."""
  next_BT = np.roll(np.asarray(tokens_BT), -1, 1)
  values = documents.answers
  for row, place in np.ndindex(next_BT.shape):
    if not right(row, place) and next_BT[row, place] in values:
      at = (next_BT[row, place] - values[0] + 1) % len(values)
      next_BT[row, place] = values[at]
  return jnp.asarray(50 * np.eye(68, dtype=np.float32)[next_BT])


@pytest.mark.parametrize('text', SMALL.values())
def test_trivial_models_score_exactly(text, monkeypatch):
  """Look-up 100 %, a uniform model chance, in batches that do not divide."""
  monkeypatch.setattr(recall, 'TOKENS', 8 * 27)
  documents = _documents(text)
  oracle = recall.measure(documents, functools.partial(_model, documents))
  assert (oracle['accuracy'], oracle['samples']) == (1, 1)
  assert oracle['loss'] < 1e-6 and oracle['error'] == 0
  zeros = lambda tokens: np.zeros((*tokens.shape, 68), np.float32)
  uniform = recall.measure(documents, zeros)
  chance = 1 / len(documents.answers)
  answers = int(documents.counts(0).sum())
  assert uniform['chance'] == chance
  assert uniform['accuracy'] == pytest.approx(chance, rel=1e-6)
  assert uniform['samples'] == pytest.approx(chance**answers, rel=1e-6)
  assert uniform['loss'] == pytest.approx(np.log(68), rel=1e-6)
  assert uniform['count'] == 19


def test_wrong_answers_count_as_wrong():
  """Every second sample has none right."""
  documents = _documents('mqar:pairs=4', 20)
  found = recall.measure(documents, functools.partial(
      _model, documents, right=lambda row, place: row % 2))
  assert (found['accuracy'], found['samples']) == (0.5, 0.5)
  assert found['error'] == pytest.approx(0.5 / np.sqrt(20))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = untrained_run.make(
      tmp_path_factory.mktemp('recall'), 'model.num_layers=1')
  return run.load(workdir)


@pytest.mark.parametrize('name', synthetic.TASKS)
def test_every_task_runs_on_a_run(trained, name, monkeypatch):
  """Of other data, with its bytes as symbols; untrained it is near chance."""
  monkeypatch.setattr(recall, 'SAMPLES', 32)
  result = evaluate.evaluate(trained, SMALL[name])[SMALL[name]]
  (text, value), = result['loads'].items()
  assert synthetic.parse(text).name == name
  assert value[result['over']] == synthetic.parse(
      SMALL[name]).settings[result['over']]
  assert abs(value['accuracy'] - value['chance']) < 0.3
  assert Image.open(trained.workdir / result['picture']).size[0] > 300
  kept = json.loads((trained.workdir / 'evaluation.json').read_text())
  assert kept[SMALL[name]] == result


def test_loads_are_those_of_training_or_the_tasks_own(trained):
  spec = lambda cfg, text: [
      s.settings['pairs'] for s in recall.specs(cfg, text)]
  assert spec(trained.cfg, 'mqar') == [4, 8, 16, 32, 64]
  assert spec(trained.cfg, 'mqar:pairs=3') == [3]
  cfg = config.override(trained.cfg, [
      'data.weights=1,1',
      'data.sources=synthetic:mqar:pairs=5,synthetic:mqar:pairs=7'])
  assert spec(cfg, 'mqar') == [5, 7]
  assert spec(cfg, 'mqar:length=512') == [4, 8, 16, 32, 64]
  assert len(recall.specs(cfg, 'needle')) == 5


@pytest.mark.parametrize('sources, over, apart', [
    (('mqar:pairs=5', 'mqar:pairs=7'), 'pairs', ['pairs']),
    (('needle:needles=1:length=32', 'needle:needles=2:length=32'), 'needles',
     ['needles']),
    (('needle:needles=1:length=32', 'needle:needles=2:length=64'), 'length',
     ['length', 'needles']),
    (('state_tracking:group=s3', 'state_tracking:group=s5'), 'length',
     ['length', 'group']),
    (('phonebook:entries=4',), 'entries', ['entries']),
])
def test_loads_are_told_apart_by_what_they_differ_in(sources, over, apart):
  assert recall.varied([synthetic.parse(s) for s in sources]) == (over, apart)


def test_every_load_of_a_recipe_is_in_its_result(trained):
  """Needles differ in number, not in the length that is the task's load."""
  sources = (f'synthetic:needle:needles={n}:values=1:length=24' for n in (1, 3))
  cfg = config.override(trained.cfg, [
      'data.weights=1,1', f'data.sources={",".join(sources)}'])
  run = dataclasses.replace(trained, cfg=cfg)
  result = recall.recall(run, 'needle')
  assert result['over'] == 'needles'
  assert {name: value['needles'] for name, value in result['loads'].items()
          } == {'needle:needles=1': 1, 'needle:needles=3': 3}


def test_names_have_settings_if_they_are_synthetic():
  assert evaluate.names('loss,mqar:pairs=8') == ['loss', 'mqar:pairs=8']
  with pytest.raises(config.UserError, match="unknown task 'loss:x=1'"):
    evaluate.names('loss:x=1')
  with pytest.raises(config.UserError, match="'pears' is no setting of mqar"):
    evaluate.names('mqar:pears=8')
