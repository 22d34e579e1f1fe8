"""Tasks on routers: what changes without the future, and what errors cost."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import untrained_run

from mom_jax import config, evaluate, models
from mom_jax.models import outputs
from mom_jax.tasks import errors, flips, run


def _run(folder, *overrides):
  workdir = untrained_run.make(
      folder, 'model.num_layers=1', 'data.batch_size=4', *overrides)
  found = run.load(workdir)
  # An untrained model hardly minds who computes what.
  params = jax.tree.map(lambda x: 4 * x, found.params)
  return dataclasses.replace(found, params=params)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Experts that choose among all tokens of a batch."""
  return _run(
      tmp_path_factory.mktemp('routers'), 'model.moma.router=expert_choice',
      'model.moma.pool=device', 'model.pattern=attention/moma')


@pytest.fixture(scope='module')
def both(tmp_path_factory):
  """Memories, and tokens that choose experts."""
  return _run(tmp_path_factory.mktemp('both'))


def test_flips_are_of_routers_that_see_the_future(trained):
  """None where thresholds decide, some where experts do."""
  result = evaluate.evaluate(trained, 'flips')['flips']
  rows = sum(len(b.tokens) for b in trained.validation)
  for mode in ('causal', 'noncausal'):
    assert result[mode]['prefixes'] == flips.POSITIONS * min(flips.ROWS, rows)
  assert set(result['causal']['layers']['0']['channel'].values()) == {0.0}
  some = result['noncausal']['layers']['0']['channel']
  assert set(some) == {'text', 'image'} and 0 < min(some.values()) < 1
  assert some == result['noncausal']['mean']['channel']
  assert 'auxiliary' not in result


def test_flips_compare_with_what_a_bare_prefix_selects(trained):
  """Counted anew from prefixes of their own length, alone in their batch."""
  cfg, batch, row = trained.modes['noncausal'], trained.validation[0], 1
  selected = jax.jit(lambda *fields: models.LM(cfg).apply(
      {'params': trained.params}, *fields
  ).aux[0].channel.stats.selected_BTE[0])
  full_TE = np.asarray(selected(*batch[:3]))[row]
  prefixes, position_P = flips.row_prefixes(batch, row)
  now = flips.selected_by(
      flips.with_sequence_pool(cfg), trained.params, prefixes)
  now_PTE = np.asarray(now[0].channel.selected)[0]
  until = position_P[9] + 1
  want_E = selected(*(x[row:row + 1, :until] for x in batch[:3]))[0, -1]
  np.testing.assert_array_equal(now_PTE[9, until - 1], want_E)
  before = jax.tree.map(
      lambda a: a[:, row], flips.selected_by(cfg, trained.params, batch))
  counts = flips.count_changes(before, now, position_P, batch.modality[row], 2)
  changed_PE = (
      now_PTE[np.arange(len(position_P)), position_P] ^ full_TE[position_P])
  for s in (0, 1):
    mine_P = batch.modality[row, position_P] == s
    np.testing.assert_array_equal(
        counts[0].channel[0, s],
        [changed_PE[mine_P].sum(), 2 * mine_P.sum()])


def test_agreement_of_auxiliary_routers(trained):
  """Those of a second stage, against the selections of expert choice."""
  cfg = config.override(trained.cfg, [
      'train.stage=aux_router', 'train.init_from=x',
      'model.moma.router=aux_causal'])
  params = nn.meta.unbox(models.init_params(cfg, jax.random.key(1)))
  second = run.Run(trained.workdir, cfg, params, 0, trained.vocabulary)
  found = flips.agreement_of_auxiliary(second)
  for key in ('accuracy', 'precision', 'recall'):
    assert 0 <= found[f'{key}/channel'] <= 1
  # Experts choose half of the decisions; an untrained router knows nothing.
  assert 0.3 < found['accuracy/channel'] < 0.7


def test_no_errors_change_nothing_and_few_change_little(both):
  """Of memories and of experts. No cliff: few cost a small part of all."""
  cfg, batch, key = both.cfg, both.validation[0], jax.random.key(3)
  assert errors.routers(cfg) == {
      'mixer': 'softmax_topk', 'channel': 'token_choice'}

  @jax.jit
  def apply(rates):
    more = {} if rates is None else {'errors': errors.collection(cfg, rates)}
    out = models.LM(cfg).apply(
        {'params': both.params} | more, *map(jnp.asarray, batch[:3]),
        rngs={'errors': key})
    return out.logits, {
        part: aux.stats.selected_BTE
        for _, part, aux in outputs.layers(out.aux[:1])}

  plain, before = apply(None)
  rates = lambda **some: {'mixer': 0.0, 'channel': 0.0} | some
  logits, after = apply(rates())
  jax.tree.map(np.testing.assert_array_equal, before, after)
  np.testing.assert_allclose(logits, plain, atol=2e-5)
  valid = batch.segment > 0
  for part in ('mixer', 'channel'):
    cost = []
    for rate in (0.002, 0.05, 1.0):
      wrong, selected = apply(rates(**{part: rate}))
      cost.append(np.abs(wrong - plain)[valid].mean())
      if rate == 1:  # one memory of three is not taken and can stand in
        left = (before[part] & ~selected[part])[valid].sum(-1)
        assert (left == 1).all()
        other = 'channel' if part == 'mixer' else 'mixer'
    assert cost[0] < 0.1 * cost[2] and cost[0] < cost[1] < cost[2]
    if part == 'channel':
      np.testing.assert_array_equal(selected[other], before[other])


def test_errors_task_draws_every_kind_of_router(both, monkeypatch):
  monkeypatch.setattr(errors, 'ERROR_PROBS', (0.0, 0.5))
  result = evaluate.evaluate(both, 'errors')['errors']
  sums = both.validation_sums['causal'].losses
  for part, router in (('mixer', 'softmax_topk'), ('channel', 'token_choice')):
    value = result['causal'][part]
    assert value['router'] == router and value['error_probs'] == [0.0, 0.5]
    assert value['loss']['all'][0] == pytest.approx(
        sums.loss_S.sum() / sums.count_S.sum(), rel=1e-5)
    assert all(a != b for a, b in value['loss'].values())
  assert Image.open(both.workdir / result['picture']).size[0] > 300
  kept = json.loads((both.workdir / 'evaluation.json').read_text())
  assert kept['errors'] == result


def test_a_model_without_routers_has_no_errors(both):
  cfg = config.override(both.cfg, ['model.pattern=attention/mlp'])
  bare = run.Run(both.workdir, cfg, {}, 0, both.vocabulary)
  with pytest.raises(config.UserError, match='no router that decides anything'):
    errors.errors(bare)
