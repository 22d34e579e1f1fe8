"""Pictures become the pixels that a viewer shows."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms, ImageOps
import pytest

from mom_jax import config, generate
from mom_jax.data import pictures

SIDE = 64
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)  # 0 .. 4095


def _file(image, form, **settings):
  file = io.BytesIO()
  image.save(file, form, **settings)
  file.seek(0)
  return file


def _chunk(name, data):
  body = name + data
  return struct.pack('>I', len(data)) + body + struct.pack(
      '>I', zlib.crc32(body))


def _png(width, height, bits, colour, rows, *chunks):
  """A PNG of kinds that Pillow does not write."""
  header = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
  return io.BytesIO(b'\x89PNG\r\n\x1a\n' + b''.join([
      _chunk(b'IHDR', header), *chunks, _chunk(b'IDAT', zlib.compress(rows)),
      _chunk(b'IEND', b'')]))


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('turn', range(1, 9))
def test_orientation_is_applied(form, turn):
  """All eight orientations: what a viewer shows is the stored picture turned.
  """
  pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
  pixels[:20, :40] = (255, 0, 0)
  exif = Image.Exif()
  exif[0x0112] = turn
  settings = {'lossless': True} if form == 'WEBP' else {}
  read = pictures.read(
      _file(Image.fromarray(pixels), form, exif=exif, **settings), 16)
  stored = Image.fromarray(pixels)
  stored.getexif()[0x0112] = turn
  shown = np.asarray(ImageOps.exif_transpose(stored).resize(
      (16, 16), Image.Resampling.LANCZOS))
  assert np.abs(read.astype(int) - shown).max() < (40 if form == 'JPEG' else 1)


def _ramps():
  pgm = b'P5 64 64 1023\n' + (RAMP // 4).astype('>u2').tobytes()
  white_is_zero = Image.fromarray((65535 - RAMP * 16).astype(np.uint16))
  return {
      'png 16': _file(Image.fromarray((RAMP * 16).astype(np.uint16)), 'PNG'),
      'tiff 16': _file(Image.fromarray((RAMP * 16).astype(np.uint16)), 'TIFF'),
      'tiff 16, white is zero': _file(
          white_is_zero, 'TIFF', tiffinfo={262: 0}),
      'tiff 32': _file(
          Image.fromarray((RAMP * 16).astype(np.int32)), 'TIFF'),
      'tiff 32 of 0 .. 255': _file(
          Image.fromarray((RAMP // 16).astype(np.int32)), 'TIFF'),
      'tiff float of 0 .. 1': _file(
          Image.fromarray((RAMP / 4095).astype(np.float32)), 'TIFF'),
      'tiff float of 0 .. 255': _file(
          Image.fromarray((RAMP / 4095 * 255).astype(np.float32)), 'TIFF'),
      'jpeg 2000 16': _file(
          Image.fromarray((RAMP * 16).astype(np.uint16)), 'JPEG2000'),
      'pgm of 0 .. 1023': io.BytesIO(pgm),
  }


@pytest.mark.parametrize('kind', _ramps())
def test_pixel_ranges_become_0_to_255(kind):
  read = pictures.read(_ramps()[kind], SIDE)
  wanted = np.repeat((RAMP / 4095 * 255)[..., None], 3, axis=2)
  assert np.abs(read - wanted).max() <= 1.1
  assert len(np.unique(read)) == 256


@pytest.mark.parametrize('values', [
    RAMP.astype(np.int32) - 5, RAMP.astype(np.int32) * 1000,
    np.where(RAMP == 7, np.nan, 0.5).astype(np.float32),
    (RAMP * 1e30).astype(np.float32)])
def test_unknown_ranges_are_refused(values):
  with pytest.raises(pictures.Unreadable, match='in none of the ranges'):
    pictures.read(_file(Image.fromarray(values), 'TIFF'), 16)


def _dark():
  """Pictures of one dark colour that is declared transparent."""
  grey = np.full((4, 4), 40, np.uint8)
  palette = Image.new('P', (4, 4), 1)
  palette.putpalette([0, 0, 0, 10, 20, 30])
  wide = struct.pack('>3H', 0x1234, 0x5678, 0x9ABC)
  return {
      'RGB': _file(Image.new('RGB', (4, 4), (10, 20, 30)), 'PNG',
                   transparency=(10, 20, 30)),
      'RGB 16': _png(2, 2, 16, 2, (b'\0' + wide * 2) * 2,
                     _chunk(b'tRNS', wide)),
      'L': _file(Image.fromarray(grey), 'PNG', transparency=40),
      'L 16': _file(Image.fromarray(grey.astype(np.uint16) * 100), 'PNG',
                    transparency=4000),
      '1': _file(Image.new('1', (4, 4), 0), 'PNG', transparency=0),
      'P': _file(palette, 'PNG', transparency=1),
      'P bytes': _file(palette, 'PNG', transparency=b'\xff\0'),
      'P gif': _file(palette, 'GIF', transparency=1),
      'LA': _file(Image.new('LA', (4, 4), (40, 0)), 'PNG'),
      'RGBA': _file(Image.new('RGBA', (4, 4), (10, 20, 30, 0)), 'PNG'),
      'RGBA webp': _file(
          Image.new('RGBA', (4, 4), (10, 20, 30, 0)), 'WEBP', lossless=True),
  }


@pytest.mark.parametrize('kind', _dark())
def test_transparent_pixels_are_white_in_every_mode(kind):
  assert (pictures.read(_dark()[kind], 4) == 255).all()


def _greys():
  grey = Image.new('RGB', (8, 8), (200, 200, 200))
  lab = ImageCms.profileToProfile(
      grey, ImageCms.createProfile('sRGB'), ImageCms.createProfile('LAB'),
      outputMode='LAB')
  return {'P': grey.quantize(4), 'LAB': lab} | {
      mode: grey.convert(mode) for mode in ('L', 'CMYK', 'YCbCr', 'RGB')}


@pytest.mark.parametrize('mode', _greys())
def test_grey_is_grey_in_every_mode(mode):
  read = pictures.read(_file(_greys()[mode], 'TIFF'), 8)
  assert np.abs(read.astype(int) - 200).max() <= 2


def _linear_profile():
  """A grey profile of gamma 1, so that its values are linear light."""
  curve = b'curv' + bytes(4) + struct.pack('>I', 0)
  white = b'XYZ ' + bytes(4) + struct.pack('>3i', 63190, 65536, 54061)
  text = b'text' + bytes(4) + b'linear\0\0'
  tags = [(b'kTRC', curve), (b'wtpt', white), (b'desc', text)]
  offset, table, body = 128 + 4 + 12 * len(tags), b'', b''
  for name, data in tags:
    table += name + struct.pack('>II', offset + len(body), len(data))
    body += data
  size = offset + len(body)
  header = struct.pack('>I', size) + bytes(4) + struct.pack(
      '>I', 0x02400000) + b'mntrGRAYXYZ ' + bytes(12) + b'acsp' + bytes(28)
  header += struct.pack('>3i', 63190, 65536, 54061)
  return header.ljust(128, b'\0') + struct.pack('>I', len(tags)) + table + body


def test_colour_profile_is_applied():
  """Linear light of 50 of 255 is a grey of 122 on a screen."""
  dark = Image.new('L', (8, 8), 50)
  read = pictures.read(
      _file(dark, 'PNG', icc_profile=_linear_profile()), 8)
  assert np.abs(read.astype(int) - 122).max() <= 2


@pytest.mark.parametrize('profile', [b'nothing', _linear_profile()])
def test_profiles_that_do_not_fit_are_ignored(profile):
  colour = Image.new('RGB', (8, 8), (1, 50, 200))
  read = pictures.read(_file(colour, 'PNG', icc_profile=profile), 8)
  np.testing.assert_array_equal(read, np.asarray(colour))


def test_srgb_changes_nothing():
  pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  profile = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
  read = pictures.read(
      _file(Image.fromarray(pixels), 'PNG', icc_profile=profile), 16)
  np.testing.assert_array_equal(read, pixels)


@pytest.mark.parametrize('gamma, shown', [(1.0, 122), (0.45455, 50)])
def test_gamma_of_a_png_is_applied(gamma, shown):
  row = b'\0' + bytes([50] * 6)
  chunk = _chunk(b'gAMA', struct.pack('>I', round(gamma * 100_000)))
  read = pictures.read(_png(2, 2, 8, 2, row * 2, chunk), 2)
  assert np.abs(read.astype(int) - shown).max() <= 2


def test_absurd_sizes_are_refused_before_decoding():
  """A file of 100 bytes may claim 30 GB of pixels."""
  for side, says in ((100_000, 'exceeds limit'), (10_000, 'are the most')):
    with pytest.raises(pictures.Unreadable, match=says):
      pictures.read(_png(side, side, 8, 2, b'\0'), 16)


def test_postscript_is_not_run():
  with pytest.raises(pictures.Unreadable, match='cannot identify'):
    pictures.read(_file(Image.new('RGB', (8, 8)), 'EPS'), 8)


@pytest.mark.parametrize('form', ['PNG', 'JPEG', 'GIF', 'TIFF', 'WEBP', 'BMP'])
def test_damage_is_one_kind_of_error(form):
  """Whatever Pillow makes of a damaged file."""
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
  whole = _file(Image.fromarray(pixels), form).getvalue()
  rng = np.random.default_rng(1)
  refused = 0
  for _ in range(100):
    damaged = bytearray(whole[:rng.integers(1, len(whole) + 1)])
    for at in rng.integers(0, len(damaged), 3):
      damaged[at] = rng.integers(256)
    try:
      assert pictures.read(io.BytesIO(damaged), 8).shape == (8, 8, 3)
    except pictures.Unreadable:
      refused += 1
  assert refused > 20


def test_a_picture_that_generate_cannot_read_is_named(tmp_path, vocabulary):
  path = tmp_path / 'cut.png'
  path.write_bytes(b'\x89PNG\r\n\x1a\n')
  with pytest.raises(config.UserError, match='cut.png cannot be read as an'):
    generate.read_image(path, vocabulary)
  Image.new('RGB', (20, 20), 'red').save(path)
  assert generate.read_image(path, vocabulary).shape == (16, 16, 3)
