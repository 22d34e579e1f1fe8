"""Whatever a command is given: it is used, or refused in one line.

Inputs are generated: valid ones with a value replaced, a part of a file changed
or cut, and some of no sense at all. Most are read as commands read them, up to
the point where compiling would begin; some are given to real commands.
"""

import collections
from collections.abc import Callable
import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import time
from typing import Any

import hypothesis
from hypothesis import strategies as st
import jax
import numpy as np
from PIL import Image
import published
import pytest
import tiny_run
import untrained_run

from mom_jax import config, generate, hf
from mom_jax.data import encode, pipeline, text, tokenizers
from mom_jax.parallel import sharding
from mom_jax.tasks import eta
from mom_jax.training import checkpoint, step

ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 60  # no input takes longer to read
SHORT, WHOLE, COMMANDS = 25, 1000, 30

TEXTS = st.text(max_size=40) | st.sampled_from([
    '', ' ', '\0', '\ud83d', '\u2028', '<image>', '<eos>', '<draw>', '~', '..',
    '/dev/null', '-1', 'nan', '[]', '{}', 'é' * 300])
NUMBERS = st.sampled_from([
    0, 1, -1, 2, 3, 7, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e-30, 1e308,
    float('inf'), float('nan')])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(
            ['text', 'image', 'parts', 'key', 'bytes', 'path', 'x']),
        inner, max_size=3), max_leaves=6)


class Outcomes:
  """How often inputs were used and refused."""

  def __init__(self):
    self._count = collections.Counter()

  def read(self, act: Callable[[], Any]) -> None:
    """Read an input; whatever but a `UserError` of one line is a fault."""
    started = time.monotonic()
    try:
      act()
      self._count['used'] += 1
    except config.UserError as e:
      assert str(e) and '\n' not in str(e), repr(str(e))
      self._count['refused'] += 1
    assert time.monotonic() - started < SECONDS

  def __str__(self) -> str:
    used, refused = self._count['used'], self._count['refused']
    assert used and refused, 'inputs of one kind alone'
    return f'{used + refused} inputs: {used} used, {refused} refused'


def _try(campaign, name: str, strategy: st.SearchStrategy[Any],
         act: Callable[[Any], Any]) -> None:
  """Give generated inputs to `act`, and note what came of them."""

  def inject() -> str:
    outcomes = Outcomes()

    @hypothesis.settings(
        max_examples=campaign.size(SHORT, WHOLE), deadline=None, database=None,
        derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(strategy)
    def check(value):
      outcomes.read(lambda: act(value))

    check()
    return str(outcomes)

  campaign.run('inputs', name, inject)


@st.composite
def _changed(draw, data: bytes) -> bytes:
  """A file with some bytes changed, cut out, doubled, or cut off."""
  for _ in range(draw(st.integers(0, 3))):
    start = draw(st.integers(0, len(data)))
    stop = draw(st.integers(start, min(len(data), start + 40)))
    new = draw(st.binary(max_size=8) | st.sampled_from(
        [b'', b'\n', b'"', b'{', b'0' * 30, b'\xff\xfe', data[start:stop] * 2]))
    data = data[:start] + new + data[stop:]
  return data


@st.composite
def _replaced(draw, values: Any) -> Any:
  """JSON values with one of them replaced, left out or added."""
  values = json.loads(json.dumps(values))
  inner = values
  while True:
    keys = list(inner) if isinstance(inner, dict) else [*range(len(inner))]
    key = draw(st.sampled_from(keys)) if keys else 'x'
    if (isinstance(inner, dict | list) and keys
        and isinstance(inner[key], dict | list) and draw(st.booleans())):
      inner = inner[key]
      continue
    what = draw(st.sampled_from(['replace', 'replace', 'drop', 'add', 'keep']))
    if what == 'replace' and keys:
      inner[key] = draw(JSON)
    elif what == 'drop' and keys:
      del inner[key]
    elif what == 'add' and isinstance(inner, dict):
      inner[draw(st.text(max_size=8))] = draw(JSON)
    return values


def _json(values: Any) -> bytes:
  return json.dumps(values).encode()


# Settings and config files.

SETTINGS = [key for key, _, _ in config.settings(config.Config())]
# Whose values would make the test itself slow or write elsewhere.
_LARGE = 200


@st.composite
def _override(draw) -> str:
  key = draw(st.sampled_from(SETTINGS) | st.text(max_size=10))
  value = draw(st.one_of(
      NUMBERS.map(str), TEXTS, JSON.map(str), st.sampled_from(
          ['true', 'False', 'None', '1,2', '(1,)', '[1, 2]', 'mom/moma',
           'text,image', '1e400', '0x10', '1_000', ' 3 ', '3;4'])))
  return f'{key}={value}'


def test_settings(campaign):
  _try(campaign, 'settings', st.lists(_override(), min_size=1, max_size=3),
       lambda overrides: config.override(config.Config(), overrides))


@st.composite
def _small_override(draw, cfg: config.Config) -> str:
  """A setting with a value of its type, small, not always sensible."""
  known = {key: value for key, value, _ in config.settings(cfg)
           if key.startswith(('model.', 'loss.', 'optimizer.', 'train.'))}
  key = draw(st.sampled_from(sorted(known)))
  value = known[key]
  if isinstance(value, bool):
    return f'{key}={draw(st.booleans())}'
  if isinstance(value, int):
    return f'{key}={draw(st.integers(0, 40) | st.just(_LARGE))}'
  if isinstance(value, float):
    return f'{key}={draw(st.sampled_from([0, 1e-6, 0.5, 1, 3, 1e6]))}'
  if isinstance(value, tuple):
    return f'{key}={draw(st.lists(st.integers(0, 3), max_size=3))}'
  field = {k: f for k, _, f in config.settings(cfg)}[key]
  choices = [*field.metadata.get('choices', ()), value]
  return f'{key}={draw(st.sampled_from(choices))}'


def test_settings_that_are_accepted_make_a_model(campaign, tmp_path):
  """Or are refused before anything is compiled."""
  cfg = tiny_run.make_config(tmp_path, 'model.num_layers=1')
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  size = campaign.size(12, 300)

  def make(overrides):
    changed = config.override(cfg, overrides)
    with jax.set_mesh(mesh):
      try:
        step.init(changed, mesh)
      except (ValueError, NotImplementedError) as e:  # as the loop takes them
        assert '\n' not in str(e), str(e)
        raise config.UserError(str(e)) from e

  def inject() -> str:
    outcomes = Outcomes()

    @hypothesis.settings(
        max_examples=size, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.lists(_small_override(cfg), min_size=1, max_size=3))
    def check(overrides):
      outcomes.read(lambda: make(overrides))

    check()
    return str(outcomes)

  campaign.run('inputs', 'models of settings', inject)


def test_config_files(campaign, tmp_path):
  path = tmp_path / 'config.json'
  whole = config.to_json(config.Config())
  files = _changed(whole.encode()) | _replaced(json.loads(whole)).map(_json)

  def load(data):
    path.write_bytes(data)
    config.load(path)

  _try(campaign, 'config files', files, load)


# Data.


def _read(cfg: config.Config) -> None:
  """Read documents as training does before it compiles."""
  encode.check(cfg)
  vocabulary = encode.build_vocabulary(cfg)
  documents = pipeline.open_all(cfg, vocabulary)
  pipeline.summary(cfg, vocabulary, documents)
  iterator = pipeline.train_iterator(cfg, vocabulary, documents=documents)
  try:
    next(iterator)
  finally:
    iterator.close()


@pytest.fixture
def data(tmp_path):
  """A folder with data, and what reads a file in place of its documents."""
  fixed = tiny_run.make_config(tmp_path)
  vocabulary = tmp_path / 'vocabulary'
  encode.build_vocabulary(fixed).save(vocabulary)
  codebook = vocabulary / 'codebook.npz'

  def read(kind: str, content: bytes):
    path = tmp_path / f'generated.{kind}'
    path.write_bytes(content)
    _read(config.override(fixed, [
        f'data.sources={kind}:{path}', f'data.tokenizer.image={codebook}']))

  return tmp_path, read


def test_json_lines(campaign, data):
  folder, read = data
  whole = (folder / 'documents.jsonl').read_bytes()
  good = whole.split(b'\n')[0]
  lines = st.lists(JSON.map(_json) | st.just(good) | _replaced(
      {'parts': [{'text': 'a'}, {'image': '0.png'}], 'key': 'k'}).map(_json),
      max_size=5).map(b'\n'.join)
  _try(campaign, 'JSONL', _changed(whole) | lines,
       lambda content: read('jsonl', content))


def test_parquet(campaign, data):
  import pyarrow as pa
  from pyarrow import parquet
  folder, read = data
  picture = (folder / '0.png').read_bytes()

  def file(rows: Any) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pa.table(rows), sink)
    return sink.getvalue()

  whole = file({'text': ['some words'] * 30,
                'image': [{'bytes': picture, 'path': None}] * 30})
  column = st.lists(
      st.none() | TEXTS.map(lambda x: x.encode('utf-8', 'replace').decode()),
      min_size=4, max_size=4) | st.lists(
          st.none() | st.integers(-5, 5), min_size=4, max_size=4) | st.lists(
              st.none() | st.fixed_dictionaries({
                  'bytes': st.none() | st.just(picture) | st.binary(max_size=9),
                  'path': st.none() | st.sampled_from(['0.png', 'no', '..'])}),
              min_size=4, max_size=4)
  tables = st.dictionaries(
      st.sampled_from(['text', 'image', 'parts', 'key', 'x']), column,
      min_size=1, max_size=3).map(file)
  _try(campaign, 'Parquet', _changed(whole) | tables,
       lambda content: read('parquet', content))


def test_images(campaign, data):
  folder, read = data
  picture = Image.open(folder / '0.png')
  wholes = []
  for kind, mode in [('PNG', 'RGBA'), ('PNG', 'I;16'), ('PNG', 'P'),
                     ('JPEG', 'RGB'), ('GIF', 'P'), ('TIFF', 'F'),
                     ('WEBP', 'RGB'), ('BMP', 'L'), ('PPM', 'RGB')]:
    file = io.BytesIO()
    source = picture if mode != 'I;16' else Image.fromarray(
        np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000)
    (source if mode == 'I;16' else source.convert(mode)).save(file, kind)
    wholes.append(file.getvalue())
  words = json.dumps({'text': 'a few words that are always there'}).encode()

  def act(content):
    (folder / 'generated.png').write_bytes(content)
    read('jsonl', b'\n'.join([b'{"image": "generated.png"}', words] * 8))

  _try(campaign, 'images', st.sampled_from(wholes).flatmap(_changed), act)


def test_tokenizer_files(campaign, data):
  folder, _ = data
  path = folder / 'generated.json'
  whole = text.fit(['some words and other words'] * 20, 280)
  files = _changed(whole) | _replaced(json.loads(whole)).map(_json)

  def load(content):
    path.write_bytes(content)
    tokenizer = text.load(str(path))
    tokenizer.decode(tokenizer.encode('words, é \U0001f600').tolist())

  _try(campaign, 'tokenizers', files, load)


# Runs and published models.


@pytest.fixture
def run(tmp_path):
  return untrained_run.make(
      tmp_path, 'model.pattern=attention/mlp', 'model.num_layers=1')


def test_prompts(campaign, run, tmp_path):
  vocabulary = tokenizers.load(run)
  cfg = checkpoint.read_config(run)
  path = tmp_path / 'prompts.txt'
  pictures = st.sampled_from(['0.png', 'documents.jsonl', 'no.png', '.'])

  def read(given):
    content, prompts, images, stop = given
    path.write_bytes(content)
    composed = generate.compose(
        generate.read_prompts(prompts, str(path)),
        [str(tmp_path / image) for image in images])
    tokens = [generate.encode(prompt, vocabulary) for prompt in composed]
    generate.stop_tokens(stop, vocabulary)
    generate.check_length(cfg, tokens, 5, 0)

  lines = st.text(max_size=60).map(lambda x: x.encode('utf-8', 'replace'))
  _try(campaign, 'prompts', st.tuples(
      st.binary(max_size=40) | lines | st.just(b'words\nand <draw>\n'),
      st.lists(TEXTS, max_size=2), st.lists(pictures, max_size=2),
      st.lists(TEXTS, max_size=1)), read)


def test_files_of_a_run(campaign, run):
  files = ['config.json', 'vocabulary.json', 'codebook.npz', 'metrics.jsonl']
  wholes = {name: (run / name).read_bytes() for name in files}

  def load(given):
    name, content = given
    (run / name).write_bytes(content)
    try:
      if name == 'metrics.jsonl':
        eta.eta([str(run)], str(run), run)
      else:
        checkpoint.load_params(run)
        tokenizers.load(run)
    finally:
      (run / name).write_bytes(wholes[name])

  _try(campaign, 'files of a run', st.sampled_from(files).flatmap(
      lambda name: st.tuples(st.just(name), _changed(wholes[name]))), load)


KINDS = sorted(published.PUBLISHED)


def test_published_configs(campaign):
  wholes = {kind: published.config_of(kind) for kind in KINDS}
  _try(campaign, 'published configs', st.sampled_from(KINDS).flatmap(
      lambda kind: _replaced(wholes[kind])), hf.settings.config_from_hf)


def test_published_files(campaign, tmp_path):
  """config.json and the header of model.safetensors, as bytes."""
  cfg = hf.settings.config_from_hf(published.config_of('gated_deltanet'))
  hf.files.save(tmp_path, cfg, published.random(cfg))
  wholes = {name: (tmp_path / name).read_bytes()
            for name in ('config.json', 'model.safetensors')}
  tensors = wholes['model.safetensors']
  size = 8 + struct.unpack('<Q', tensors[:8])[0]

  def load(given):
    name, content = given
    (tmp_path / name).write_bytes(content)
    try:
      hf.files.load(tmp_path)
    finally:
      (tmp_path / name).write_bytes(wholes[name])

  header = _replaced(json.loads(tensors[8:size])).map(_json).map(
      lambda x: struct.pack('<Q', len(x)) + x)
  _try(campaign, 'published files', st.tuples(
      st.just('config.json'), _changed(wholes['config.json'])) | st.tuples(
          st.just('model.safetensors'),
          (_changed(tensors[:size]) | header).map(
              lambda x: x + tensors[size:])), load)


# Real commands.


def _command(tmp_path: pathlib.Path, module: list[str], *flags: str) -> str:
  """Run a command; return whether it used or refused what it was given."""
  before = _all_files(tmp_path)
  done = subprocess.run(
      [sys.executable, *module, *flags], capture_output=True, text=True,
      timeout=120, cwd=tmp_path, stdin=subprocess.DEVNULL,
      env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'})
  assert done.returncode in (0, 2), (flags, done.stderr)
  assert 'Traceback' not in done.stderr, (flags, done.stderr)
  if done.returncode:
    last = done.stderr.strip().split('\n')[-1]
    assert last.startswith('error: '), (flags, done.stderr)
  after = _all_files(tmp_path)
  assert {k: after.get(k) for k in before} == before, 'a file was lost'
  return 'used' if done.returncode == 0 else 'refused'


def _all_files(folder: pathlib.Path) -> dict[str, bytes]:
  return {str(p): p.read_bytes() for p in folder.rglob('*')
          if p.is_file() and 'cache' not in p.parts}


def _flag_text(value: str) -> str:
  """A text that a command line can hold."""
  return value.replace('\0', '').encode('utf-8', 'replace').decode()


def test_commands(campaign, tmp_path):
  cfg = tiny_run.make_config(
      tmp_path, 'model.pattern=attention/mlp', 'model.num_layers=1',
      'train.steps=1', 'train.eval_every=0')
  (tmp_path / 'base.json').write_text(config.to_json(cfg))
  run = untrained_run.make(
      tmp_path, 'model.pattern=attention/mlp', 'model.num_layers=1')
  model = hf.settings.config_from_hf(published.config_of('gated_deltanet'))
  hf.files.save(tmp_path / 'published', model, published.random(model))
  lines = (tmp_path / 'documents.jsonl').read_bytes()
  published_config = (tmp_path / 'published' / 'config.json').read_bytes()
  number = iter(range(10**6))

  def train(draw):
    (tmp_path / 'given.jsonl').write_bytes(draw(_changed(lines)))
    return ['-m', 'mom_jax.train'], [
        f'--config={tmp_path}/base.json', f'--workdir=runs/{next(number)}',
        f'--config.data.sources=jsonl:{tmp_path}/given.jsonl',
        *(f'--config.{_flag_text(draw(_override()))}'
          for _ in range(draw(st.integers(0, 1))))]

  def prepare(draw):
    (tmp_path / 'given.jsonl').write_bytes(draw(_changed(lines)))
    return [str(ROOT / 'scripts' / 'prepare_data.py')], [
        f'--config={tmp_path}/base.json', f'--out=shards/{next(number)}',
        f'--shards={draw(st.integers(-1, 3))}',
        f'--config.data.sources=jsonl:{tmp_path}/given.jsonl']

  def sample(draw):
    return ['-m', 'mom_jax.generate'], [
        f'--workdir={run}', f'--output=out/{next(number)}',
        f'--max_new_tokens={draw(st.sampled_from([1, 2, 0, -1, "x"]))}',
        f'--prompt={_flag_text(draw(TEXTS))}',
        f'--temperature={draw(st.sampled_from([1, 0, -1, "nan"]))}']

  def evaluate(draw):
    return ['-m', 'mom_jax.evaluate'], [
        f'--workdir={run}', f'--output=out/{next(number)}',
        f'--task={_flag_text(draw(TEXTS | st.sampled_from(["loss", "eta"])))}']

  def convert(draw):
    (tmp_path / 'published' / 'config.json').write_bytes(
        draw(_changed(published_config)))
    return ['-m', 'mom_jax.convert'], [
        f'--from_hf={tmp_path}/published', f'--workdir=runs/{next(number)}']

  for name, make in dict(train=train, prepare_data=prepare, generate=sample,
                         evaluate=evaluate, convert=convert).items():
    if campaign.size(name not in ('train', 'convert'), False):
      continue

    def inject(make=make) -> str:
      outcomes = collections.Counter()

      @hypothesis.settings(
          max_examples=campaign.size(2, COMMANDS), deadline=None, database=None,
          derandomize=True, suppress_health_check=list(hypothesis.HealthCheck),
          phases=[hypothesis.Phase.generate])
      @hypothesis.given(st.data())
      def check(data):
        module, flags = make(data.draw)
        outcomes[_command(tmp_path, module, *flags)] += 1

      check()
      return (f'{sum(outcomes.values())} commands: {outcomes["used"]} used,'
              f' {outcomes["refused"]} refused')

    campaign.run('inputs', f'command {name}', inject)
