"""Budgets of GPU kernels, by kernel and variant: scripts/gpu_budget.json.

An entry holds the most that any proven version of Triton makes of it. To raise
entries, run the tests with GPU_BUDGET=write on each pair of versions, and read
the difference.
"""

import json
import os
import pathlib

FILE = pathlib.Path(__file__).parents[2] / 'scripts/gpu_budget.json'
COUNTED = ('registers', 'spilled', 'shared')


def check(kernel: str, variant: str, measured: dict) -> None:
  """No fault, and nothing needs more than its budget."""
  assert not measured['faults'], measured['faults']
  found = {name: measured[name] for name in COUNTED}
  budget = json.loads(FILE.read_text()) if FILE.exists() else {}
  known = budget.setdefault(kernel, {}).get(variant)
  if os.environ.get('GPU_BUDGET') == 'write':
    budget[kernel][variant] = {
        name: max(n, (known or {}).get(name, 0)) for name, n in found.items()}
    FILE.write_text(json.dumps(budget, indent=1, sort_keys=True) + '\n')
    return
  assert known, f'{kernel} {variant} has no budget: GPU_BUDGET=write makes one'
  for name, n in found.items():
    assert n <= known[name], f'{kernel} {variant}: {name} {n} > {known[name]}'
