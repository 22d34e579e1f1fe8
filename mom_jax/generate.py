"""Continues prompts with text and images.

  python -m mom_jax.generate --workdir=runs/quickstart --prompt='star<draw>'

A prompt is text. `<image>` in it stands for the next --image; images without a
mark go before the text. `<draw>` at its end has the model draw an image there.
Text appears as it is drawn; images are written as PNG, once in their own size
and once enlarged.
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
ENLARGED = 128  # pixels a side, at least, of the second copy of an image


class Prompt(NamedTuple):
  """Texts and image files in order; `draw` begins an image after them."""

  parts: tuple[str | pathlib.Path, ...]
  draw: bool


def define_flags() -> None:
  """The command's flags; those of drawing come from `config.Sampling`."""
  flags.DEFINE_string('workdir', None, 'folder of a training run')
  flags.DEFINE_multi_string('prompt', [], 'text to continue')
  flags.DEFINE_string('prompts', None, 'file with one prompt a line')
  flags.DEFINE_multi_string(
      'image', [], 'picture for the prompt')
  flags.DEFINE_multi_string(
      'stop', [], 'ends the output: a text that is one token, or <eoi> for the'
      ' end of an image')
  flags.DEFINE_string(
      'output', None, 'folder for images (default WORKDIR/generated)')
  flags.DEFINE_integer(
      'max_len', 0, 'most tokens, prompt included, where the model has'
      ' attention; 0 is the length it was trained on')
  kinds = {int: flags.DEFINE_integer, float: flags.DEFINE_float}
  for key, default, field in config.settings(config.Sampling()):
    kinds[type(default)](key, default, field.metadata['doc'])


def main(overrides: list[str]) -> None:
  """Runs the command from its flags."""
  f = flags.FLAGS
  if not f.workdir:
    raise config.UserError('--workdir=DIR is needed: the folder of a run.')
  settings = config.Sampling(**{
      field.name: getattr(f, field.name)
      for field in dataclasses.fields(config.Sampling)
  })
  config.check_each(settings, '--')
  prompts = compose(read_prompts(f.prompt, f.prompts), f.image)
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
  """Prints what the model of `workdir` says to prompts; see the flags."""
  from mom_jax.data import tokenizers
  from mom_jax.inference import decode
  from mom_jax.training import checkpoint

  cfg, params, step = checkpoint.load_params(workdir)
  cfg = config.override_some(cfg, overrides, checkpoint.MAY_CHANGE)
  causal = decode.causal_mode(cfg)
  if causal != cfg:
    print(f'note: {"; ".join(config.differing(cfg, causal))}, as the run\'s own'
          ' router sees the future.', file=sys.stderr)
  vocabulary = tokenizers.load(workdir)
  tokens = [encode(p, vocabulary) for p in prompts]
  slots = check_length(cfg, tokens, settings.max_new_tokens, max_len)
  print(f'model of step {step} in {workdir}', file=sys.stderr)
  screen = Screen(
      vocabulary, prompts, tokens,
      pathlib.Path(output or pathlib.Path(workdir, 'generated')))
  began = time.perf_counter()
  for part_BN in draw(causal, params, tokens, vocabulary, settings,
                      max_len=slots, stop=stop_tokens(stop, vocabulary)):
    screen.feed(part_BN)
  screen.close()
  took = time.perf_counter() - began
  print(f'{screen.count} tokens in {took:.1f} s, compilation included',
        file=sys.stderr)


def draw(
    cfg: config.Config, params: Any, tokens: Sequence[Sequence[int]],
    vocabulary: Any, settings: config.Sampling, **how: Any,
):
  """`decode.stream` for a vocabulary and settings."""
  import jax

  from mom_jax.inference import decode, sampling

  filters = sampling.SamplingParams(
      settings.temperature, settings.top_k, settings.top_p, settings.min_p,
      settings.guidance)
  return decode.stream(
      cfg, params, tokens, decode.grammar(vocabulary), filters,
      jax.random.key(settings.seed), max_new_tokens=settings.max_new_tokens,
      every=16, **how,
  )


def read_prompts(given: Sequence[str], file: str | None) -> list[str]:
  """Prompts of the flags, then those of the file's lines that are not blank.

  Raises:
    UserError: there is none, or the file cannot be read.
  """
  prompts = list(given)
  if file is not None:
    try:
      lines = pathlib.Path(file).read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as e:
      raise config.UserError(
          f'--prompts={file} cannot be read ({e}); give a text file in UTF-8'
          ' with one prompt a line.'
      ) from e
    prompts += [line for line in lines if line.strip()]
  if not prompts:
    raise config.UserError(
        "no prompt; give --prompt=TEXT (--prompt='' starts from nothing) or"
        ' --prompts=FILE with one a line.'
    )
  return prompts


def compose(
    prompts: Sequence[str], images: Sequence[str] = ()
) -> list[Prompt]:
  """Puts images where `<image>` stands, or before the text of every prompt.

  Raises:
    UserError: marks and images differ in number, `<draw>` is not at the end,
      an image file does not exist.
  """
  files = [pathlib.Path(image).expanduser() for image in images]
  for file in files:
    if not file.is_file():
      raise config.UserError(
          f'--image={file}: no such file; give the path of a picture.'
      )
  marks = sum(p.count(IMAGE) for p in prompts)
  if marks and marks != len(files):
    raise config.UserError(
        f'the prompts have {marks} {IMAGE} and there are {len(files)} --image;'
        f' give one --image for each {IMAGE}.'
    )
  made, rest = [], iter(files)
  for text in prompts:
    body = text.removesuffix(DRAW)
    if DRAW in body:
      raise config.UserError(
          f'--prompt={text!r}: {DRAW} must stand at the end; the model goes on'
          ' from there.'
      )
    first, *others = body.split(IMAGE)
    parts = [] if marks else list(files)
    parts.append(first)
    for other in others:
      parts += [next(rest), other]
    made.append(Prompt(tuple(p for p in parts if p != ''), body != text))
  return made


def encode(prompt: Prompt, vocabulary: Any) -> list[int]:
  """Tokens of a prompt, from eos on.

  Raises:
    UserError: the model knows no images, or one cannot be read.
  """
  has_images = any(not isinstance(p, str) for p in prompt.parts)
  if vocabulary.image is None and (prompt.draw or has_images):
    raise config.UserError(
        f'the model of --workdir was trained on text alone; leave {DRAW} and'
        ' --image out.'
    )
  parts = [p if isinstance(p, str) else read_image(p, vocabulary)
           for p in prompt.parts]
  tokens = vocabulary.encode(parts, end=False).tolist()
  return tokens + [vocabulary.boi] * prompt.draw


def read_image(path: pathlib.Path, vocabulary: Any) -> np.ndarray:
  """A picture as the tokenizer takes it, uint8 [size, size, 3]."""
  from PIL import Image

  from mom_jax.data import document, files

  try:
    with Image.open(path) as opened:
      return document.to_pixels(opened, vocabulary.image.image_size)
  except files.BROKEN as e:
    raise config.UserError(
        f'--image={path} cannot be read as a picture ({e}); convert it to PNG'
        ' or JPEG.'
    ) from e


def stop_tokens(texts: Sequence[str], vocabulary: Any) -> tuple[int, ...]:
  """eos and the tokens of --stop."""
  stop = [vocabulary.eos]
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
  """Slots that attention needs, None without attention.

  Raises:
    UserError: a prompt and what may follow it is longer.
  """
  if not any(mixer == 'attention' for mixer, _ in cfg.model.unit):
    return None
  most = max_len or cfg.data.seq_len
  for number, prompt in enumerate(tokens, 1):
    if len(prompt) + new > most:
      limit = (f'--max_len={max_len}' if max_len else
               'the length its attention was trained on, config.data.seq_len')
      raise config.UserError(
          f'prompt {number} has {len(prompt)} tokens and'
          f' --max_new_tokens={new} may follow, more than {most} ({limit});'
          ' shorten it, lower --max_new_tokens or set --max_len.'
      )
  return most


class Screen:
  """Prints rows one after another while all of them are drawn."""

  def __init__(self, vocabulary, prompts, tokens, folder: pathlib.Path):
    self.count = 0
    self._rows = [
        Row(vocabulary, prompt, folder / f'prompt-{number}')
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
    """Takes the next tokens of every row; -1 is none."""
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
    """Prints what is left of every row."""
    for b, row in enumerate(self._rows):
      if not self._ended[b]:
        self._ended[b] = True
        self._waiting[b] += row.close()
    self._print()
    print(flush=True)


class Row:
  """Turns one row's tokens into text as they come, and images into files."""

  def __init__(
      self, vocabulary: Any, prompt: Sequence[int], prefix: pathlib.Path
  ):
    self._vocabulary, self._prefix = vocabulary, prefix
    self._ids: list[int] = []
    self._shown = 0
    self._images = 0
    self._codes: list[int] = []
    for token in reversed(prompt):  # of a block that the prompt leaves open
      if token < vocabulary.image_start:
        break
      self._codes.insert(0, token - vocabulary.image_start)

  def feed(self, tokens: Sequence[int]) -> str:
    """What can be shown of `tokens` now."""
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
    """What is left: half a character, an image that was cut off."""
    left = self._text(final=True)
    if self._codes:
      whole = self._vocabulary.tokens_per_image
      left += f'[image: {len(self._codes)} of {whole} codes]'
    return left

  def _text(self, final: bool) -> str:
    text = self._vocabulary.text.decode(self._ids)
    # A character whose bytes have not all come ends in a replacement.
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
  """Writes a PNG, and beside it one enlarged by whole pixels."""
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
  """A prompt in one line."""
  parts = [p if isinstance(p, str) else f'[{p.name}]' for p in prompt.parts]
  return ' '.join(''.join(parts).split()) + (f' {DRAW}' * prompt.draw)


if __name__ == '__main__':
  define_flags()
  cli.run(main)
