"""The command generate: prompts in, text and pictures out, errors in a line."""

import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import untrained_run

from mom_jax import config, generate, models
from mom_jax.data import images, text, tokenizers
from mom_jax.inference import decode, sampling
from mom_jax.training import checkpoint


def make_vocabulary(with_images=True):
  codebook_CD = np.repeat(np.arange(16) * 16, 12).reshape(16, 12)
  image = images.PatchCodebook(codebook_CD, patch=2, image_size=4)
  return tokenizers.Vocabulary(text.Bytes(), image if with_images else None)


VOCABULARY = make_vocabulary()


@pytest.fixture
def picture(tmp_path):
  path = tmp_path / 'red.png'
  Image.new('RGB', (9, 6), 'red').save(path)
  return path


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return untrained_run.make(
      tmp_path_factory.mktemp('generate'), 'model.pattern=attention/mlp')


def test_images_stand_where_the_prompt_has_marks(picture):
  made = generate.compose(
      ['a <image> b<draw>', '<image>'], [str(picture)] * 2)
  assert made == [
      generate.Prompt(('a ', picture, ' b'), True),
      generate.Prompt((picture,), False),
  ]


def test_images_without_marks_go_before_every_text(picture):
  made = generate.compose(['one', 'two'], [str(picture)])
  assert [p.parts for p in made] == [(picture, 'one'), (picture, 'two')]


def test_prompt_tokens(picture):
  v = VOCABULARY
  prompt, = generate.compose(['a<image>b<draw>'], [str(picture)])
  tokens = generate.encode(prompt, v)
  assert tokens[:3] == [v.eos, ord('a'), v.boi]
  assert tokens[7:] == [v.eoi, ord('b'), v.boi]
  assert all(t >= v.image_start for t in tokens[3:7])
  assert generate.encode(generate.Prompt((), False), v) == [v.eos]


def test_prompts_come_from_flags_and_file(tmp_path):
  file = tmp_path / 'p.txt'
  file.write_text('two\n\nthree \u2665\n', encoding='utf-8')
  assert generate.read_prompts(['one'], str(file)) == [
      'one', 'two', 'three \u2665']


def test_only_line_feeds_end_a_prompt(tmp_path):
  """As in JSON lines; other programs' separators are part of a text."""
  file = tmp_path / 'p.txt'
  wanted = ['a\u2028b', 'c\x0cd\x1ce', 'f\x85g\x0b', 'h\ri']
  file.write_bytes(b'\xef\xbb\xbf' + '\r\n'.join(wanted).encode() + b'\n\n')
  assert generate.read_prompts([], str(file)) == wanted


@pytest.mark.parametrize('prompts, images_, message', [
    (['<image>'], [], 'have 1 <image> and there are 0 --image'),
    (['a<draw>b'], [], '<draw> must be at the end'),
    (['a'], ['nowhere.png'], '--image=nowhere.png: no such file'),
])
def test_prompts_that_cannot_be_composed(prompts, images_, message):
  with pytest.raises(config.UserError, match=message):
    generate.compose(prompts, images_)


def test_a_missing_or_binary_file_of_prompts(tmp_path):
  with pytest.raises(config.UserError, match='no prompt; give --prompt'):
    generate.read_prompts([], None)
  with pytest.raises(config.UserError, match='cannot be read'):
    generate.read_prompts([], str(tmp_path / 'none'))
  (tmp_path / 'binary').write_bytes(b'\xff\xfe\x00')
  with pytest.raises(config.UserError, match='text file in UTF-8'):
    generate.read_prompts([], str(tmp_path / 'binary'))


def test_a_broken_picture_is_named(tmp_path, picture):
  broken = tmp_path / 'broken.png'
  broken.write_bytes(picture.read_bytes()[:50])
  for path in (broken, tmp_path / 'text.png'):
    if not path.exists():
      path.write_text('no picture')
    prompt, = generate.compose([''], [str(path)])
    with pytest.raises(config.UserError, match=f'{path.name} cannot be read'):
      generate.encode(prompt, VOCABULARY)


def test_a_model_of_text_takes_no_images(picture):
  for prompt in generate.compose(['<draw>'], []) + generate.compose(
      [''], [str(picture)]):
    with pytest.raises(config.UserError, match='trained on text only'):
      generate.encode(prompt, make_vocabulary(False))


def test_stop_texts_are_single_tokens():
  v = VOCABULARY
  assert generate.stop_tokens(['.', '<eoi>'], v) == (v.eos, ord('.'), v.eoi)
  with pytest.raises(config.UserError, match="--stop='ab' is 2 tokens"):
    generate.stop_tokens(['ab'], v)


def test_attention_bounds_the_length():
  cfg = config.override(config.Config(), [
      'model.pattern=mom/moma attention/mlp', 'data.seq_len=32'])
  assert generate.check_length(cfg, [[1] * 8], 24, 0) == 32
  assert generate.check_length(cfg, [[1] * 9], 24, 40) == 40
  with pytest.raises(config.UserError, match='prompt 2 has 9 tokens.*32'):
    generate.check_length(cfg, [[1], [1] * 9], 24, 0)
  assert generate.check_length(config.Config(), [[1] * 9999], 24, 0) is None


def test_text_appears_once_whole_characters_are_there(tmp_path):
  row = generate.RowDecoder(VOCABULARY, [], tmp_path / 'p')
  first, second = '\u00e9'.encode()
  assert row.feed([ord('a'), first]) == 'a'
  assert row.feed([second, ord('b')]) == '\u00e9b'
  assert row.feed([first]) == ''
  assert row.close() == '\ufffd'


def test_streamed_pieces_give_the_same_text(tmp_path):
  """However the tokens are cut, what is shown adds up to the decoded text."""
  tokens = 'a \u2665 b \u00e9\u00e8'.encode() + b'\xe2\x82 c'
  whole = VOCABULARY.text.decode(list(tokens))
  for size in (1, 2, 3, 5):
    row = generate.RowDecoder(VOCABULARY, [], tmp_path / 'p')
    shown = [row.feed(tokens[i:i + size])
             for i in range(0, len(tokens), size)]
    assert ''.join(shown) + row.close() == whole


def test_an_image_span_becomes_a_file(tmp_path):
  """Also one that the prompt began; its codes count."""
  v = VOCABULARY
  codes = [v.image_start + c for c in (1, 5, 9, 13)]
  row = generate.RowDecoder(v, [v.eos, v.boi, *codes[:2]], tmp_path / 'o' / 'p')
  assert row.feed([codes[2]]) == ''
  path = tmp_path / 'o' / 'p-image-1.png'
  assert row.feed([codes[3], v.eoi, ord('x')]) == f'[image 1 -> {path}]x'
  small, large = (np.array(Image.open(p)) for p in (
      path, path.with_name('p-image-1-x32.png')))
  np.testing.assert_array_equal(
      small, v.image.decode(np.array([[1, 5, 9, 13]]))[0])
  np.testing.assert_array_equal(large[::32, ::32], small)
  assert large.shape == (128, 128, 3)


def test_an_image_cut_off_is_said(tmp_path):
  v = VOCABULARY
  row = generate.RowDecoder(v, [], tmp_path / 'p')
  row.feed([v.boi, v.image_start])
  assert row.close() == '[image: 1 of 4 codes]'


def test_a_workdir_answers_prompts(workdir, picture, capsys):
  """Text and images of several prompts, from the checkpoint of a run."""
  prompts = generate.compose(['<image>what', 'a red square<draw>'],
                             [str(picture)])
  settings = config.Sampling(max_new_tokens=12)
  runs = []
  for _ in range(2):
    generate.run(workdir, prompts, settings, stop=['<eoi>'])
    runs.append(capsys.readouterr().out)
  assert runs[0] == runs[1]
  first, second = runs[0].split('\n== 2: ')
  assert first.startswith('\n== 1: [red.png]what\n')
  path = re.search(r'\[image 1 -> (.*?)\]', second).group(1)
  assert pathlib.Path(path) == workdir / 'generated/prompt-2-image-1.png'
  assert Image.open(path).size == (4, 4)


@pytest.mark.parametrize('overrides', [
    ('router=token_choice',),
    ('router=threshold',),
    ('router=aux_causal',),
    ('experts=1,1', 'modality_specific'),
], ids=lambda o: o[-1])
def test_a_checkpoint_says_what_its_full_forward_says(
    overrides, workdir, picture, capsys):
  """Greedy text of the command, against a whole pass for every token."""
  named = {'router=aux_causal': ('train.stage=aux_router', 'train.init_from=x'),
           'modality_specific': ('model.modality_specific=True',)}
  more = [x for o in overrides for x in named.get(o, ())]
  more += [f'model.moma.{o}' for o in overrides if '=' in o]
  workdir = untrained_run.make(
      workdir.parent, 'model.pattern=attention/moma', 'model.num_layers=1',
      *more, name=overrides[-1], grow=20.0)
  count, prompts = 10, generate.compose(['<image>what'], [str(picture)])
  generate.run(workdir, prompts, config.Sampling(
      max_new_tokens=count, temperature=0.0))
  shown = capsys.readouterr().out.split('what\n', 1)[1]
  cfg, params, _ = checkpoint.load_params(workdir)
  cfg, vocabulary = decode.causal_mode(cfg), tokenizers.load(workdir)
  whole = jax.jit(lambda t, m, s: models.LM(cfg).apply(
      {'params': params}, t, m, s))
  grammar = decode.grammar(vocabulary)
  tokens = list(prompt := generate.encode(prompts[0], vocabulary))
  for i in range(count):
    row = np.zeros((1, 32), np.int32)
    row[0, :len(tokens)] = tokens
    out = whole(row, (row >= vocabulary.image_start).astype(np.int32),
                (np.arange(32)[None] < len(tokens)).astype(np.int32))
    allowed = sampling.allowed_next(
        grammar, jnp.array([sampling.remaining_in(grammar, tokens)]), count - i,
        cfg.model.vocab_size)
    scores = np.where(allowed, out.logits[:, len(tokens) - 1], -np.inf)
    tokens.append(int(scores.argmax()))
  taken = out.aux[0].channel.stats.selected_BTE
  assert 0 < np.asarray(taken)[..., :len(tokens), :].mean() < 1
  said = tokens[len(prompt):]
  assert len(set(said)) > 1
  row = generate.RowDecoder(vocabulary, prompt, workdir / 'generated/prompt-1')
  assert shown.rstrip('\n') == (row.feed(said) + row.close()).rstrip('\n')


def test_what_a_workdir_must_not_be(workdir, tmp_path):
  prompts, settings = generate.compose(['a']), config.Sampling()
  with pytest.raises(config.UserError, match='holds no run'):
    generate.run(tmp_path, prompts, settings)
  with pytest.raises(config.UserError, match='width.*fixed by the run'):
    generate.run(workdir, prompts, settings, overrides=['model.width=64'])
  with pytest.raises(config.UserError, match='more than 32'):
    generate.run(workdir, prompts, settings)
  (tmp_path / 'config.json').write_text(
      (workdir / 'config.json').read_text())
  with pytest.raises(config.UserError, match='no checkpoint yet'):
    generate.run(tmp_path, prompts, settings)


def command(*args):
  return subprocess.run(
      [sys.executable, '-m', 'mom_jax.generate', *args], text=True,
      capture_output=True, check=False, timeout=120)


@pytest.mark.parametrize('args, message', [
    (['--prompt=a'], '--workdir=DIR is missing'),
    (['--workdir=x'], 'no prompt; give --prompt=TEXT'),
    (['--workdir=x', '--prompt=a', '--temperature=-1'],
     '--temperature=-1.0 must be 0 or more'),
    (['--workdir=x', '--prompt=a', '--top_p=2'],
     '--top_p=2.0 must lie in [0, 1]'),
    (['--workdir=x', '--promt=a'], 'Did you mean: prompt'),
])
def test_wrong_flags_get_one_line_and_exit_code_2(args, message):
  done = command(*args)
  assert done.returncode == 2
  assert message in done.stderr and done.stderr.count('\n') == 1


def test_help_lists_flags_and_settings():
  done = command('--help')
  assert done.returncode == 0
  for name in ('--prompt', '--image', '--temperature', '--min_p', '--stop',
               '--config.data.cache'):
    assert name in done.stdout
  for name in ('--config.train.steps', '--config.model.width'):
    assert name not in done.stdout  # the run's
