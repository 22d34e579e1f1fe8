"""The workdir of a run that made no step: for what reads one."""

import json
import pathlib

import flax.linen as nn
import grain
import jax
import tiny_run

from mom_jax import models, routing
from mom_jax.data import encode
from mom_jax.training import checkpoint


def make(
    folder: pathlib.Path, *overrides: str, name: str = 'run', grow: float = 1.0
) -> pathlib.Path:
  """A workdir with config, vocabulary, metrics and a checkpoint of step 0.

  Args:
    name: of the workdir; its data, beside it in `folder`, serves others too.
    grow: factor of matrices, for a model that tells tokens apart.
  """
  cfg = tiny_run.make_config(folder, *overrides)
  workdir = folder / name
  checkpoint.claim(workdir, cfg)
  encode.build_vocabulary(cfg).save(workdir)
  params = nn.meta.unbox(models.init_params(cfg, jax.random.key(0)))
  small = (*routing.STATE_NAMES, 'scale')
  params = jax.tree_util.tree_map_with_path(
      lambda path, p: p if path[-1].key in small else p * grow, params)
  saved = checkpoint.Checkpoints(workdir, cfg.checkpoint)
  data = iter(grain.MapDataset.range(3).to_iter_dataset())
  saved.save(0, {'params': params}, data, {})
  saved.close()
  records = [
      {'step': step, f'{prefix}loss_{name}': 5.0 - step / 10}
      for step in (1, 2, 3) for prefix in ('', 'val_')
      for name in ('text', 'image')
  ]
  (workdir / 'metrics.jsonl').write_text(
      ''.join(json.dumps(r) + '\n' for r in records))
  return workdir
