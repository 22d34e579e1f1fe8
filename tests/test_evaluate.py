"""The command evaluate: every task of its table leaves what it promises."""

import dataclasses
import json
import math

import jax
import numpy as np
from PIL import Image
import pytest
import untrained_run

from mom_jax import (
  config,
  evaluate,
  figures,
  models,
    tasks,
)
from mom_jax.data import pipeline
from mom_jax.tasks import length, routing, run, samples, throughput
from mom_jax.tasks import loss as loss_task
from mom_jax.training import checkpoint


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A run whose experts choose tokens, so that there are two modes."""
  workdir = untrained_run.make(
      tmp_path_factory.mktemp('evaluate'), 'model.moma.router=expert_choice')
  return run.load(workdir)


def test_modes_are_what_was_trained_and_what_generates(trained):
  assert [(k, c.model.moma.router) for k, c in trained.modes.items()] == [
      ('causal', 'threshold'), ('noncausal', 'expert_choice_oracle')]


def test_loss_by_mode_and_modality(trained):
  """The mean over all is the mean of modalities, weighted by targets."""
  result = evaluate.evaluate(trained, 'loss')['loss']
  assert result['step'] == 0
  targets = sum(int(b.weight.sum()) for b in trained.validation)
  for mode in ('causal', 'noncausal'):
    part = result[mode]
    assert set(part) == {'text', 'image', 'all'}
    assert part['all']['targets'] == targets
    total = sum(part[k]['loss'] * part[k]['targets'] for k in ('text', 'image'))
    assert math.isclose(part['all']['loss'], total / targets, rel_tol=1e-6)
    for value in part.values():
      assert abs(value['loss'] - math.log(276)) < 1  # nothing is learnt yet
      assert value['margin'] == value['unigram'] - value['loss']


def test_loss_by_position_adds_up_to_the_loss(trained):
  """And no target stands before a first token."""
  result = evaluate.evaluate(trained, 'loss')['loss']
  positions, total = result['positions'], result['causal']['all']
  assert [p['from'] for p in positions][:3] == [1, 2, 4]
  assert sum(p['targets'] for p in positions) == total['targets']
  assert sum(p['loss'] * p['targets'] for p in positions) == pytest.approx(
      total['loss'] * total['targets'], rel=1e-5)
  pieces = sum(int(b.segment.max(1).sum()) for b in trained.validation)
  assert positions[0]['targets'] == pieces
  assert Image.open(trained.workdir / result['picture']).size[0] > 300


def test_length_reads_pieces_as_it_would_the_whole(trained, monkeypatch):
  """Losses with caches are those of one pass, up to rounding."""
  result = evaluate.evaluate(trained, 'length')['length']
  assert list(result['lengths']) == ['32', '64', '128', '256']
  tokens_BS = length.cut_rows(trained, 32)
  assert tokens_BS.shape == (result['rows'], 256)
  cfg = trained.modes['causal']
  output = jax.jit(lambda t, m: models.LM(cfg).apply(
      {'params': trained.params}, t, m))(
          tokens_BS, trained.vocabulary.modality(tokens_BS))
  log_p = jax.nn.log_softmax(output.logits[:, :-1])
  want = -np.take_along_axis(np.asarray(log_p), tokens_BS[:, 1:, None], 2)
  value = result['lengths']['256']
  assert value['loss'] == pytest.approx(want.mean(), rel=1e-4)
  assert value['last'] == pytest.approx(want[:, 128:].mean(), rel=1e-4)
  assert value['perplexity'] == math.exp(value['loss'])
  monkeypatch.setattr(length, 'FACTORS', (1, 1000))
  with pytest.raises(config.UserError, match='--task=length needs 64'):
    length.cut_rows(trained, 32)


def test_throughput_of_two_contexts(trained, tmp_path, monkeypatch):
  """A cache of memories is as large for any context, one of keys grows."""
  monkeypatch.setattr(throughput, 'FACTORS', (1, 2))
  monkeypatch.setattr(throughput, 'NEW', 4)
  cfg = trained.modes['causal']
  assert throughput.cache_bytes(cfg, 64) == throughput.cache_bytes(cfg, 128) > 0
  quick = run.load(untrained_run.make(
      tmp_path, 'model.num_layers=1', 'model.pattern=attention/mlp'))
  result = evaluate.evaluate(quick, 'throughput')['throughput']
  assert list(result['contexts']) == ['32', '64']
  one, two = result['contexts'].values()
  assert min(one['prefill'], one['decode'], two['decode']) > 0
  keys = 2 * 2 * 8 * 4  # keys and values, heads, size, bytes
  assert two['cache'] - one['cache'] >= 32 * keys
  assert Image.open(quick.workdir / result['picture']).size[0] > 300


def test_information_of_a_choice(trained):
  """That of a table, and of the tokens that the run's routers took."""
  def information(table):
    return routing.terms(np.array(table, float)).sum()
  assert information([[5, 0, 0], [0, 3, 2]]) == pytest.approx(math.log(2))
  assert information([[2, 4], [1, 2]]) == pytest.approx(0, abs=1e-12)
  result = evaluate.evaluate(trained, 'routing')['routing']['causal']
  found = result['specialisation']
  for layer, parts in found['layers'].items():
    sums = trained.validation_sums['causal']
    count_EW = sums.token_counts[0].mixer[int(layer)]
    by_modality = result['layers'][layer]['mixer'].values()
    np.testing.assert_array_equal(count_EW.sum(1), np.sum(
        list(by_modality), axis=0))
    assert len(parts['mixer']['top']) == 3
    assert 0 <= parts['mixer']['chance'] < parts['mixer']['information']
    # Modalities never share an expert, so it tells them apart at least.
    share_S = np.array([
        sum(row) for row in result['layers'][layer]['channel'].values()])
    share_S = share_S / share_S.sum()
    assert parts['channel']['information'] >= -(
        share_S * np.log(share_S)).sum() - 1e-9
    images = {t[:7] for top in parts['channel']['top'][2:] for t in top}
    assert images == {'<image '}
  assert Image.open(trained.workdir / found['picture']).size[0] > 300


def test_routing_counts_every_token(trained):
  """Memories take top_k of each token, experts none of another modality."""
  result = evaluate.evaluate(trained, 'routing')['routing']
  valid = sum(int((b.segment > 0).sum()) for b in trained.validation)
  for mode in ('causal', 'noncausal'):
    tokens, layers = result[mode]['tokens'], result[mode]['layers']
    assert sum(tokens.values()) == valid
    assert list(layers) == ['0', '1']
    for layer in layers.values():
      for name, count in tokens.items():
        assert sum(layer['mixer'][name]) == 2 * count
        assert max(layer['mixer'][name]) <= count
      assert layer['channel']['text'][2:] == [0, 0]
      assert layer['channel']['image'][:2] == [0, 0]
    assert Image.open(trained.workdir / result[mode]['picture']).size[0] > 300


def test_expert_choice_takes_its_capacity(trained):
  """ceil(b / 2) tokens of each row's b tokens of a modality, per expert."""
  want = {
      name: sum(math.ceil(int(((row == m) & (seg > 0)).sum()) / 2)
                for b in trained.validation
                for row, seg in zip(b.modality, b.segment))
      for m, name in enumerate(('text', 'image'))
  }
  layers = routing.routing(trained)['noncausal']['layers']
  for layer in layers.values():
    assert layer['channel']['text'][:2] == [want['text']] * 2
    assert layer['channel']['image'][2:] == [want['image']] * 2


def test_tokens_by_their_number_of_experts(trained):
  """Shares that add up, and to as many as there are choices, of two experts."""
  layers = routing.routing(trained)['noncausal']['layers']
  tokens = trained.validation_sums['noncausal'].tokens_S
  for layer in layers.values():
    for s, name in enumerate(('text', 'image')):
      none, one, both = layer['experts_per_token'][name]
      assert none + one + both == pytest.approx(1) and 0 < none < 1
      assert one + 2 * both == pytest.approx(
          sum(layer['channel'][name]) / tokens[s])


def test_gap_is_what_causality_costs(trained):
  result = evaluate.evaluate(trained, 'loss')
  for name, gap in result['loss']['gap'].items():
    assert gap == (result['loss']['causal'][name]['loss']
                   - result['loss']['noncausal'][name]['loss'])
  assert 'causal - noncausal validation loss: text ' in evaluate.report(result)


def test_curve_draws_the_metrics(trained):
  result = evaluate.evaluate(trained, 'curve')['curve']
  assert result['records'] == 12
  assert Image.open(trained.workdir / result['picture']).size[0] > 300


def test_curve_without_metrics_says_so(trained, tmp_path):
  empty = run.Run(tmp_path, trained.cfg, trained.params, 0,
                  trained.vocabulary)
  with pytest.raises(config.UserError, match='no losses to draw'):
    loss_task.curve(empty)


def test_samples_of_seen_and_unseen_captions(trained):
  result = evaluate.evaluate(trained, 'samples')['samples']
  assert Image.open(trained.workdir / result['picture']).size[0] > 300
  text = (trained.workdir / result['texts']).read_text(encoding='utf-8')
  assert 'captions seen in training' in text
  assert 'captions not seen in training' in text
  assert ' square -> ' in text and '== Texts' in text


def test_sources_without_pairs_have_no_strips(trained, monkeypatch):
  """As tokenised shards, whose images are codes already."""
  monkeypatch.setattr(pipeline, 'pairs', lambda cfg: ([], []))
  assert samples.choose_pairs(trained) == {}


def test_results_add_up_in_one_file(trained):
  """Tasks may run one at a time; the file keeps the others' results."""
  path = trained.workdir / 'evaluation.json'
  path.write_text('{"earlier": {"step": 3}, "curve": {"step": 3}}')
  result = evaluate.evaluate(trained, 'curve')
  kept = json.loads(path.read_text())
  assert kept == {'earlier': {'step': 3}, **result}
  path.write_text('{"broken')
  evaluate.evaluate(trained, 'curve')
  assert json.loads(path.read_text()) == result


def test_results_go_to_another_folder_one_by_one(
    trained, tmp_path, monkeypatch, capsys):
  """An error of a later task loses none of the earlier ones."""
  def fails(run):
    raise KeyboardInterrupt
  monkeypatch.setitem(tasks.TASKS, 'routing', fails)
  before = sorted(trained.workdir.rglob('*'))
  elsewhere = dataclasses.replace(trained, output_folder=tmp_path)
  with pytest.raises(KeyboardInterrupt):
    evaluate.evaluate(elsewhere, 'loss,routing')
  assert 'causal validation loss' in capsys.readouterr().out
  assert list(json.loads((tmp_path / 'evaluation.json').read_text())) == [
      'loss']
  assert (tmp_path / 'loss_position.png').is_file()
  assert sorted(trained.workdir.rglob('*')) == before


def test_a_folder_for_results_is_checked_first(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(config.UserError, match='--output=DIR'):
    evaluate.check_output(tmp_path / 'file' / 'results')
  evaluate.check_output(tmp_path / 'new' / 'results')
  assert (tmp_path / 'new' / 'results').is_dir()


def test_all_are_known_tasks_and_an_unknown_one_is_refused():
  assert evaluate.names('all') == ['loss', 'curve', 'routing', 'samples']
  assert set(evaluate.names('all')) < set(tasks.TASKS)
  assert evaluate.names('routing,loss') == ['routing', 'loss']
  with pytest.raises(config.UserError, match="unknown task 'los'.*loss"):
    evaluate.names('los')


def test_report_and_files_name_what_was_found():
  value = dict(loss=1.5, unigram=2.0, margin=0.5, bits=2.2, targets=3)
  results = {'loss': {'step': 1, 'causal': {'text': value}},
             'routing': {'step': 1, 'causal': {'picture': 'routing.png'}}}
  assert '1.500 nats, unigram entropy 2.000, margin 0.500' in evaluate.report(
      results)
  assert [f for r in results.values() for f in evaluate.files(r)] == [
      'routing.png']


def test_series_leaves_out_what_is_missing():
  records = [{'step': 1, 'a': 2.0}, {'step': 2}, {'step': 3, 'a': None}]
  assert figures.series(records, 'a') == ([1], [2.0])


def test_a_figure_is_whole_or_not_there(tmp_path):
  heat = figures.HeatMap('t', np.array([[0.1, 0.9]]), [0], ['0', '1'])
  figures.routing(tmp_path / 'a.png', [[heat]])
  assert [p.name for p in tmp_path.iterdir()] == ['a.png']


def test_a_run_without_held_out_documents(trained):
  cfg = config.override(trained.cfg, ['data.validation=0'])
  bare = run.Run(trained.workdir, cfg, trained.params, 0, trained.vocabulary)
  with pytest.raises(config.UserError, match='validation=0.0 holds out no'):
    bare.validation  # noqa: B018


def test_only_settings_of_the_machine_may_change(trained):
  change = lambda item: config.override_some(
      trained.cfg, [item], checkpoint.MAY_CHANGE)
  assert change('model.remat=full').model.remat == 'full'
  with pytest.raises(config.UserError, match='top_k.*fixed by the run'):
    change('model.moma.top_k=2')
