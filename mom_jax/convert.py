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
    text = 'bytes'
    if vocabulary.text.suffix:
      text = str(workdir / (tokenizers.TEXT + vocabulary.text.suffix))
    tokenizer = dataclasses.replace(cfg.data.tokenizer, text=text)
    cfg = dataclasses.replace(
        cfg, data=dataclasses.replace(cfg.data, tokenizer=tokenizer))
    vocabulary.check(cfg)
  types = {name: kind for name, kind in hf.files.stored_types(directory).items()
           if kind != cfg.model.dtype}
  ids = hf.files.token_ids(directory)
  checkpoint.save_params(workdir, cfg, params)
  if vocabulary:
    vocabulary.save(workdir)
  hf.files.write_json(
      workdir / hf.files.RECORD, {'token_ids': ids, 'tensor_types': types})
  return hf.files.copy_tokenizer(directory, workdir)


def _vocabulary(directory: pathlib.Path) -> tokenizers.Vocabulary | None:
  """Make the vocabulary of a published tokenizer, with its special tokens.

  `to_hf` writes that of a run too, which is read back as it was.
  """
  if (directory / tokenizers.VOCABULARY).is_file():
    return tokenizers.load(directory)
  for name in ('tokenizer.json', 'tokenizer.model'):
    if (directory / name).is_file():
      any_ids = tokenizers.from_file(
          directory / name, dict(bos=0, eos=0, pad=0))
      return tokenizers.from_file(
          directory / name, _special_ids(directory, any_ids.text))
  return None


def _special_ids(
    directory: pathlib.Path, tokenizer: Any
) -> dict[str, Any]:
  """Find the ids of special tokens in the files of a published model."""
  found = hf.files.token_ids(directory)
  for key, value in hf.files.special_tokens(directory).items():
    ids = tokenizer.encode(value).tolist()
    if f'{key}_id' not in found and len(ids) == 1:
      found[f'{key}_id'] = ids[0]
  bos, eos, pad = (found.get(f'{k}_token_id') for k in ('bos', 'eos', 'pad'))
  stop = eos if isinstance(eos, list) else [bos if eos is None else eos]
  if stop == [None]:
    raise config.UserError(
        f'{directory} does not say which token ends a text; add'
        ' "eos_token_id" to its config.json.'
    )
  ids = dict(bos=stop[0] if bos is None else bos, eos=stop[0],
             pad=stop[0] if pad is None else pad)
  for key, value in (*(('eos', i) for i in stop), *ids.items()):
    if not 0 <= value < tokenizer.size:
      raise config.UserError(
          f'{directory} has {key}_token_id={value}, but its tokenizer has the'
          f' ids 0 to {tokenizer.size - 1}; give the tokenizer of the model.'
      )
  return ids if len(stop) == 1 else ids | {'stop': stop}


def to_hf(
    directory: pathlib.Path, workdir: pathlib.Path, function: str = ''
) -> int:
  """Write the newest checkpoint of a run and return its step.

  Tokenizer, special ids and generation config come along, so that `from_hf`
  makes a run again that trains, generates and stops as this one.

  Args:
    directory: to write to.
    workdir: of the run.
    function: image tokenizer that may be called; see `tokenizers.load`.

  Raises:
    UserError: there is no checkpoint, or no published format holds the model.
  """
  if (directory / 'checkpoints').exists():
    raise config.UserError(
        f'--to_hf={directory} is the folder of a run; choose another one.')
  cfg, params, step = checkpoint.load_params(workdir)
  record, vocabulary = hf.files.read_record(workdir), None
  if (workdir / tokenizers.VOCABULARY).is_file():
    vocabulary = tokenizers.load(workdir, function)
  ids = record.get('token_ids') or {}
  if vocabulary and ids.get('eos_token_id') is None:
    ids = {'bos_token_id': vocabulary.bos, 'eos_token_id': vocabulary.eos,
           'pad_token_id': vocabulary.pad}
  with checkpoint.writing(str(directory)):
    save_hf(directory, cfg, params, types=record.get('tensor_types'),
            token_ids=ids)
    _write_tokenizer(directory, workdir, vocabulary)
    if ids and not (directory / hf.files.GENERATION).exists():
      hf.files.write_json(directory / hf.files.GENERATION, ids)
  return step


def _write_tokenizer(
    directory: pathlib.Path, workdir: pathlib.Path,
    vocabulary: tokenizers.Vocabulary | None,
) -> None:
  """Write the tokenizer for this program and for others.

  Files of an earlier model in the folder are removed.
  """
  if vocabulary is None:
    hf.files.copy_tokenizer(workdir, directory)
    return
  for name in (*hf.files.TOKENIZER, *tokenizers.FILES):
    (directory / name).unlink(missing_ok=True)
  vocabulary.save(directory)
  found = hf.files.copy_tokenizer(workdir, directory)
  if not {'tokenizer.json', 'tokenizer.model'} & set(found):
    own = vocabulary.special_ids is None
    hf.files.write_tokenizer(
        directory, vocabulary.text.suffix, vocabulary.text.content,
        [f'<{name}>' for name in tokenizers.SPECIALS] if own else [])


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
  key = 'data.tokenizer.image'
  if more := [x for x in overrides if not x.startswith(f'{key}=')]:
    raise config.UserError(
        f'--config.{more[0]}: --to_hf writes a run unchanged; leave it out.')
  step = to_hf(pathlib.Path(f.to_hf), workdir, config.given(overrides, key))
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
  cli.define_path(
      'from_hf', None, 'folder of a published checkpoint to read')
  cli.define_path('to_hf', None, 'folder to write a run to')
  cli.define_path(
      'upcycle', None, 'workdir of a run that is dense or has one expert per'
      ' modality')
  flags.DEFINE_string(
      'config', None, 'upcycle: recipe or config.json of the new run')
  cli.define_path('workdir', None, 'folder of the run')
  flags.DEFINE_string(
      'schedule', 'restart', 'learning rate: restart at step 0, or continue at'
      " the seed's step")
  flags.DEFINE_string(
      'optimizer', 'reset', 'moments: reset to zero, or copy those of each FFN'
      ' to its experts')


if __name__ == '__main__':
  define_flags()
  cli.run(main)
