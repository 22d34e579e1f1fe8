"""The adapter for lm-eval, and the recall suite on files of its formats."""

import importlib.util
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import untrained_run

from mom_jax import config, evaluate, models
from mom_jax.evaluate import LmEvalModel
from mom_jax.tasks import run, scoring, suite

INSTALLED = importlib.util.find_spec('lm_eval') is not None
TEXTS = [
    ('a red', ' square'), ('', 'a green square and then some more of it'),
    ('all that is grey and gold ', 'and pink'), ('x', ''), ('one: ', 'navy'),
]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  workdir = untrained_run.make(
      tmp_path_factory.mktemp('lm_eval'), 'model.num_layers=1',
      'model.pattern=attention/mlp', grow=3.0)
  return run.load(workdir)


@pytest.fixture(scope='module')
def model(trained):
  return LmEvalModel(trained, batch_size=3, max_length=64)


@pytest.fixture(scope='module')
def log_p(trained):
  """Of a row alone, padded at its end, [T, W]: the distribution after each."""
  cfg = trained.modes['causal']
  apply = jax.jit(lambda tokens_BT: jax.nn.log_softmax(models.LM(cfg).apply(
      {'params': trained.params}, tokens_BT).logits[0]))

  def one(tokens):
    padded = np.zeros((1, 80), np.int32)
    padded[0, :len(tokens)] = tokens
    return np.asarray(apply(jnp.asarray(padded)), np.float64)

  return one


def _requests(arguments):
  return [types.SimpleNamespace(args=args) for args in arguments]


def _direct(log_p, before, after):
  rows = log_p([*before, *after])[len(before) - 1:len(before) + len(after) - 1]
  greedy = rows.argmax(1).tolist() == list(after)
  return rows[np.arange(len(after)), after].sum(), greedy


def test_log_likelihoods_are_those_of_a_direct_forward(model, log_p):
  """Whatever they are batched with: lengths from 1 to 41 tokens, in threes.

  Blanks at the end of a context are predicted too.
  """
  found = model.loglikelihood(_requests(TEXTS))
  eos = model.run.vocabulary.eos
  for (context, continuation), (total, greedy) in zip(TEXTS, found):
    bare = context.rstrip()
    want, best = _direct(
        log_p, [eos, *bare.encode()],
        list((context[len(bare):] + continuation).encode()))
    assert total == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert greedy == best
  assert found[3] == (0.0, True)


def test_a_likeliest_continuation_is_greedy(model, log_p):
  best = int(log_p([model.run.vocabulary.eos, *b'a red'])[5].argmax())
  pairs = [([260, *b'a red'], [best]), ([260, *b'a red'], [(best + 1) % 256])]
  pairs = [([model.run.vocabulary.eos, *c[1:]], t) for c, t in pairs]
  found = scoring.loglikelihoods(model.run, pairs, 2, 64)
  assert [greedy for _, greedy in found] == [True, False]


def test_long_contexts_lose_their_beginning(model, log_p):
  """64 tokens are read, of which the last predicts."""
  text = 'and '.join(map(str, range(40)))
  (found, _), = model.loglikelihood(_requests([(text, ' red')]))
  want, _ = _direct(log_p, list(text.encode())[-61:], list(b' red'))
  assert found == pytest.approx(want, rel=1e-5)
  with pytest.raises(ValueError, match='max_length=64'):
    model.loglikelihood(_requests([('', 65 * 'x')]))


def test_windows_predict_every_token_once():
  """The example of lm-eval's interface."""
  assert scoring.windows(range(10), -1, 4) == [
      ([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
  assert scoring.windows([], -1, 4) == []
  assert scoring.windows(range(8), -1, 4)[1] == ([3], [4, 5, 6, 7])


def test_rolling_adds_windows_up(model, log_p):
  texts = ['a red square', 'and so on, ' * 9, '']
  found = model.loglikelihood_rolling(_requests([(t,) for t in texts]))
  for text, total in zip(texts, found):
    want = sum(_direct(log_p, *pair)[0] for pair in scoring.windows(
        list(text.encode()), model.run.vocabulary.eos, 64))
    assert total == pytest.approx(want, rel=1e-5)


def test_generation_is_greedy_and_ends_where_asked(model, log_p):
  """As a loop over whole forward passes."""
  def greedy(text, count):
    tokens = [model.run.vocabulary.eos, *text.encode()]
    for _ in range(count):
      p_W = log_p(tokens)[len(tokens) - 1][:257].copy()
      p_W[256] = -np.inf  # padding
      p_W = np.append(p_W, log_p(tokens)[len(tokens) - 1][257])
      tokens.append(int(np.argmax(p_W)))
      if tokens[-1] == model.run.vocabulary.eos:
        break
    return bytes(t for t in tokens[1 + len(text):] if t < 256).decode(
        'utf-8', 'replace')

  wanted = [('a red', 6), ('grey', 3), ('an', 6), ('x', 1)]
  made = model.generate_until(_requests([
      (text, {'until': [], 'max_gen_toks': n}) for text, n in wanted]))
  assert made == [greedy(text, n) for text, n in wanted]
  stop = made[0][2]
  again, = model.generate_until(_requests([
      ('a red', {'until': [stop], 'max_gen_toks': 6})]))
  assert again == made[0].split(stop)[0]
  with pytest.raises(ValueError, match='only greedy'):
    model.generate_until(_requests([('a', {'do_sample': True})]))


@pytest.mark.skipif(not INSTALLED, reason='the package lm_eval is not here')
def test_lm_eval_runs_tasks_on_it(model, tmp_path, log_p):
  """A multiple choice on a local file, as those of the commonsense suite."""
  import lm_eval
  from lm_eval import tasks as lm_tasks
  path = tmp_path / 'rows.jsonl'
  rows = [{'q': 'a red', 'options': [' square', ' dog'], 'answer': 0},
          {'q': 'grey and', 'options': [' x', ' navy'], 'answer': 1}]
  path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
  task = {
      'task': 'local_choice', 'dataset_path': 'json',
      'dataset_kwargs': {'data_files': {'test': str(path)}},
      'test_split': 'test', 'output_type': 'multiple_choice',
      'doc_to_text': '{{q}}', 'doc_to_choice': '{{options}}',
      'doc_to_target': '{{answer}}', 'target_delimiter': '',
      'metric_list': [{'metric': 'acc'}],
  }
  result = lm_eval.simple_evaluate(
      model, tasks=[task], task_manager=lm_tasks.TaskManager(),
      bootstrap_iters=0)
  eos = model.run.vocabulary.eos
  right = [
      int(np.argmax([
          _direct(log_p, [eos, *row['q'].encode()], list(o.encode()))[0]
          for o in row['options']])) == row['answer'] for row in rows]
  assert result['results']['local_choice']['acc,none'] == np.mean(right)


ROWS = {
    'fda': [{'text': 'The maker is Acme Inc. Maker:', 'value': 'Acme Inc.'}],
    'swde': [{'text': 'Director: Ann Lee\nDirector:', 'value': ' Ann Lee '}],
    'squad_completion': [{'text': 'It rained in May. It rained in',
                          'value': 'May'}],
    'nq': [{'context': 'Bern is the capital. The capital is',
            'question': 'The capital is', 'answers': ['Bern', 'Berne']}],
    'triviaqa': [{'context': '[DOC] [TLE] A song [PAR] by Abba.',
                  'question': 'The song is by', 'answers': ['ABBA']}],
    'drop': [{'context': 'They won 3 games', 'question': 'Games won:',
              'answers': ['3']}],
}
PROMPTS = {
    'fda': 'The maker is Acme Inc. Maker:',
    'nq': 'Bern is the capital. The capital is',
    'triviaqa': 'A song  by Abba. The song is by',
    'drop': 'They won 3 games. Games won:',
}


def _file(folder, name, rows):
  path = folder / f'{name}.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return f'{name}:{path}'


@pytest.mark.parametrize('name', suite.SUITE)
def test_a_model_that_copies_the_answer_is_right(
    trained, tmp_path, monkeypatch, name):
  """And one that says it on the next line, or not at all, is wrong."""
  row, = ROWS[name]
  answer = suite.SUITE[name].answers(row)[0]
  asked = []

  def say(words):
    def made(run, prompts, counts, rows, max_length):
      asked.extend(run.vocabulary.decode(p)[0] for p in prompts)
      assert (counts, max_length) == ([48], 2048)
      return [words]
    monkeypatch.setattr(scoring, 'continuations', made)
    text = _file(tmp_path, name, [row])
    return evaluate.evaluate(trained, text)[text]['contains']

  assert say(f' It was {answer.upper()}, they say.\nOr not') == 1
  assert say(f' Who knows\n{answer}') == 0
  assert asked[0] == PROMPTS.get(name, asked[0])


def test_the_suite_on_a_run(trained, tmp_path, monkeypatch):
  """What is too long is cut at its beginning, and counted."""
  monkeypatch.setattr(suite, 'READ', 96)
  rows = ROWS['fda'] + [{'text': 60 * 'on and ', 'value': 'q' * 48}]
  result = suite.contains(trained, _file(tmp_path, 'fda', rows))
  assert result == {'contains': 0, 'error': 0, 'count': 2, 'cut': 1}


def test_what_must_be_downloaded_is_said(trained, tmp_path):
  with pytest.raises(config.UserError, match='must be downloaded.*based-swde'):
    evaluate.names('swde')
  with pytest.raises(config.UserError, match='--task=nq:none.jsonl needs a'):
    evaluate.names('loss,nq:none.jsonl')
  whole = {'context': 'a', 'question': 'b', 'answers': ['c']}
  for wrong in ({'question': None}, {'answers': []}, {'answers': 'c'},
                {'answers': [3]}, {'context': 3}, {'answers': None}):
    text = _file(tmp_path, 'drop', [whole | wrong])
    with pytest.raises(config.UserError, match='row 0 needs context, question'):
      suite.contains(trained, text)
