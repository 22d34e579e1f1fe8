"""Convert published checkpoints to runs and back, and upcycle runs.

  python -m mom_jax.convert --from_hf=DIR --workdir=runs/published

reads a published checkpoint (flash-linear-attention's MoM, Gated DeltaNet,
DeltaNet, GLA, HGRN2, GSA, RetNet, RWKV-7, Mamba-2, linear attention and
Transformer) into a run for python -m mom_jax.generate and mom_jax.evaluate; to
train it further, use --config.train.init_from=runs/published. Only safetensors
are read.

  python -m mom_jax.convert --to_hf=DIR --workdir=runs/mine

writes the newest checkpoint of a run in the same formats.

  python -m mom_jax.convert --upcycle=runs/seed --config=configs/moma_90m.py \\
    --workdir=runs/upcycled

makes a run with experts from a finished run without (`training/upcycle.py`);
python -m mom_jax.train with the same --config and --workdir continues it.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from absl import flags

from mom_jax import cli, config, hf
from mom_jax.data import tokenizers
from mom_jax.training import checkpoint, upcycle

load_hf = hf.files.load
save_hf = hf.files.save

_TASKS = ('from_hf', 'to_hf', 'upcycle')
# Settings of a published model that may be chosen.
_FREE = (*checkpoint.MAY_CHANGE, 'model.dtype', 'model.mixer.chunk')


def from_hf(
    directory: pathlib.Path, workdir: pathlib.Path, overrides: list[str]
) -> list[str]:
  """Make `workdir` a run with the parameters of a published checkpoint.

  Returns:
    Names of the copied files of the tokenizer.
  Raises:
    UserError: the checkpoint cannot be read, or the workdir holds a run.
  """
  cfg, params = load_hf(directory)
  seq_len = min(2048, cfg.data.seq_len)
  cfg = dataclasses.replace(
      cfg, data=dataclasses.replace(cfg.data, seq_len=seq_len))
  cfg = config.override_some(
      cfg, overrides, [key for key, _, _ in config.settings(cfg)
                       if key in _FREE or not key.startswith('model.')])
  vocabulary = _vocabulary(directory)
  if vocabulary:
    file = workdir / (tokenizers.TEXT + vocabulary.text.suffix)
    tokenizer = dataclasses.replace(cfg.data.tokenizer, text=str(file))
    cfg = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, tokenizer=tokenizer))
    vocabulary.check(cfg)
  checkpoint.save_params(workdir, cfg, params)
  if vocabulary:
    vocabulary.save(workdir)
  return hf.files.copy_tokenizer(directory, workdir)


def _vocabulary(directory: pathlib.Path) -> tokenizers.Vocabulary | None:
  """Make the vocabulary of a published tokenizer, with its special tokens."""
  for name in ('tokenizer.json', 'tokenizer.model'):
    if (directory / name).is_file():
      published = hf.files.read_config(directory)
      ids = {}
      for key, default in (('bos', 1), ('eos', 2), ('pad', None)):
        value = published.get(f'{key}_token_id', default)
        ids[key] = value[0] if isinstance(value, list) else value
      ids['eos'] = ids['bos'] if ids['eos'] is None else ids['eos']
      ids = {k: ids['eos'] if v is None else v for k, v in ids.items()}
      return tokenizers.from_file(directory / name, ids)
  return None


def to_hf(directory: pathlib.Path, workdir: pathlib.Path) -> int:
  """Write the newest checkpoint of a run and return its step.

  Raises:
    UserError: there is no checkpoint, or no published format holds the model.
  """
  cfg, params, step = checkpoint.load_params(workdir)
  with checkpoint.writing(str(directory)):
    save_hf(directory, cfg, params)
    hf.files.copy_tokenizer(workdir, directory)
  return step


def main(overrides: list[str]) -> None:
  """Run the command from its flags."""
  f = flags.FLAGS
  asked = [name for name in _TASKS if getattr(f, name)]
  if len(asked) != 1 or not f.workdir:
    raise config.UserError(
        'give --workdir=DIR and one of --from_hf=DIR, --to_hf=DIR and'
        ' --upcycle=SEED_WORKDIR.'
    )
  workdir = pathlib.Path(f.workdir)
  {'from_hf': _from_hf, 'to_hf': _to_hf, 'upcycle': _upcycle}[asked[0]](
      f, workdir, overrides)


def _from_hf(f: Any, workdir: pathlib.Path, overrides: list[str]) -> None:
  found = from_hf(pathlib.Path(f.from_hf), workdir, overrides)
  print(f'written: {workdir}, a run at step 0')
  if not any(name.startswith('tokenizer.') for name in found):
    print(f'note: {f.from_hf} has no tokenizer.json or tokenizer.model, so'
          ' it cannot generate text.')
    return
  print(f"try python -m mom_jax.generate --workdir={workdir} --prompt='...'")


def _to_hf(f: Any, workdir: pathlib.Path, overrides: list[str]) -> None:
  if overrides:
    raise config.UserError(
        f'--config.{overrides[0]}: --to_hf writes a run unchanged; leave it'
        ' out.'
    )
  step = to_hf(pathlib.Path(f.to_hf), workdir)
  print(f'written: {f.to_hf}, the model of step {step}')


def _upcycle(f: Any, workdir: pathlib.Path, overrides: list[str]) -> None:
  if not f.config:
    raise config.UserError(
        '--config=FILE is missing; give the recipe of the model with experts.')
  cfg = config.load(f.config, overrides)
  upcycle.upcycle(f.upcycle, cfg, workdir, f.schedule, f.optimizer)
  if not cfg.model.moma.noise:
    print('note: config.model.moma.noise=False, so the copies of an expert'
          ' diverge by their routers alone.')
  print(f'written: {workdir}; continue with python -m mom_jax.train'
        f' --config={workdir}/config.json --workdir={workdir}')


def define_flags() -> None:
  flags.DEFINE_string(
      'from_hf', None, 'folder of a published checkpoint to read')
  flags.DEFINE_string('to_hf', None, 'folder to write a run to')
  flags.DEFINE_string(
      'upcycle', None, 'workdir of a run that is dense or has one expert per'
      ' modality')
  flags.DEFINE_string(
      'config', None, 'upcycle: recipe or config.json of the new run')
  flags.DEFINE_string('workdir', None, 'folder of the run')
  flags.DEFINE_string(
      'schedule', 'restart', 'learning rate: restart at step 0, or continue at'
      " the seed's step")
  flags.DEFINE_string(
      'optimizer', 'reset', 'moments: reset to zero, or copy those of each FFN'
      ' to its experts')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
