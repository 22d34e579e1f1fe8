"""Nothing executes what it reads, and nothing is unpacked without a limit.

Data, checkpoints, configs, vocabularies and published models may come from
anybody. A recipe (.py) is code and said to be; so is a function that the user
names himself.
"""

import ast
import contextlib
import json
import pathlib
import pickle
import struct
import zlib

from absl import flags
import numpy as np
from PIL import Image
import published
import pytest
import tiny_run
import untrained_run

from mom_jax import config, convert, evaluate, generate, hf, train
from mom_jax.data import encode, images, pipeline, prepare, tokenizers

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = [f for folder in ('mom_jax', 'scripts')
           for f in sorted((ROOT / folder).rglob('*.py'))]
# Modules that run what they load.
RUN = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'marshal',
       'shelve', 'yaml', 'runpy', 'code', 'codeop'}
CALLS = {'eval', 'exec', 'compile', '__import__'}
# Where code is loaded that the user names: a recipe, an image tokenizer; and
# parts of the library itself, by name.
LOADERS = {
    'import_module': {'mom_jax/data/images.py', 'scripts/tpu_static.py'},
    'spec_from_file_location': {'mom_jax/config.py', 'scripts/tpu_static.py'},
    'exec_module': {'mom_jax/config.py', 'scripts/tpu_static.py'},
}


def _name(function: ast.expr) -> str:
  return getattr(function, 'id', getattr(function, 'attr', ''))


@pytest.mark.parametrize(
    'file', SOURCES, ids=lambda f: f.relative_to(ROOT).as_posix())
def test_no_source_runs_what_it_reads(file):
  where = file.relative_to(ROOT).as_posix()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      assert not RUN & {a.name.split('.')[0] for a in node.names}
    if isinstance(node, ast.ImportFrom):
      assert (node.module or '').split('.')[0] not in RUN
    if not isinstance(node, ast.Call):
      continue
    name, line = _name(node.func), f'{where}:{node.lineno}'
    if isinstance(node.func, ast.Name):
      assert name not in CALLS, line
    assert where in LOADERS.get(name, {where}), line
    settings = {k.arg: k.value for k in node.keywords}
    assert 'trust_remote_code' not in settings, line
    if name == 'load' and _name(getattr(node.func, 'value', node)) == 'np':
      allowed = settings.get('allow_pickle')
      assert isinstance(allowed, ast.Constant) and not allowed.value, line


def test_the_list_of_loaders_is_true():
  called = {
      (_name(node.func), file.relative_to(ROOT).as_posix())
      for file in SOURCES for node in ast.walk(ast.parse(file.read_text()))
      if isinstance(node, ast.Call)}
  for name, files in LOADERS.items():
    for file in files:
      assert (name, file) in called, (name, file)


class Bomb:
  """An object whose pickle writes a file where it is loaded."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __reduce__(self):
    return pathlib.Path.touch, (self._path,)


@pytest.fixture
def executed(tmp_path, monkeypatch):
  """A file that exists once a bomb has gone off, and a module that is one."""
  path = tmp_path / 'executed'
  (tmp_path / 'bomb.py').write_text(
      f'import pathlib\npathlib.Path({str(path)!r}).touch()\n'
      f'def go():\n  pathlib.Path({str(path)!r}).touch()\n')
  monkeypatch.syspath_prepend(str(tmp_path))
  yield path
  assert not path.exists(), 'what was read has been executed'


def _bombs(executed: pathlib.Path) -> np.ndarray:
  array = np.empty(1, object)
  array[0] = Bomb(executed)
  return array


def test_the_bomb_is_one(tmp_path):
  path = tmp_path / 'executed'
  pickle.loads(pickle.dumps(Bomb(path)))
  assert path.exists()


@pytest.fixture
def run(tmp_path):
  """A workdir without training."""
  return untrained_run.make(
      tmp_path, 'model.pattern=attention/mlp', 'model.num_layers=1')


def _name_code(workdir: pathlib.Path) -> None:
  """Make the vocabulary and config of a run name a function."""
  for name in ('vocabulary.json', 'config.json'):
    values = json.loads((workdir / name).read_text())
    (values if name == 'vocabulary.json' else values['data']['tokenizer'])[
        'image'] = 'bomb:go'
    (workdir / name).write_text(json.dumps(values))


def test_no_command_calls_a_function_that_a_run_names(run, executed, tmp_path):
  _name_code(run)
  with pytest.raises(config.UserError, match='if you trust it'):
    tokenizers.load(run)
  with pytest.raises(config.UserError, match='names code'):
    config.load(run / 'config.json')
  for act in (
      lambda: evaluate.tasks.load(run),
      lambda: generate.run(run, [generate.Prompt(('a',), False)],
                           config.Sampling()),
      lambda: convert.to_hf(tmp_path / 'hf', run)):
    with pytest.raises(config.UserError):
      act()


def test_arrays_that_are_pickles_are_refused(executed, tmp_path):
  codebook = tmp_path / 'codebook.npz'
  np.savez(codebook, codebook=_bombs(executed), patch=2, image_size=4)
  with pytest.raises(config.UserError, match='must be an .npz'):
    images.load(str(codebook))
  cfg = tiny_run.make_config(tmp_path)
  shards = tmp_path / 'shards'
  for _ in prepare.prepare(cfg, str(shards), 1, 1):
    pass
  for file in shards.glob('*.npy'):
    np.save(file, _bombs(executed), allow_pickle=True)
  cfg = config.override(
      cfg, [f'data.sources=array_record:{shards}/*.array_record'])
  with pytest.raises(config.UserError, match='must hold the lengths'):
    pipeline.open_all(cfg, encode.build_vocabulary(cfg))


def test_a_cache_of_pickles_is_made_again(executed, tmp_path):
  cfg = tiny_run.make_config(tmp_path)
  wanted = encode.build_vocabulary(cfg).fingerprint
  files = list((tmp_path / 'cache').rglob('*.npz'))
  assert files
  for file in files:
    with np.load(file) as values:
      names = values.files
    np.savez(file, **{name: _bombs(executed) for name in names})
  assert encode.build_vocabulary(cfg).fingerprint == wanted


@pytest.fixture
def model(tmp_path):
  """The folder of a published model."""
  cfg = hf.settings.config_from_hf(published.config_of('gated_deltanet'))
  hf.files.save(tmp_path / 'published', cfg, published.random(cfg))
  return tmp_path / 'published'


@pytest.mark.parametrize('name', [
    'pytorch_model.bin', 'model.pt', 'model.safetensors'])
def test_published_models_that_are_pickles_are_refused(model, executed, name):
  (model / 'model.safetensors').unlink()
  (model / name).write_bytes(pickle.dumps(Bomb(executed)))
  with pytest.raises(config.UserError):
    hf.files.load(model)


def test_published_models_bring_no_code(model, executed, tmp_path):
  values = json.loads((model / 'config.json').read_text())
  values['auto_map'] = {'AutoModelForCausalLM': 'modeling.Model'}
  (model / 'config.json').write_text(json.dumps(values))
  (model / 'modeling.py').write_text((tmp_path / 'bomb.py').read_text())
  with contextlib.suppress(config.UserError):
    hf.files.load(model)


def test_documents_that_are_pickles_are_no_documents(executed, tmp_path):
  for ending in ('jsonl', 'parquet', 'txt'):
    path = tmp_path / f'documents.{ending}'
    path.write_bytes(pickle.dumps(Bomb(executed)))
    kind = 'text' if ending == 'txt' else ending
    cfg = tiny_run.make_config(tmp_path, f'data.sources={kind}:{path}')
    with pytest.raises(config.UserError):
      pipeline.open_all(cfg, encode.build_vocabulary(cfg))


def test_the_help_says_that_recipes_are_code():
  assert 'run as code' in ' '.join(config.load.__doc__.split())
  found = [flag.help for flag in flags.FLAGS.flags_by_module_dict()[
      train.__name__] if flag.name == 'config']
  assert len(found) == 1 and 'run as code' in found[0]


# Files that unpack to more than they are.


def _png(width: int, height: int) -> bytes:
  """The head of a PNG that claims a size."""
  def chunk(kind, data):
    body = kind + data
    return (struct.pack('>I', len(data)) + body
            + struct.pack('>I', zlib.crc32(body)))

  return (b'\x89PNG\r\n\x1a\n'
          + chunk(b'IHDR', struct.pack(
              '>IIBBBBB', width, height, 8, 2, 0, 0, 0))
          + chunk(b'IDAT', zlib.compress(b'\0' * 1000)) + chunk(b'IEND', b''))


def test_images_of_absurd_size_are_counted_and_left_out(tmp_path):
  tiny_run.write_data(tmp_path)
  (tmp_path / '0.png').write_bytes(_png(2**31 - 1, 2**31 - 1))
  (tmp_path / '1.png').write_bytes(_png(100_000, 100_000))
  cfg = tiny_run.make_config(tmp_path)
  vocabulary = encode.build_vocabulary(cfg)
  documents = pipeline.open_all(cfg, vocabulary)
  said = ' '.join(pipeline.summary(cfg, vocabulary, documents))
  assert '2 images left out' in said or '2 x' in said, said


def test_paths_of_images_cannot_leave_their_folder(tmp_path):
  secret = tmp_path / 'secret.png'
  Image.new('RGB', (4, 4), 'red').save(secret)
  folder = tmp_path / 'data'
  folder.mkdir()
  (folder / 'link.png').symlink_to(secret)
  lines = [{'text': f'a caption of some words {i}', 'image': path}
           for i, path in enumerate((
               '../secret.png', str(secret), 'x/../../secret.png'))]
  path = folder / 'documents.jsonl'
  path.write_text(''.join(json.dumps(x) + '\n' for x in lines))
  cfg = tiny_run.make_config(tmp_path, f'data.sources=jsonl:{path}')
  with pytest.raises(config.UserError, match='folder'):
    pipeline.open_all(cfg, encode.build_vocabulary(cfg))
