"""Pictures as pixels, as a viewer shows them.

Orientation, transparency, palette, colour profile and gamma of the file are
applied, and pixel values of any range become 0 .. 255. What is transparent is
white. Of an animation only the first picture counts.
"""

from __future__ import annotations

import io
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageCms

# EPS and WMF, which other programs would draw, are not among them.
FORMATS = (
    'AVIF', 'BMP', 'DDS', 'DIB', 'GIF', 'ICNS', 'ICO', 'JPEG', 'JPEG2000',
    'MPO', 'PCX', 'PNG', 'PPM', 'PSD', 'QOI', 'SGI', 'TGA', 'TIFF', 'WEBP',
)
MAX_PIXELS = 2**26  # 8192 x 8192; a small file can claim any size

_ORIENTATION, _BITS, _PHOTOMETRIC = 0x0112, 258, 262  # EXIF and TIFF tags
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SCREEN_GAMMA = 2.2


class Unreadable(ValueError):
  """A picture that cannot be used; the message says why."""


def read(file: pathlib.Path | io.BytesIO, size: int) -> np.ndarray:
  """Read a picture as uint8 [size, size, 3].

  Raises:
    Unreadable: it is damaged, of an unknown format or range, or too large.
  """
  Image.init()
  known = [form for form in FORMATS if form in Image.OPEN]
  try:
    with warnings.catch_warnings(action='ignore'), Image.open(
        file, formats=known) as image:
      if image.width * image.height > MAX_PIXELS:
        raise Unreadable(
            f'it has {image.width} x {image.height} pixels, of which'
            f' {MAX_PIXELS} are the most')
      image.load()
      return to_pixels(image, size)
  except (Unreadable, MemoryError):
    raise
  except Exception as e:  # damage makes Pillow raise almost anything
    raise Unreadable(' '.join(str(e).split()) or type(e).__name__) from e


def to_pixels(image: Image.Image, size: int) -> np.ndarray:
  """Scale the central square, on white, to uint8 [size, size, 3].

  Raises:
    Unreadable: the range of its pixel values is unknown.
  """
  info, turn = image.info, _TURNS.get(_orientation(image))
  if image.mode == 'F' or image.mode.startswith('I'):
    image = _eight_bits(image)
  grey = Image.getmodebase(image.mode) == 'L'
  image = _on_white(image)
  if turn is not None:
    image = image.transpose(turn)
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  image = image.crop((left, top, left + side, top + side))
  if side != size:
    image = image.resize((size, size), Image.Resampling.LANCZOS)
  if info.get('icc_profile'):
    image = _to_srgb(image, info['icc_profile'], grey)
  elif info.get('gamma') and 'srgb' not in info:
    image = _with_gamma(image.convert('RGB'), info['gamma'])
  return np.asarray(image.convert('RGB'), np.uint8)


def _orientation(image: Image.Image) -> object:
  try:
    return image.getexif().get(_ORIENTATION)
  except Exception:  # damaged EXIF says nothing about whole pixels
    return None


def _eight_bits(image: Image.Image) -> Image.Image:
  """Map integers of 16 or 32 bits, or floats, to grey with 8 bits."""
  values = np.asarray(image).astype(np.float32)
  transparent = image.info.get('transparency')
  opaque = values != transparent if isinstance(transparent, int) else None
  white = _white(image, values)
  if _tiff_tag(image, _PHOTOMETRIC, 1) == 0:  # WhiteIsZero
    values = white - values
  grey = Image.fromarray(np.round(values * (255 / white)).astype(np.uint8))
  if opaque is None:
    return grey
  alpha = Image.fromarray(opaque.astype(np.uint8) * 255)
  return Image.merge('LA', (grey, alpha))


def _white(image: Image.Image, values: np.ndarray) -> float:
  """Return the value of white.

  It is that of the format where it has one. Otherwise white is 1 (floats), 255
  or 65535, the least that no pixel exceeds.
  """
  if image.mode.startswith('I;16'):
    return 2.0**_tiff_tag(image, _BITS, 16) - 1
  if image.format == 'PPM' and image.mode == 'I':
    return 65535.0
  scales = (1.0, 255.0, 65535.0) if image.mode == 'F' else (255.0, 65535.0)
  least, greatest = float(values.min()), float(values.max())
  for scale in scales:
    if least >= 0 and greatest <= scale:  # false for NaN
      return scale
  raise Unreadable(
      f'its pixel values, {least:g} to {greatest:g}, are in none of the ranges'
      ' 0 to ' + ', '.join(f'{scale:g}' for scale in scales))


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
  value = getattr(image, 'tag_v2', {}).get(tag, default)
  return int(value[0] if isinstance(value, tuple) else value)


def _on_white(image: Image.Image) -> Image.Image:
  """Return an opaque image of mode L, RGB or CMYK."""
  if image.has_transparency_data:
    key = image.info.get('transparency')
    if isinstance(key, tuple) and max(key) > 255:  # of samples of 16 bits
      image.info['transparency'] = tuple(value >> 8 for value in key)
    layer = image.convert('RGBA')
    image = Image.new('RGB', layer.size, 'white')
    image.paste(layer, (0, 0), layer)
  elif image.mode == 'LAB':
    image = ImageCms.profileToProfile(
        image, ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'),
        outputMode='RGB')
  elif image.mode not in ('L', 'RGB', 'CMYK'):
    image = image.convert('RGB')
  return image


def _to_srgb(image: Image.Image, profile: bytes, grey: bool) -> Image.Image:
  """Apply a colour profile; one that does not fit the image is ignored."""
  try:
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if ImageCms.getProfileDescription(opened).lower().startswith('srgb'):
      return image
    space = opened.profile.xcolor_space.strip()
    if space == 'GRAY' and grey:
      image = image.convert('L')
    return ImageCms.profileToProfile(
        image, opened, ImageCms.createProfile('sRGB'), outputMode='RGB')
  except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
    return image


def _with_gamma(image: Image.Image, gamma: float) -> Image.Image:
  """Apply the gamma of a PNG, unless it is that of the screen."""
  exponent = 1 / (_SCREEN_GAMMA * gamma)
  if abs(exponent - 1) < 0.02:
    return image
  scale = [round(255 * (value / 255) ** exponent) for value in range(256)]
  return image.point(scale * 3)
