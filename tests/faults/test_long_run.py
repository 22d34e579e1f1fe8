"""A long run takes no more memory, files or threads at its end than before."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

import pytest
import tiny_run

from mom_jax import config
from mom_jax.training import metrics

ROOT = pathlib.Path(__file__).parents[2]
SHORT, WHOLE = 400, 20_000  # steps
MEMORY = 0.05  # growth of memory from the first half to the second


@dataclasses.dataclass(frozen=True)
class Held:
  """What a process holds: bytes of memory, open files, threads."""

  step: int
  memory: int
  files: int
  threads: int


def _held(pid: int, step: int) -> Held:
  process = pathlib.Path(f'/proc/{pid}')
  pages = int((process / 'statm').read_text().split()[1])
  return Held(step, pages * os.sysconf('SC_PAGE_SIZE'),
              len(list((process / 'fd').iterdir())),
              len(list((process / 'task').iterdir())))


def _step(workdir: pathlib.Path) -> int:
  """The last one of which metrics are on disk."""
  try:
    with (workdir / 'metrics.jsonl').open('rb') as f:
      f.seek(max(0, f.seek(0, 2) - 10_000))
      lines = f.read().split(b'\n')[:-1]
  except FileNotFoundError:
    return 0
  return int(lines[-1].split(b'"step": ')[1].split(b',')[0]) if lines else 0


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not pathlib.Path('/proc/self/statm').exists(), reason='needs /proc')
def test_a_long_run_holds_no_more_at_its_end(campaign, tmp_path):
  steps = campaign.size(SHORT, WHOLE)

  def inject() -> str:
    cfg = tiny_run.make_config(
        tmp_path, 'model.num_layers=1', 'model.pattern=attention/mlp',
        'data.workers=1', f'train.steps={steps}',
        f'train.eval_every={steps // 40}',
        'train.eval_batches=2', f'checkpoint.every={steps // 60}',
        'train.writers=jsonl,tensorboard')
    (tmp_path / 'config.json').write_text(config.to_json(cfg))
    workdir, held = tmp_path / 'run', []
    with (tmp_path / 'output.txt').open('wb') as output:
      process = subprocess.Popen(
          [sys.executable, '-m', 'mom_jax.train',
           f'--config={tmp_path / "config.json"}', f'--workdir={workdir}'],
          stdin=subprocess.DEVNULL, stdout=output, stderr=output,
          env=os.environ | {'PYTHONPATH': str(ROOT),
                            'JAX_NUM_CPU_DEVICES': '1'})
    while process.poll() is None:
      step = _step(workdir)
      if step > steps // 8 and process.poll() is None:
        held.append(_held(process.pid, step))
      time.sleep(steps / 20_000)
    assert process.returncode == 0, (tmp_path / 'output.txt').read_text()
    first = [x for x in held if x.step <= steps // 2]
    second = [x for x in held if steps // 2 < x.step < steps]
    assert len(first) > 5 and len(second) > 5, held
    # Saves hold some for a moment; what leaks is held between them too.
    least = [tuple(min(getattr(x, name) for x in part)
                   for name in ('memory', 'files', 'threads'))
             for part in (first, second)]
    (memory, files, threads), (memory2, files2, threads2) = least
    assert memory2 <= memory * (1 + MEMORY), least
    assert files2 <= files and threads2 <= threads, least
    lines = metrics.read_jsonl(workdir)
    assert [x['step'] for x in lines if 'loss' in x] == [*range(1, steps + 1)]
    validated = [x['step'] for x in lines if 'val_loss' in x]
    assert validated == [*range(steps // 40, steps + 1, steps // 40)]
    return (
        f'{steps} steps; first and second half: {memory >> 20} and'
        f' {memory2 >> 20} MiB, {files} and {files2} open files, {threads} and'
        f' {threads2} threads; every metric there')

  campaign.run('long_run', f'{steps} steps', inject)
