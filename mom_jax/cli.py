"""The command line shared by every command: flags in, one clear line out.

A command has a few absl flags and any number of `--config.key=value`
overrides. An error of the user ends as one line on stderr and exit code 2.
"""

from __future__ import annotations

from collections.abc import Callable
import sys

from absl import flags

from mom_jax import config

FLAGS = flags.FLAGS


def run(main: Callable[[list[str]], None], argv: list[str] | None = None):
  """Parse `argv`, call `main(overrides)` and exit.

  Args:
    main: takes the overrides as 'key=value' strings; reads its own absl flags.
    argv: program name and arguments; `sys.argv` by default.
  """
  argv = sys.argv if argv is None else argv
  if any(a in ('--help', '-h', '-help') for a in argv[1:]):
    print(help_text())
    sys.exit(0)
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
    message = ' '.join(str(e).split('\n')) if isinstance(
        e, flags.Error) else str(e)
    print(f'error: {message}', file=sys.stderr)
    sys.exit(2)
  sys.exit(0)


def help_text() -> str:
  """Return the command's docstring, its flags, and settings with defaults."""
  main = sys.modules['__main__']
  lines = [(main.__doc__ or '').strip(), '', 'Flags:']
  # absl files the flags of the main module under the name of its script.
  for flag in FLAGS.flags_by_module_dict().get(sys.argv[0], []):
    default = f' (default {flag.default!r})'
    if flag.default in (None, []):
      default = ''
    lines.append(f'  --{flag.name}: {flag.help}{default}')
  lines += ['', 'Settings, as --config.key=value (defaults of Config()):']
  for key, value, field in config.settings(config.Config()):
    lines.append(f'  --config.{key}={_shown(value)}')
    check = field.metadata['check']
    doc = field.metadata['doc']
    lines.append(f'      {doc}' + (f'; {check.text}' if check else ''))
  return '\n'.join(lines)


def _shown(value: object) -> str:
  if isinstance(value, tuple):
    return ','.join(map(str, value))
  return str(value)
