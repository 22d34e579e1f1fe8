"""Places of image tokens, from a plain loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from mom_jax import config
from mom_jax.data import tokenizers
from mom_jax.models import embed

IMAGE = np.array(
    [[1, 1, 0, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1, 1, 1]])
VALID = np.array(
    [[1, 1, 1, 1, 0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1, 0, 1]])


def _loop(image_T, segment_T, run=0, one_document=False):
  """Places of the image tokens, -1 for all else, and the last run."""
  places, document = [], None
  for image, segment in zip(image_T, segment_T):
    if segment and segment != document and not one_document:
      run = 0
    document = segment or document
    places.append(run if image and segment else -1)
    if segment:
      run = run + 1 if image else 0
  return places, run


def _places(image, segment, run=None):
  image, segment = jnp.asarray(image) > 0, jnp.asarray(segment)
  places, last = embed.image_positions(
      image, segment, None if run is None else jnp.asarray(run))
  shown = np.where(np.asarray(image) & (np.asarray(segment) > 0), places, -1)
  return shown.tolist(), last.tolist()


def test_places_count_image_tokens_since_the_last_text():
  got = _places(IMAGE, np.ones_like(IMAGE))
  want = [_loop(i, [1] * 10) for i in IMAGE]
  assert got == tuple(list(x) for x in zip(*want))
  assert got[0][0] == [0, 1, -1, 0, 1, 2, 3, -1, 0, 1]


def test_a_document_begins_anew():
  segment = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 2], [1] * 7 + [2] * 2 + [0]])
  got = _places(IMAGE, segment)
  want = [_loop(i, s) for i, s in zip(IMAGE, segment)]
  assert got == tuple(list(x) for x in zip(*want))


@pytest.mark.parametrize('split', [1, 3, 5, 9])
def test_a_cache_goes_on_and_padding_is_nothing(split):
  whole = [_loop(i, v, one_document=True) for i, v in zip(IMAGE, VALID)]
  first, run = _places(
      IMAGE[:, :split], VALID[:, :split], np.zeros(2, np.int32))
  rest, run = _places(IMAGE[:, split:], VALID[:, split:], np.int32(run))
  assert [a + b for a, b in zip(first, rest)] == [p for p, _ in whole]
  assert run == [last for _, last in whole]


def test_the_side_must_fit_the_images():
  cfg = config.Config()
  vocabulary = tokenizers.Vocabulary.__new__(tokenizers.Vocabulary)
  vocabulary.size, vocabulary.codes, vocabulary.tokens_per_image = 772, 512, 64
  vocabulary.check(cfg)
  with pytest.raises(config.UserError, match='image_side=4 must be the square'
                                             ' root of 64'):
    vocabulary.check(config.override(cfg, ['model.image_side=4']))
  with pytest.raises(config.UserError, match="'image' is none of"):
    config.override(cfg, ['model.modalities=text,sound'])
