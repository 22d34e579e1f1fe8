"""Continue prompts with text and images.

  python -m mom_jax.generate --workdir=runs/quickstart --prompt='star<draw>'

A prompt is text. `<image>` in it is replaced by the next --image; images
without a mark come before the text. `<draw>` at its end lets the model draw an
image. Text appears as it is generated; images are written as PNG, in their own
size and enlarged.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

from absl import flags
import numpy as np

from mom_jax import cli, config

IMAGE, DRAW = '<image>', '<draw>'
ENLARGED = 128  # minimum height and width in pixels of an enlarged image


class Prompt(NamedTuple):
  """Texts and image files in order; `draw` starts an image after them."""

  parts: tuple[str | pathlib.Path, ...]
  draw: bool


def define_flags() -> None:
  """Define the flags; those of sampling come from `config.Sampling`."""
  cli.define_path('workdir', None, 'folder of a training run')
  flags.DEFINE_multi_string('prompt', [], 'text to continue')
  cli.define_path('prompts', None, 'file with one prompt per line')
  flags.DEFINE_multi_string(
      'image', [], 'image for the prompt')
  flags.DEFINE_multi_string(
      'stop', [], 'end of the output: a text of one token, or <eoi> for the end'
      ' of an image')
  cli.define_path(
      'output', None, 'folder for images (default WORKDIR/generated)')
  flags.DEFINE_integer(
      'max_len', 0, 'maximum number of tokens, prompt included, of a model with'
      ' attention (0 = its training length)')
  kinds = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
  for key, default, field in config.settings(config.Sampling()):
    kinds[type(default)](key, default, field.metadata['doc'])


def main(overrides: list[str]) -> None:
  """Run the command from its flags."""
  f = flags.FLAGS
  if not f.workdir:
    raise config.UserError(
        '--workdir=DIR is missing; give the folder of a run.')
  settings = config.Sampling(**{
      field.name: getattr(f, field.name)
      for field in dataclasses.fields(config.Sampling)
  })
  config.check_each(settings, '--')
  prompts = compose(
      read_prompts(f.prompt, f.prompts), cli.paths('image', f.image))
  run(f.workdir, prompts, settings, overrides=overrides, stop=f.stop,
      output=f.output, max_len=f.max_len)


def run(
    workdir: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    settings: config.Sampling,
    *,
    overrides: Sequence[str] = (),
    stop: Sequence[str] = (),
    output: str | os.PathLike[str] | None = None,
    max_len: int = 0,
) -> None:
  """Continue prompts with the model of `workdir`; see the flags."""
  from mom_jax import compilation
  from mom_jax.data import tokenizers
  from mom_jax.inference import decode
  from mom_jax.training import checkpoint

  cfg, params, step = checkpoint.load_params(workdir)
  cfg = config.override_some(cfg, overrides, config.USE)
  compilation.keep(cfg)
  causal = decode.causal_mode(cfg)
  if causal != cfg:
    print(f'note: {"; ".join(config.differing(cfg, causal))}, since the router'
          ' of the run sees the future.', file=sys.stderr)
  vocabulary = tokenizers.load(
      workdir, config.given(overrides, 'data.tokenizer.image'))
  tokens = [encode(p, vocabulary) for p in prompts]
  length = check_length(cfg, tokens, settings.max_new_tokens, max_len)
  print(f'model of step {step} in {workdir}', file=sys.stderr)
  screen = Screen(
      vocabulary, prompts, tokens,
      pathlib.Path(output or pathlib.Path(workdir, 'generated')))
  start = time.perf_counter()
  parts = draw(causal, params, tokens, vocabulary, settings,
               max_len=length, stop=stop_tokens(stop, vocabulary))
  with compilation.waiting('compiling, and reading the prompt'):
    first = next(parts, None)
  if first is not None:
    screen.feed(first)
  for part_BN in parts:
    screen.feed(part_BN)
  screen.close()
  seconds = time.perf_counter() - start
  print(f'{screen.count} tokens in {seconds:.1f} s, compilation included',
        file=sys.stderr)


def draw(
    cfg: config.Config, params: Any, tokens: Sequence[Sequence[int]],
    vocabulary: Any, settings: config.Sampling, **how: Any,
):
  """Call `decode.stream` for a vocabulary and settings."""
  import jax

  from mom_jax.inference import decode, sampling

  sampling_params = sampling.SamplingParams(
      settings.temperature, settings.top_k, settings.top_p, settings.min_p,
      settings.guidance)
  return decode.stream(
      cfg, params, tokens, decode.grammar(vocabulary), sampling_params,
      jax.random.key(settings.seed), max_new_tokens=settings.max_new_tokens,
      every=16, **how,
  )


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
  """List the prompts of the flags, then the non-blank lines of the file.

  Lines end with a line feed, or a carriage return and a line feed.

  Raises:
    UserError: there is no prompt, or the file cannot be read.
  """
  prompts = list(given)
  if file is not None:
    try:
      text = pathlib.Path(file).read_bytes().decode('utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
      raise config.UserError(
          f'--prompts={file} cannot be read ({e}); give a text file in UTF-8'
          ' with one prompt a line.'
      ) from e
    prompts += [line.removesuffix('\r') for line in text.split('\n')
                if line.strip()]
  if not prompts:
    raise config.UserError(
        "no prompt; give --prompt=TEXT (--prompt='' for an empty one) or"
        ' --prompts=FILE with one per line.'
    )
  return prompts


def compose(
    prompts: Sequence[str], images: Sequence[str] = ()
) -> list[Prompt]:
  """Insert images at `<image>`, or before the text of every prompt.

  Raises:
    UserError: the numbers of marks and images differ, `<draw>` is not at the
      end, or an image file does not exist.
  """
  files = [pathlib.Path(os.path.expanduser(image)) for image in images]
  for file in files:
    if not file.is_file():
      raise config.UserError(
          f'--image={file}: no such file; give the path of an image.'
      )
  marks = sum(p.count(IMAGE) for p in prompts)
  if marks and marks != len(files):
    raise config.UserError(
        f'the prompts have {marks} {IMAGE} and there are {len(files)} --image;'
        f' give one --image for each {IMAGE}.'
    )
  composed, rest = [], iter(files)
  for text in prompts:
    body = text.removesuffix(DRAW)
    if DRAW in body:
      raise config.UserError(
          f'--prompt={text!r}: {DRAW} must be at the end, where the model'
          ' continues.'
      )
    first, *others = body.split(IMAGE)
    parts = [] if marks else list(files)
    parts.append(first)
    for other in others:
      parts += [next(rest), other]
    composed.append(Prompt(tuple(p for p in parts if p != ''), body != text))
  return composed


def encode(prompt: Prompt, vocabulary: Any) -> list[int]:
  """Encode a prompt as tokens, eos first.

  Raises:
    UserError: the model has no images, or one cannot be read.
  """
  has_images = any(not isinstance(p, str) for p in prompt.parts)
  if vocabulary.image is None and (prompt.draw or has_images):
    raise config.UserError(
        f'the model of --workdir was trained on text only; leave out {DRAW} and'
        ' --image.'
    )
  parts = [p if isinstance(p, str) else read_image(p, vocabulary)
           for p in prompt.parts]
  encoded = [vocabulary.encode_part(part) for part in parts]
  for part, ids in zip(parts, encoded):
    lost = vocabulary.text.unknown(part, ids) if isinstance(part, str) else ''
    if lost:
      print(f'note: the model does not know {len(lost)} characters of the'
            f' prompt, for example {lost[0]!r}', file=sys.stderr)
  tokens = vocabulary.join(encoded, end=False).tolist()
  return tokens + [vocabulary.boi] * prompt.draw


def read_image(path: pathlib.Path, vocabulary: Any) -> np.ndarray:
  """Read an image in the size of the tokenizer, uint8 [size, size, 3]."""
  try:
    return vocabulary.read_image(path)
  except ValueError as e:
    raise config.UserError(
        f'--image={path} cannot be read as an image ({e}); convert it to PNG'
        ' or JPEG.'
    ) from e


def stop_tokens(texts: Sequence[str], vocabulary: Any) -> tuple[int, ...]:
  """Return eos and the tokens of --stop."""
  stop = [*vocabulary.stop]
  for text in texts:
    ids = ([vocabulary.eoi] if text == '<eoi>'
           else vocabulary.encode_text(text).tolist())
    if len(ids) != 1:
      raise config.UserError(
          f'--stop={text!r} is {len(ids)} tokens; give a text that is one'
          ' token.'
      )
    stop += ids
  return tuple(stop)


def check_length(
    cfg: config.Config, tokens: Sequence[Sequence[int]], new: int,
    max_len: int,
) -> int | None:
  """Return the length of attention caches, None without attention.

  Raises:
    UserError: a prompt and its new tokens are longer.
  """
  if not any(mixer == 'attention' for mixer, _ in cfg.model.unit):
    return None
  limit = max_len or cfg.data.seq_len
  for number, prompt in enumerate(tokens, 1):
    if len(prompt) + new > limit:
      reason = (f'--max_len={max_len}' if max_len else
                'the training length of its attention, config.data.seq_len')
      raise config.UserError(
          f'prompt {number} has {len(prompt)} tokens and'
          f' --max_new_tokens={new} may follow, more than {limit} ({reason});'
          ' shorten it, lower --max_new_tokens or set --max_len.'
      )
  return limit


class Screen:
  """Printer of rows one after another while all of them are generated."""

  def __init__(self, vocabulary, prompts, tokens, folder: pathlib.Path):
    self.count = 0
    self._rows = [
        RowDecoder(vocabulary, prompt, folder / f'prompt-{number}')
        for number, prompt in enumerate(tokens, 1)
    ]
    self._titles = [title(p) for p in prompts]
    self._waiting = ['' for _ in tokens]
    self._ended = [False for _ in tokens]
    self._now = 0
    self._begin()

  def _begin(self) -> None:
    print(f'\n== {self._now + 1}: {self._titles[self._now]}', flush=True)

  def feed(self, part_BN: np.ndarray) -> None:
    """Take the next tokens of every row; -1 is none."""
    for b, row in enumerate(self._rows):
      tokens = part_BN[b][part_BN[b] >= 0].tolist()
      self.count += len(tokens)
      self._waiting[b] += row.feed(tokens)
      if len(tokens) < part_BN.shape[1] and not self._ended[b]:
        self._ended[b] = True
        self._waiting[b] += row.close()
    self._print()

  def _print(self) -> None:
    while True:
      print(self._waiting[self._now], end='', flush=True)
      self._waiting[self._now] = ''
      if not self._ended[self._now] or self._now + 1 == len(self._rows):
        return
      self._now += 1
      print()
      self._begin()

  def close(self) -> None:
    """Print the rest of every row."""
    for b, row in enumerate(self._rows):
      if not self._ended[b]:
        self._ended[b] = True
        self._waiting[b] += row.close()
    self._print()
    print(flush=True)


class RowDecoder:
  """Decoder of one row: tokens to text as they come, images to files."""

  def __init__(
      self, vocabulary: Any, prompt: Sequence[int], prefix: pathlib.Path
  ):
    self._vocabulary, self._prefix = vocabulary, prefix
    self._ids: list[int] = []
    self._shown = 0
    self._images = 0
    self._codes: list[int] = []
    for token in reversed(prompt):  # of an incomplete image of the prompt
      if token < vocabulary.image_start:
        break
      self._codes.insert(0, token - vocabulary.image_start)

  def feed(self, tokens: Sequence[int]) -> str:
    """Decode the tokens that can be shown now."""
    shown = []
    for token in tokens:
      if token < self._vocabulary.text.size:
        self._ids.append(token)
        continue
      shown.append(self._text(final=True))
      if token >= self._vocabulary.image_start:
        self._codes.append(token - self._vocabulary.image_start)
        if len(self._codes) == self._vocabulary.tokens_per_image:
          shown.append(self._image())
    return ''.join(shown) + self._text(final=False)

  def close(self) -> str:
    """Decode the rest: half a character, an incomplete image."""
    left = self._text(final=True)
    if self._codes:
      whole = self._vocabulary.tokens_per_image
      left += f'[image: {len(self._codes)} of {whole} codes]'
    return left

  def _text(self, final: bool) -> str:
    text = self._vocabulary.text.decode(self._ids)
    # An incomplete character ends in a replacement.
    end = len(text) if final else len(text.rstrip('\ufffd'))
    new = text[self._shown:end]
    self._shown = max(self._shown, end)
    if final:
      self._ids, self._shown = [], 0
    return new

  def _image(self) -> str:
    self._images += 1
    pixels = self._vocabulary.image.decode(np.array([self._codes], np.int32))[0]
    self._codes = []
    path = self._prefix.with_name(
        f'{self._prefix.name}-image-{self._images}.png')
    write_image(path, pixels)
    return f'[image {self._images} -> {path}]'


def write_image(path: pathlib.Path, pixels: np.ndarray) -> None:
  """Write a PNG, and one enlarged by whole pixels."""
  from PIL import Image

  from mom_jax.training import checkpoint

  times = -(-ENLARGED // pixels.shape[0])
  large = pixels.repeat(times, 0).repeat(times, 1)
  with checkpoint.writing(str(path)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    if times > 1:
      Image.fromarray(large).save(path.with_stem(f'{path.stem}-x{times}'))


def title(prompt: Prompt) -> str:
  """Return a prompt in one line."""
  parts = [p if isinstance(p, str) else f'[{p.name}]' for p in prompt.parts]
  return ' '.join(''.join(parts).split()) + (f' {DRAW}' * prompt.draw)


if __name__ == '__main__':
  define_flags()
  cli.run(main, settings=config.USE)
