"""The command line shared by every command: flags in, one clear line out.

A command has a few absl flags and any number of `--config.key=value`
overrides. An error of the user ends as one line on stderr and exit code 2,
Ctrl-C as one line and exit code 130.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
import contextlib
import os
import re
import sys
from typing import Any

from absl import flags

from mom_jax import config

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # flags made here are those of the caller


def run(
    main: Callable[[list[str]], None], argv: list[str] | None = None,
    settings: Collection[str] | None = None,
):
  """Parse `argv`, call `main(overrides)` and exit.

  Args:
    main: takes the overrides as 'key=value' strings; reads its own absl flags.
    argv: program name and arguments; `sys.argv` by default.
    settings: that the command reads, for --help; all by default.
  """
  argv = sys.argv if argv is None else argv
  with _lasting_output():
    if any(a in ('--help', '-h', '-help') for a in argv[1:]):
      print(help_text(settings))
    else:
      _run(main, argv)
  sys.exit(0)


def _run(main: Callable[[list[str]], None], argv: list[str]) -> None:
  prefix = '--config.'
  overrides = [a[len(prefix):] for a in argv[1:] if a.startswith(prefix)]
  try:
    rest = FLAGS([a for a in argv if not a.startswith(prefix)])
    if len(rest) > 1:
      raise config.UserError(
          f'{rest[1]!r} is not understood; write flags as --name=value.'
      )
    main(overrides)
  except (flags.Error, config.UserError) as e:
    message = _words(e) if isinstance(e, flags.Error) else str(e)
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    sys.exit(130)


class _Lasting:
  """An output stream that a command outlives.

  Characters that it cannot show are replaced; when its reader is gone or its
  disk full, what else is written goes nowhere.
  """

  def __init__(self, stream: Any):
    self._stream = stream
    if hasattr(stream, 'reconfigure'):
      stream.reconfigure(errors='replace')

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def write(self, text: str) -> int:
    try:
      return self._stream.write(text)
    except OSError as e:
      self._give_up(e)
      return len(text)

  def flush(self) -> None:
    try:
      self._stream.flush()
    except OSError as e:
      self._give_up(e)

  def _give_up(self, error: OSError) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, self._stream.fileno())
    os.close(nowhere)
    if self._stream is not sys.__stderr__:
      reason = ('its reader is gone' if isinstance(error, BrokenPipeError)
                else error.strerror)
      print(f'the output cannot be written ({reason}); the command goes on'
            ' without it', file=sys.stderr)


@contextlib.contextmanager
def _lasting_output() -> Iterator[None]:
  """Let no command end because of its output: closed, gone or of few letters.
  """
  before = sys.stdout, sys.stderr
  with open(os.devnull, 'w', encoding='utf-8') as nowhere:
    sys.stdout, sys.stderr = (
        _Lasting(nowhere if stream is None else stream) for stream in before)
    try:
      yield
    finally:
      sys.stdout.flush()
      sys.stderr.flush()
      sys.stdout, sys.stderr = before


def _words(error: flags.Error) -> str:
  """Say an error of absl's in one line."""
  text = ' '.join(str(error).split('\n'))
  missing = re.findall(r'Flag (--\w+) must have a value other than None', text)
  if missing:
    return f'{", ".join(missing)} missing; --help lists the flags.'
  return text.removeprefix('flag ')


class _PathParser(flags.ArgumentParser):
  """Parses a flag that names a file or folder; see `path`."""

  def parse(self, argument: str) -> str:
    return path(argument)


def define_path(
    name: str, default: str | None, text: str, **how: Any
) -> flags.FlagHolder[str | None]:
  """Define a flag that names a file or folder on disk."""
  return flags.DEFINE(
      _PathParser(), name, default, text,
      serializer=flags.ArgumentSerializer(), **how)


def path(text: str) -> str:
  """Expand `~` in the name of a file or folder.

  Raises:
    ValueError: it is a URL, or there is no home folder.
  """
  if re.match(r'[a-zA-Z][a-zA-Z0-9+.-]*://', text):
    raise ValueError(
        'a URL cannot be read or written; give a folder on disk, or mount the'
        ' bucket (gcsfuse, s3fs, rclone mount) and give its mount point.')
  if text.startswith('~') and os.path.expanduser(text) == text:
    raise ValueError('there is no such home folder; give the whole path.')
  return os.path.expanduser(text)


def paths(flag: str, texts: Sequence[str]) -> list[str]:
  """Expand `~` in each name that a flag gives; see `path`.

  Raises:
    UserError: one is a URL, or there is no home folder.
  """
  expanded = []
  for text in texts:
    try:
      expanded.append(path(text))
    except ValueError as e:
      raise config.UserError(f'--{flag}={text}: {e}') from e
  return expanded


def help_text(settings: Collection[str] | None = None) -> str:
  """Return the command's docstring, its flags, and settings with defaults.

  Args:
    settings: to list; all by default.
  """
  main = sys.modules['__main__']
  lines = [(main.__doc__ or '').strip(), '', 'Flags:']
  # absl files the flags of the main module under the name of its script.
  for flag in FLAGS.flags_by_module_dict().get(sys.argv[0], []):
    default = f' (default {flag.default!r})'
    if flag.default in (None, []):
      default = ''
    lines.append(f'  --{flag.name}: {flag.help}{default}')
  lines += ['', 'Settings, as --config.key=value (defaults of Config()):'
            if settings is None else
            'Settings of the run that may be others here, as'
            ' --config.key=value:']
  for key, value, field in config.settings(config.Config()):
    if settings is not None and key not in settings:
      continue
    lines.append(f'  --config.{key}={_shown(value)}')
    check = field.metadata['check']
    doc = field.metadata['doc']
    lines.append(f'      {doc}' + (f'; {check.text}' if check else ''))
  return '\n'.join(lines)


def _shown(value: object) -> str:
  if isinstance(value, tuple):
    return ','.join(map(str, value))
  return str(value)
