"""A run goes on with the documents it was trained on, wherever they are."""

import json

import pytest

from mom_jax import config
from mom_jax.data import encode, pipeline, prepare

ROWS = [{'text': f'document {i}', 'key': i % 9} for i in range(40)]


def _write(path, rows):
  path.parent.mkdir(exist_ok=True)
  path.write_text('\n'.join(map(json.dumps, rows)))
  return f'jsonl:{path}'


def _keep(workdir, cfg, write=True):
  workdir.mkdir(exist_ok=True)
  vocabulary = encode.build_vocabulary(cfg)
  return pipeline.keep_documents(
      workdir, cfg, pipeline.open_all(cfg, vocabulary), write)


@pytest.fixture
def run(tmp_path, of_file):
  """(configuration of a source, its workdir), after a first start."""
  cfg = of_file(_write(tmp_path / 'x.jsonl', ROWS))
  assert _keep(tmp_path / 'run', cfg) == []
  return cfg, tmp_path / 'run'


def test_the_same_documents_at_another_place_are_the_same(
    run, tmp_path, of_file):
  _, workdir = run
  assert _keep(workdir, run[0]) == []
  moved = of_file(_write(tmp_path / 'other' / 'y.jsonl', ROWS))
  assert _keep(workdir, moved) == []


@pytest.mark.parametrize('rows', [
    [*ROWS, {'text': 'one more', 'key': 0}],
    ROWS[1:],
    [*ROWS[:7], {'text': 'document x', 'key': 7}, *ROWS[8:]],
    ROWS[::-1],
], ids=['appended', 'cut', 'replaced', 'another order'])
def test_changed_documents_are_refused_unless_allowed(run, tmp_path, rows):
  cfg, workdir = run
  _write(tmp_path / 'x.jsonl', rows)
  for _ in range(2):
    with pytest.raises(config.UserError) as error:
      _keep(workdir, cfg)
    assert (f'{cfg.data.sources[0]} (then 40 documents of' in str(error.value)
            and f'now {len(rows)} of' in str(error.value)
            and '--config.data.allow_changed=true' in str(error.value))
  allowed = config.override(cfg, ['data.allow_changed=true'])
  said, = _keep(workdir, allowed)
  assert f'have changed: {cfg.data.sources[0]}' in said
  assert _keep(workdir, cfg) == []


def test_changed_shards_are_refused(tmp_path, of_file):
  folder, workdir = tmp_path / 'shards', tmp_path / 'run'
  for number in range(2):
    rows = [{'text': f'{number} {i}', 'key': i} for i in range(40)]
    source = of_file(_write(tmp_path / 'x.jsonl', rows))
    folder = tmp_path / f'shards{number}'
    list(prepare.prepare(source, str(folder), 2, 1))
    cfg = of_file(f'array_record:{folder}/*')
    if number:
      with pytest.raises(config.UserError, match='other documents than those'):
        _keep(workdir, cfg)
    else:
      assert _keep(workdir, cfg) == []
  folder.rename(tmp_path / 'shards0 moved')
  (tmp_path / 'shards0').rename(tmp_path / 'moved')
  assert _keep(workdir, of_file(f'array_record:{tmp_path}/moved/*')) == []


@pytest.mark.parametrize('content', ['', '[', '{}', '[3]', '[{}]', '[[]]', '3'])
def test_a_damaged_file_is_named(run, content):
  cfg, workdir = run
  (workdir / 'data.json').write_text(content)
  with pytest.raises(config.UserError, match='data.json must hold what the'):
    _keep(workdir, cfg)
