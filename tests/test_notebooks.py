"""Notebooks run from top to bottom, with small settings."""

import json
import pathlib

import pytest
import tiny_run

ROOT = pathlib.Path(__file__).parents[1]
SMALL = {
    'captioned_images': {'STEPS': '2', 'OVERRIDES': (
        'model.width=32 model.num_layers=1 model.pattern=mom/mlp'
        ' model.mlp.hidden=32 model.image_side=2 model.vocab_size=276'
        ' data.sources=jsonl:documents.jsonl data.weights=1 data.seq_len=32'
        ' data.tokenizer.image_size=4 data.tokenizer.codes=16 data.cache=cache'
        ' data.validation=0.25 train.eval_batches=1')},
    'memories': {'STEPS': '2', 'OVERRIDES': (
        'model.width=32 model.mixer.num_heads=1 data.batch_size=8'
        ' train.eval_batches=1')},
    'own_rule': {'STEPS': '2'},
    'published_checkpoint': {},
}
LARGEST = 200_000  # bytes


def test_there_are_no_others_and_all_are_small():
  found = {path.stem: path for path in (ROOT / 'notebooks').glob('*.ipynb')}
  assert set(found) == set(SMALL)
  for path in found.values():
    assert path.stat().st_size < LARGEST
    cells = json.loads(path.read_text())['cells']
    assert cells[0]['cell_type'] == 'markdown'
    assert cells[0]['source'][0].startswith('# ')


@pytest.mark.slow
@pytest.mark.parametrize('name', SMALL)
def test_notebook_runs(name, tmp_path, monkeypatch):
  """Every cell, in a kernel of its own; an error in one fails."""
  nbformat = pytest.importorskip('nbformat')
  nbclient = pytest.importorskip('nbclient')
  pytest.importorskip('ipykernel')
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  monkeypatch.setenv('FOLDER', str(tmp_path))
  tiny_run.write_data(tmp_path)
  for key, value in SMALL[name].items():
    monkeypatch.setenv(key, value)
  book = nbformat.read(ROOT / 'notebooks' / f'{name}.ipynb', as_version=4)
  nbformat.validate(book)
  nbclient.NotebookClient(
      book, timeout=300, resources={'metadata': {'path': str(tmp_path)}}
  ).execute()
  code = [cell for cell in book.cells if cell.cell_type == 'code']
  assert all(cell.execution_count for cell in code)
  shown = [o for cell in code for o in cell.outputs]
  assert shown and not any(o.output_type == 'error' for o in shown)
