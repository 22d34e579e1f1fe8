"""Text tokenizers, image codebooks and the joint vocabulary."""

import json
import sys
import types

import numpy as np
import pytest

from mom_jax import config
from mom_jax.data import encode, images, pipeline, text, tokenizers

TEXTS = ['', 'plain', 'ünïcödé \U0001f600 漢字', 'line\nline\ttab\0zero']
CORPUS = ['the quick brown fox jumps over the lazy dog', 'pack my box'] * 30


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A Hugging Face and a SentencePiece tokenizer of a few hundred ids."""
  import sentencepiece
  import tokenizers as hf
  folder = tmp_path_factory.mktemp('tokenizers')
  bpe = hf.Tokenizer(hf.models.BPE())
  bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
  bpe.decoder = hf.decoders.ByteLevel()
  bpe.train_from_iterator(CORPUS, hf.trainers.BpeTrainer(
      vocab_size=300, show_progress=False,
      initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
  bpe.save(str(folder / 'bpe.json'))
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CORPUS), model_prefix=str(folder / 'piece'),
      vocab_size=300, byte_fallback=True, hard_vocab_limit=False,
      normalization_rule_name='identity', add_dummy_prefix=False,
      remove_extra_whitespaces=False, minloglevel=2)
  return {'bytes': 'bytes', 'json': str(folder / 'bpe.json'),
          'model': str(folder / 'piece.model')}


@pytest.mark.parametrize('kind', ['bytes', 'json', 'model'])
def test_text_round_trip(files, kind):
  tokenizer = text.load(files[kind])
  for value in TEXTS:
    ids = tokenizer.encode(value)
    assert ids.dtype == np.int32
    assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.size
    assert tokenizer.decode(ids.tolist()) == value


def test_bytes_of_broken_text_are_marked():
  tokenizer = text.load('bytes')
  assert tokenizer.decode([97, 0xFF, 98]) == 'a\ufffdb'


@pytest.mark.parametrize('kind', ['bytes', 'json', 'model'])
def test_lone_surrogates_become_question_marks(files, kind):
  tokenizer = text.load(files[kind])
  assert tokenizer.decode(tokenizer.encode('a\ud800b').tolist()) == 'a?b'


@pytest.mark.parametrize('kind', ['bytes', 'json', 'model'])
def test_saved_vocabulary_gives_the_same_tokens(
    files, kind, vocabulary, tmp_path):
  """A run can generate from its own folder, without the data."""
  made = tokenizers.Vocabulary(text.load(files[kind]), vocabulary.image)
  made.save(tmp_path)
  loaded = tokenizers.load(tmp_path)
  image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  parts = ['a fox ', image, TEXTS[2]]
  np.testing.assert_array_equal(made.encode(parts), loaded.encode(parts))
  assert loaded.fingerprint == made.fingerprint
  tokens = made.encode(parts)
  for one, other in zip(made.decode(tokens), loaded.decode(tokens)):
    np.testing.assert_array_equal(one, other)


def test_vocabulary_layout(vocabulary, cfg):
  v = vocabulary
  assert (v.pad, v.eos, v.boi, v.eoi, v.image_start) == (
      256, 257, 258, 259, 260)
  assert v.size == 772 == cfg.model.vocab_size and v.codes == 512
  image = np.zeros((16, 16, 3), np.uint8)
  tokens = v.encode(['ab', image, 'c'])
  assert tokens[:4].tolist() == [v.eos, 97, 98, v.boi]
  assert tokens[-3:].tolist() == [v.eoi, 99, v.eos]
  assert len(tokens) == 1 + 2 + 66 + 1 + 1
  expected = np.zeros(len(tokens))
  expected[4:68] = 1
  np.testing.assert_array_equal(v.modality(tokens), expected)
  assert v.encode(['ab'], end=False).tolist() == [v.eos, 97, 98]


def test_vocabulary_decodes_parts_in_order(vocabulary):
  v = vocabulary
  codes = np.arange(64, dtype=np.int32)[None]
  image = v.image.decode(codes)[0]
  tokens = np.concatenate([
      [v.eos], v.encode_text('one'), [v.boi], codes[0] + v.image_start,
      [v.eoi], v.encode_text('two'), [v.eos], [v.pad],
  ])
  one, middle, two = v.decode(tokens)
  assert (one, two) == ('one', 'two')
  np.testing.assert_array_equal(middle, image)
  assert v.decode(tokens[:20]) == ['one', '[image: 15 of 64 codes]']
  with pytest.raises(ValueError, match='outside the vocabulary'):
    v.decode([v.size])


def test_codebook_keeps_held_out_pictures(vocabulary, cfg):
  """Pictures that the fit has not seen survive with 23.5 dB or more."""
  train, held = pipeline.pairs(cfg)
  assert len(held) > 150 and len(train) > 3500
  seen = {image.tobytes() for _, image in train}
  unseen = np.stack([i for _, i in held if i.tobytes() not in seen])
  assert len(unseen) == len(held)
  assert images.psnr(vocabulary.image, unseen) >= 23.5


def test_fit_is_deterministic(cfg):
  _, held = pipeline.pairs(cfg)
  pixels = np.stack([image for _, image in held])
  settings = config.Tokenizer(codes=32)
  one, other = (images.fit(pixels, settings) for _ in range(2))
  np.testing.assert_array_equal(one.codebook_CD, other.codebook_CD)


def test_codebook_round_trip_is_the_nearest_patch(vocabulary):
  """Images made of codes come back unchanged, and codes are nearest."""
  rng = np.random.default_rng(0)
  tokenizer = vocabulary.image
  drawn = tokenizer.decode(rng.integers(0, 512, (5, 64), np.int32))
  np.testing.assert_array_equal(
      tokenizer.decode(tokenizer.encode(drawn)), drawn)
  noise = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
  patches = images.to_patches(noise, 2).astype(np.float64)
  distance = ((patches[:, None] - tokenizer.codebook_CD[None]) ** 2).sum(-1)
  np.testing.assert_array_equal(
      tokenizer.encode(noise).ravel(), distance.argmin(1))


def test_codebook_file(vocabulary, cfg, tmp_path):
  path = tmp_path / 'codebook.npz'
  vocabulary.image.save(path)
  own = config.override(cfg, [f'data.tokenizer.image={path}'])
  assert encode.build_vocabulary(own).fingerprint == vocabulary.fingerprint
  other = config.override(own, ['data.tokenizer.codes=100'])
  with pytest.raises(config.UserError, match='codes=512'):
    encode.build_vocabulary(other)
  path.write_bytes(path.read_bytes()[:1000])
  with pytest.raises(config.UserError, match='must be an .npz'):
    encode.build_vocabulary(own)
  np.savez(path, codebook=np.zeros((512, 11)), patch=2, image_size=16)
  with pytest.raises(config.UserError, match='codebook must be'):
    encode.build_vocabulary(own)
  np.savez_compressed(path, codebook=np.zeros((2**23, 12), np.float32))
  assert path.stat().st_size < 2**20
  with pytest.raises(config.UserError, match='unpacks to 402,653,'):
    encode.build_vocabulary(own)
  path.unlink()
  with pytest.raises(config.UserError, match='no such file'):
    encode.build_vocabulary(own)


def test_own_image_tokenizer_is_plugged_in(
    monkeypatch, cfg, vocabulary, tmp_path):
  module = types.ModuleType('my_vq')
  module.make = lambda: images.PatchCodebook(
      np.arange(96).reshape(8, 12), 2, 16)
  module.broken = lambda: 3
  monkeypatch.setitem(sys.modules, 'my_vq', module)
  own = config.override(cfg, ['data.tokenizer.image=my_vq:make'])
  assert encode.build_vocabulary(own).codes == 8
  for name, says in [('my_vq:broken', 'returned a int'),
                     ('my_vq:none', 'cannot be imported'),
                     ('no_vq:make', 'cannot be imported')]:
    with pytest.raises(config.UserError, match=says):
      encode.build_vocabulary(
          config.override(cfg, [f'data.tokenizer.image={name}']))


def test_files_call_a_function_only_if_the_user_names_it(
    monkeypatch, cfg, tmp_path):
  module = types.ModuleType('my_vq')
  module.make = lambda: types.SimpleNamespace(
      codes=8, image_size=16, tokens_per_image=64, fingerprint='mine',
      encode=lambda images: np.zeros((len(images), 64), np.int32),
      decode=lambda codes: np.zeros((len(codes), 16, 16, 3), np.uint8))
  monkeypatch.setitem(sys.modules, 'my_vq', module)
  name = 'my_vq:make'
  own = config.override(cfg, [f'data.tokenizer.image={name}'])
  made = encode.build_vocabulary(own)
  made.save(tmp_path)
  (tmp_path / 'config.json').write_text(config.to_json(own))
  given = [f'data.tokenizer.image={name}']
  assert tokenizers.load(tmp_path, name).fingerprint == made.fingerprint
  assert config.load(tmp_path / 'config.json', given) == own
  path = tmp_path / 'of 10:30.json'
  path.write_text(config.to_json(config.override(
      cfg, ['data.tokenizer.image=of 10:30.npz'])))
  assert config.load(path).data.tokenizer.image == 'of 10:30.npz'
  module.make = lambda: pytest.fail('called')
  for other in ('', 'my_vq:other'):
    with pytest.raises(config.UserError, match=(
        "if you trust it, set --config.data.tokenizer.image=my_vq:make")):
      tokenizers.load(tmp_path, other)
    with pytest.raises(config.UserError, match=(
        'names code, .* add --config.data.tokenizer.image=my_vq:make')):
      config.load(tmp_path / 'config.json')


def test_small_model_vocabulary_is_named(cfg):
  small = config.override(cfg, ['model.vocab_size=771'])
  with pytest.raises(config.UserError, match='--config.model.vocab_size=772'):
    encode.build_vocabulary(small)


def test_too_few_patches_are_named(of_file, tmp_path):
  from PIL import Image
  Image.new('RGB', (16, 16)).save(tmp_path / 'a.png')
  path = tmp_path / 'x.jsonl'
  path.write_text('{"text": "a", "image": "a.png"}')
  with pytest.raises(config.UserError, match='codes=64 exceeds the 1 '):
    encode.build_vocabulary(of_file(f'jsonl:{path}'))


@pytest.mark.parametrize('name, content, says', [
    ('x.json', '{', 'no readable .json tokenizer'),
    ('x.model', 'abc', 'no readable .model tokenizer'),
    ('x.txt', '', "must be 'bytes'"),
    ('x.json', None, 'no such file'),
])
def test_bad_text_tokenizers_are_named(tmp_path, name, content, says):
  if content is not None:
    (tmp_path / name).write_text(content)
  with pytest.raises(config.UserError, match='config.data.tokenizer.text') as e:
    text.load(str(tmp_path / name))
  assert says in str(e.value)


@pytest.mark.parametrize('kind, package', [
    ('json', 'tokenizers'), ('model', 'sentencepiece')])
def test_missing_tokenizer_package_is_named(
    monkeypatch, files, kind, package):
  monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(config.UserError, match=f'pip install {package}'):
    text.load(files[kind])


def test_damaged_saved_vocabulary_is_named(vocabulary, tmp_path):
  with pytest.raises(config.UserError, match='workdir of a training run'):
    tokenizers.load(tmp_path)
  vocabulary.save(tmp_path)
  images.PatchCodebook(vocabulary.image.codebook_CD + 1, 2, 16).save(
      tmp_path / tokenizers.CODEBOOK)
  with pytest.raises(config.UserError, match='not those that were saved'):
    tokenizers.load(tmp_path)


def _saved(folder, model, trainer, ask=lambda tokenizer: None, blanks=True):
  import tokenizers as hf
  tokenizer = hf.Tokenizer(model)
  tokenizer.pre_tokenizer = (hf.pre_tokenizers.Whitespace() if blanks
                             else hf.pre_tokenizers.ByteLevel())
  tokenizer.train_from_iterator(CORPUS, trainer)
  ask(tokenizer)
  path = folder / 'tokenizer.json'
  tokenizer.save(str(path))
  return text.load(str(path))


@pytest.mark.parametrize('ask', [
    lambda t: t.enable_truncation(8),
    lambda t: t.enable_padding(length=500),
    lambda t: t.enable_padding(pad_to_multiple_of=64),
    lambda t: setattr(t.model, 'dropout', 0.5),
], ids=['truncation', 'padding', 'multiple', 'dropout'])
def test_settings_for_batches_do_not_change_texts(tmp_path, ask):
  """The whole text, nothing else, the same each time, also after saving."""
  import tokenizers as hf

  def load(ask):
    return _saved(
        tmp_path, hf.models.BPE(), hf.trainers.BpeTrainer(
            vocab_size=300, show_progress=False,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()),
        ask, blanks=False)

  wanted = load(lambda t: None).encode(CORPUS[0] * 5)
  tokenizer = load(ask)
  for _ in range(5):
    np.testing.assert_array_equal(tokenizer.encode(CORPUS[0] * 5), wanted)
  assert not tokenizer.unknown('any é \U0001f600', wanted)
  tokenizers.Vocabulary(tokenizer, None).save(tmp_path / 'saved')
  again = tokenizers.load(tmp_path / 'saved').text
  np.testing.assert_array_equal(again.encode(CORPUS[0] * 5), wanted)
  held = json.loads((tmp_path / 'saved' / 'text.json').read_text())
  assert not held['truncation'] and not held['padding']


def _gaps():
  import tokenizers as hf
  m, t, quiet = hf.models, hf.trainers, {'show_progress': False}
  named = quiet | {'special_tokens': ['[UNK]']}
  return {
      'bpe': (m.BPE(), t.BpeTrainer(vocab_size=60, **quiet)),
      'bpe, unknown': (
          m.BPE(unk_token='[UNK]'), t.BpeTrainer(vocab_size=60, **named)),
      'words, unknown': (
          m.WordLevel(unk_token='[UNK]'), t.WordLevelTrainer(**named)),
      'pieces, unknown': (
          m.WordPiece(unk_token='[UNK]'),
          t.WordPieceTrainer(vocab_size=60, **named)),
      'unigram, unknown': (m.Unigram(), t.UnigramTrainer(
          vocab_size=60, unk_token='[UNK]', **named)),
  }


@pytest.mark.parametrize('kind', _gaps())
def test_characters_without_a_token_are_counted(tmp_path, of_file, kind):
  tokenizer = _saved(tmp_path, *_gaps()[kind])
  known = 'the quick brown fox'
  assert tokenizer.unknown(known, tokenizer.encode(known)) == ''
  for value, wanted in [('fox éü box', 'éü'), ('漢字', '漢字'), ('', '')]:
    found = tokenizer.unknown(value, tokenizer.encode(value))
    assert found.strip() == wanted
  path = tmp_path / 'x.jsonl'
  path.write_text(json.dumps({'text': known}) + '\n{"text": "fox éü"}')
  cfg = of_file(f'jsonl:{path}', 'data.validation=0',
                f'data.tokenizer.text={tmp_path}/tokenizer.json')
  opened = encode.open_documents(
      f'jsonl:{path}', cfg, encode.build_vocabulary(cfg))
  (reason, left_out), = opened.tally.left_out.items()
  assert 'does not know' in reason and left_out.count == 2
  assert left_out.example == f"'é' in {path} document 1"
  path.write_text('{"text": "' + '漢字' * 30 + ' fox"}')
  with pytest.raises(config.UserError, match='60 of its 64 characters cannot'):
    pipeline.train_iterator(cfg)


def test_sentencepiece_without_bytes_counts_unknown_characters(tmp_path):
  import sentencepiece
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(CORPUS), model_prefix=str(tmp_path / 'piece'),
      vocab_size=60, hard_vocab_limit=False, minloglevel=2)
  tokenizer = text.load(str(tmp_path / 'piece.model'))
  for value, wanted in [('the fox', ''), ('a 漢字 b', '漢字')]:
    assert tokenizer.unknown(value, tokenizer.encode(value)) == wanted


def test_a_tokenizer_that_refuses_a_text_is_named(tmp_path):
  import tokenizers as hf
  tokenizer = _saved(tmp_path, hf.models.WordLevel(),
                     hf.trainers.WordLevelTrainer(show_progress=False))
  with pytest.raises(config.UserError, match="cannot encode 'é'"):
    tokenizer.encode('é')


@pytest.mark.parametrize('name', [
    'bpe:' + '9' * 5000, 'symbols:' + '9' * 5000, 'symbols:0'])
def test_absurd_sizes_are_named(of_file, tmp_path, name):
  cfg = config.override(
      of_file(_captions(tmp_path / 'x.jsonl', 5)),
      [f'data.tokenizer.text={name}'])
  with pytest.raises(config.UserError, match='must be '):
    encode.build_vocabulary(cfg)
  with pytest.raises(config.UserError, match="'999.* is no symbol"):
    text.load('symbols:4').encode('9' * 5000)


def test_text_alone_needs_no_image_codes(text_file, of_file):
  cfg = of_file(f'jsonl:{text_file}', 'model.vocab_size=260')
  vocabulary = encode.build_vocabulary(cfg)
  assert vocabulary.size == 260 and vocabulary.image is None


def _captions(path, count):
  path.write_text(''.join(
      json.dumps({'text': f'{CORPUS[i % len(CORPUS)]} {i}'}) + '\n'
      for i in range(count)))
  return f'jsonl:{path}'


def test_bpe_is_fitted_on_training_texts_and_kept(of_file, tmp_path):
  spec = _captions(tmp_path / 'x.jsonl', 60)
  ask = ['data.tokenizer.text=bpe:320', f'data.cache={tmp_path / "cache"}']
  cfg = config.override(of_file(spec), ask)
  made = encode.build_vocabulary(cfg)
  assert made.text.size == 320
  for value in TEXTS:
    assert made.text.decode(made.text.encode(value).tolist()) == value
  shorter = len(made.text.encode(CORPUS[0])) / len(CORPUS[0].encode())
  assert shorter < 0.8
  kept = sorted((tmp_path / 'cache').glob('bpe-320-*'))
  assert len(kept) == 1
  again = encode.build_vocabulary(cfg)  # from the cache
  fresh = encode.build_vocabulary(
      config.override(cfg, [f'data.cache={tmp_path / "other"}']))
  assert made.fingerprint == again.fingerprint == fresh.fingerprint


def test_bpe_counts_every_source_alike(of_file, tmp_path):
  """A word of the smaller source becomes a token as well."""
  small, large = tmp_path / 'small.jsonl', tmp_path / 'large.jsonl'
  small.write_text(
      ''.join(f'{{"text": "quixotic {i}"}}\n' for i in range(20)))
  large.write_text(
      ''.join(f'{{"text": "common words {i} go on"}}\n' for i in range(2000)))
  cfg = config.override(of_file(f'jsonl:{large}'), [
      'data.tokenizer.text=bpe:290', 'data.weights=1,1',
      f'data.sources=jsonl:{large},jsonl:{small}'])
  assert len(encode.build_vocabulary(cfg).text.encode('quixotic')) == 1


@pytest.mark.parametrize('name', ['bpe', 'bpe:', 'bpe:256', 'bpe:many'])
def test_bad_sizes_of_bpe_are_named(of_file, tmp_path, name):
  cfg = config.override(
      of_file(_captions(tmp_path / 'x.jsonl', 5)),
      [f'data.tokenizer.text={name}'])
  with pytest.raises(config.UserError, match="must be 'bpe:SIZE'"):
    encode.build_vocabulary(cfg)
