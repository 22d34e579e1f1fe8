"""Image tokenizers: pixels to codes and back.

`PatchCodebook` cuts an image into patches and encodes each as the nearest entry
of a codebook made by k-means. To use a large pretrained VQ instead, write a
function without arguments that returns an `ImageTokenizer` and name it in the
configuration as 'package.module:function'.
"""

from __future__ import annotations

import importlib
import os
import pathlib
from typing import Protocol, runtime_checkable
import zipfile

from absl import logging
from jaxtyping import Int, UInt8
import numpy as np

from mom_jax import config, digest
from mom_jax.data import cache

MAX_BYTES = 2**28  # of a codebook


@runtime_checkable
class ImageTokenizer(Protocol):
  """Encoder of images as a fixed number of codes each.

  Attributes:
    codes: number of codes, 0 .. codes-1.
    image_size: height and width of images in pixels.
    tokens_per_image: codes per image, in the order of generation.
    fingerprint: a text that differs between different tokenizers.
  """

  codes: int
  image_size: int
  tokens_per_image: int
  fingerprint: str

  def encode(
      self, images: UInt8[np.ndarray, 'N S S 3']
  ) -> Int[np.ndarray, 'N P']:
    """Encode images as codes."""

  def decode(
      self, codes: Int[np.ndarray, 'N P']
  ) -> UInt8[np.ndarray, 'N S S 3']:
    """Decode codes to images."""


class PatchCodebook:
  """Image tokenizer: the nearest codebook entry of each patch, row by row.

    code = argmin_c |patch - codebook_c|^2

  Args:
    codebook: [codes, patch * patch * 3] in 0 .. 255, pixels row by row.
    patch: height and width of a patch in pixels.
    image_size: height and width of an image, a multiple of patch.
  """

  def __init__(self, codebook: np.ndarray, patch: int, image_size: int):
    self.codebook_CD = np.ascontiguousarray(codebook, np.float32)
    self.patch, self.image_size = patch, image_size
    self.codes = len(codebook)
    self.tokens_per_image = (image_size // patch) ** 2
    self.fingerprint = digest.of(
        self.codebook_CD.tobytes(), f'{patch} {image_size}'
    )
    self._half_norm_C = 0.5 * np.sum(self.codebook_CD**2, 1)

  def encode(
      self, images: UInt8[np.ndarray, 'N S S 3']
  ) -> Int[np.ndarray, 'N P']:
    patches_ND = to_patches(images, self.patch).astype(np.float32)
    codes = [
        np.argmax(block @ self.codebook_CD.T - self._half_norm_C, 1)
        for block in np.array_split(patches_ND, len(patches_ND) // 65536 + 1)
    ]
    return np.concatenate(codes).astype(np.int32).reshape(len(images), -1)

  def decode(
      self, codes: Int[np.ndarray, 'N P']
  ) -> UInt8[np.ndarray, 'N S S 3']:
    n, p, side = len(codes), self.patch, self.image_size // self.patch
    pixels = np.clip(np.round(self.codebook_CD), 0, 255).astype(np.uint8)
    tiles = pixels[codes].reshape(n, side, side, p, p, 3)
    return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(
        n, self.image_size, self.image_size, 3
    )

  def save(self, path: pathlib.Path) -> None:
    cache.write_arrays(path, {
        'codebook': self.codebook_CD, 'patch': np.int32(self.patch),
        'image_size': np.int32(self.image_size),
    })


def to_patches(
    images: UInt8[np.ndarray, 'N S S 3'], patch: int
) -> UInt8[np.ndarray, 'M D']:
  """Cut images into patches, row by row: [N * P, patch * patch * 3]."""
  n, size = images.shape[:2]
  side = size // patch
  tiles = images.reshape(n, side, patch, side, patch, 3)
  return tiles.transpose(0, 1, 3, 2, 4, 5).reshape(n * side**2, 3 * patch**2)


def fit(
    images: UInt8[np.ndarray, 'N S S 3'], settings: config.Tokenizer
) -> PatchCodebook:
  """Fit a codebook to images: k-means over their distinct patches.

  Distinct patches spend fewer codes on flat background than all patches: 25.5
  instead of 24.8 dB on held-out OpenMoji. The fit uses one thread, so that the
  order of sums is fixed.

  Raises:
    UserError: scikit-learn is missing, or there are fewer patches than codes.
  """
  try:
    from sklearn import cluster
    import threadpoolctl
  except ModuleNotFoundError as e:
    raise config.UserError(
        "config.data.tokenizer.image='patch_vq' needs the package scikit-learn;"
        " run: pip install 'mom_jax[demo]'."
    ) from e
  patches_ND = np.unique(to_patches(images, settings.patch), axis=0)
  if len(patches_ND) < settings.codes:
    raise config.UserError(
        f'config.data.tokenizer.codes={settings.codes} exceeds the'
        f' {len(patches_ND)} distinct patches of the {len(images)} training'
        ' images; lower codes or add images.'
    )
  with threadpoolctl.threadpool_limits(1):
    found = cluster.MiniBatchKMeans(
        settings.codes, random_state=0, batch_size=8192, n_init=1, max_iter=20,
        reassignment_ratio=0.0,
    ).fit(patches_ND.astype(np.float32))
  centers_CD = found.cluster_centers_
  order = np.argsort(centers_CD.sum(1), kind='stable')  # dark to bright
  fitted = PatchCodebook(
      centers_CD[order], settings.patch, settings.image_size
  )
  logging.info('image codebook: %d codes from %d images, %.1f dB on them',
               fitted.codes, len(images), psnr(fitted, images))
  return fitted


def psnr(
    tokenizer: ImageTokenizer, images: UInt8[np.ndarray, 'N S S 3']
) -> float:
  """Compute the peak signal-to-noise ratio of decode(encode(images)) in dB.

    10 log10(255^2 / mean squared error over all images)
  """
  decoded = tokenizer.decode(tokenizer.encode(images))
  error = np.square(decoded.astype(np.float64) - images).mean()
  return float(10 * np.log10(255**2 / error)) if error else float('inf')


def check(name: str) -> None:
  """Raise UserError if a name names no image tokenizer, or a missing file."""
  key = f'config.data.tokenizer.image={name!r}'
  if name.endswith('.npz'):
    if not pathlib.Path(os.path.expanduser(name)).is_file():
      raise config.UserError(
          f"{key}: no such file; give a codebook .npz or 'patch_vq'.")
  elif name != 'patch_vq' and not all(name.partition(':')):
    raise config.UserError(
        f"{key} must be 'patch_vq', a .npz file or 'package.module:function'.")


def load(path: str, settings: config.Tokenizer | None = None) -> PatchCodebook:
  """Read a codebook: arrays `codebook`, `patch`, `image_size` of an .npz.

  Raises:
    UserError: the file is missing or damaged, its arrays do not fit each
      other, or they differ from `settings`.
  """
  check(path)
  key = f'config.data.tokenizer.image={path!r}'
  try:
    found = pathlib.Path(os.path.expanduser(path))
    _check_size(found)
    with np.load(found, allow_pickle=False) as file:
      codebook, patch, size = (
          file[k] for k in ('codebook', 'patch', 'image_size'))
  except config.UserError:
    raise
  except Exception as e:  # damage makes numpy raise almost anything
    raise config.UserError(
        f'{key} must be an .npz with the arrays codebook, patch and image_size'
        f' ({type(e).__name__}: {e}); write it again.'
    ) from e
  patch, size = int(patch), int(size)
  if (patch < 1 or size % patch or codebook.ndim != 2 or
      codebook.shape[1] != 3 * patch**2):
    raise config.UserError(
        f'{key} has codebook {codebook.shape}, patch {patch} and image_size'
        f' {size}; codebook must be [codes, 3 * patch^2] and patch must divide'
        ' image_size.'
    )
  made = PatchCodebook(codebook, patch, size)
  if settings is not None:
    for name in ('codes', 'patch', 'image_size'):
      if getattr(settings, name) != getattr(made, name):
        raise config.UserError(
            f'config.data.tokenizer.{name}={getattr(settings, name)} differs'
            f' from {getattr(made, name)} in {path}; set'
            f' --config.data.tokenizer.{name}={getattr(made, name)}.'
        )
  return made


def _check_size(path: pathlib.Path) -> None:
  """Refuse a file that grows to an absurd size when it is read."""
  with zipfile.ZipFile(path) as file:
    size = sum(member.file_size for member in file.infolist())
  if size > MAX_BYTES:
    raise config.UserError(
        f'config.data.tokenizer.image={str(path)!r} unpacks to {size:,} bytes,'
        f' and {MAX_BYTES:,} are the most for a codebook; make a smaller one.')


def from_function(name: str) -> ImageTokenizer:
  """Call 'package.module:function', which returns an ImageTokenizer."""
  check(name)
  key = f'config.data.tokenizer.image={name!r}'
  module, _, function = name.partition(':')
  try:
    made = getattr(importlib.import_module(module), function)()
  except (ImportError, AttributeError) as e:
    raise config.UserError(
        f"{key} cannot be imported ({e}); write 'patch_vq', a .npz file or"
        " 'package.module:function'."
    ) from e
  if not isinstance(made, ImageTokenizer):
    raise config.UserError(
        f'{key} returned a {type(made).__name__} without all of codes,'
        ' image_size, tokens_per_image, fingerprint, encode and decode.'
    )
  return made
