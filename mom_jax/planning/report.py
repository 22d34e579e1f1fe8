"""Plans from costs: fit into memory, speed, the limiting resource."""

from __future__ import annotations

from collections import defaultdict
import itertools
from typing import Any

from mom_jax import chips, config
from mom_jax.models import flops
from mom_jax.planning import compiled, suggestions

GIB = chips.GIB


def plan(
    cfg: config.Config, topology: chips.Topology, step: compiled.PlannedStep,
    tokens: float, basis: str,
) -> dict[str, Any]:
  """A plan as JSON values; bytes, seconds and FLOPs are of one device.

  Args:
    tokens: of the whole training.
    basis: one line on how the numbers were obtained.
  """
  cost, chip = step.cost, topology.chip
  capacity = chip.memory / chip.devices
  usable = suggestions.usable_bytes(topology)
  used = sum(step.memory.values())
  batch = cfg.data.batch_size * cfg.data.seq_len
  model = flops.train_flops_per_token(cfg) * batch / topology.devices
  peak, rate = chip.flops / chip.devices, chip.hbm / chip.devices
  bounds = {'compute': cost.flops / peak, 'HBM': cost.hbm_bytes / rate,
            'ICI' if topology.is_tpu else 'NVLink': cost.ici_s,
            'DCN': cost.dcn_s}
  bound = max(bounds.values())
  expected = max(bound, cost.busy_s + cost.exposed_s)
  total, active = flops.count_params(cfg)
  return {
      'topology': topology.name,
      'chips': topology.chips,
      'description': topology.describe(),
      'basis': basis,
      'mesh': step.mesh,
      'strategy': cfg.mesh.strategy,
      'parameters': total,
      'active_parameters': active,
      'tokens_per_step': batch,
      'grad_accum_steps': cfg.train.grad_accum_steps,
      'remat': cfg.model.remat,
      'memory': step.memory,
      'memory_used': used,
      'device_memory': capacity,
      'fits': used <= usable,
      'flops': cost.flops,
      'model_flops': model,
      'hbm_bytes': cost.hbm_bytes,
      'ici_bytes': cost.ici_bytes,
      'dcn_bytes': cost.dcn_bytes,
      'traffic': traffic(cost),
      'collectives': collectives(cost),
      'bounds': bounds,
      'limited_by': max(bounds, key=bounds.get),
      'bound_s': bound,
      'busy_s': cost.busy_s,
      'exposed_s': cost.exposed_s,
      'communication_fraction': cost.exposed_s / expected,
      'step_s': expected,
      'mfu': model / peak / expected,
      'mfu_bound': model / peak / bound,
      'tokens_per_s': batch / expected,
      'tokens': tokens,
      'days': tokens / batch * expected / 86400,
      'unknown_loops': sorted(set(cost.unknown_loops)),
      'suggestion': suggestions.suggest(
          cfg, step.mesh, step.memory, used, usable),
  }


def traffic(cost: Any) -> list[dict[str, Any]]:
  """Bytes and seconds by kind of collective, size of its group and links."""
  rows: dict[Any, list[float]] = defaultdict(lambda: [0.0] * 4)
  for c, n in cost.collectives:
    moved = c.transfer
    row = rows[c.kind, c.group_size, moved.dcn_bytes > 0]
    for k, value in enumerate(
        (1, moved.ici_bytes, moved.dcn_bytes, c.seconds)):
      row[k] += n * value
  return [
      {'kind': kind, 'devices': devices, 'calls': int(row[0]),
       'ici_bytes': row[1], 'dcn_bytes': row[2], 'seconds': row[3]}
      for (kind, devices, _), row in sorted(
          rows.items(), key=lambda item: -item[1][3])]


def collectives(cost: Any) -> list[dict[str, Any]]:
  """The collectives in the program's order, equal neighbours together."""

  def key(item):
    c, iterations = item
    return c.kind, c.group_size, c.overlapped, iterations

  return [
      {'kind': kind, 'devices': devices, 'overlapped': overlapped,
       'iterations': iterations, 'count': len(group := list(items)),
       'bytes': sum(c.transfer.ici_bytes + c.transfer.dcn_bytes
                    for c, _ in group),
       'from': group[0][0].label}
      for (kind, devices, overlapped, iterations), items in itertools.groupby(
          cost.collectives, key=key)]


def text(p: dict[str, Any]) -> str:
  """A plan to print."""
  device = 'device' if p['topology'].startswith('tpu7x') else 'chip'
  lines = [
      f'{p["topology"]}: {p["description"]}; {p["basis"]}',
      f'mesh {p["mesh"]}, strategy {p["strategy"]}, grad accum steps'
      f' {p["grad_accum_steps"]}, remat {p["remat"]};'
      f' {p["parameters"] / 1e6:,.1f} M parameters,'
      f' {p["tokens_per_step"]:,} tokens per step', '',
      f'Memory of a {device}, GiB']
  lines += [f'  {kind:28}{size / GIB:10.2f}'
            for kind, size in p['memory'].items()]
  fits = 'fits' if p['fits'] else 'DOES NOT FIT'
  lines += [
      f'  {"sum":28}{p["memory_used"] / GIB:10.2f}  of'
      f' {p["device_memory"] / GIB:.2f}: {fits}', '',
      f'A step of a {device}',
      f'  FLOPs {p["flops"] / 1e12:.2f} T, of them the model\'s'
      f' {p["model_flops"] / 1e12:.2f} T; HBM {p["hbm_bytes"] / 1e9:.1f} GB;'
      f' ICI {p["ici_bytes"] / 1e9:.2f} GB; DCN {p["dcn_bytes"] / 1e9:.2f} GB',
      '']
  lines += _table(
      ('collective', 'devices', 'calls', 'ICI GB', 'DCN GB', 'ms'),
      [(r['kind'], r['devices'], r['calls'], f'{r["ici_bytes"] / 1e9:.3f}',
        f'{r["dcn_bytes"] / 1e9:.3f}', f'{1e3 * r["seconds"]:.2f}')
       for r in p['traffic']])
  lines += ['', 'Collectives in the order of the step']
  lines += [
      f'  {r["iterations"]:>4} x {r["count"]} {r["kind"]} over {r["devices"]},'
      f' {r["bytes"] / 1e6:.2f} MB{", overlapped" * r["overlapped"]}:'
      f' {r["from"][-60:]}' for r in p['collectives']]
  lines += ['', 'Least time of a step by resource, ms']
  lines += [f'  {name:10}{1e3 * s:10.1f}' for name, s in p['bounds'].items()]
  lines += [
      f'  limited by {p["limited_by"]}; instructions one after another:'
      f' {1e3 * p["busy_s"]:.1f}, and {1e3 * p["exposed_s"]:.1f} of'
      f' exposed collectives ({p["communication_fraction"]:.1%})', '',
      f'Expected: {1e3 * p["step_s"]:.1f} ms per step, MFU {p["mfu"]:.1%} (at'
      f' most {p["mfu_bound"]:.1%}), {p["tokens_per_s"]:,.0f} tokens/s,'
      f' {p["days"]:.2f} days for {p["tokens"] / 1e9:g} B tokens']
  if p['unknown_loops']:
    lines.append('Counted once, since their iterations depend on data: '
                 + ', '.join(p['unknown_loops']))
  if p['suggestion']:
    lines.append(f'To make it fit: {p["suggestion"]}')
  return '\n'.join(lines)


def ranking(plans: list[dict[str, Any]]) -> str:
  """Plans by expected step time, those that fit first."""
  ordered = sorted(plans, key=lambda p: (not p['fits'], p['step_s']))
  return '\n'.join(_table(
      ('mesh', 'grad accum', 'fits', 'GiB', 'ms per step', 'MFU', 'exposed',
       'limited by'),
      [(' '.join(f'{k}={v}' for k, v in p['mesh'].items() if v > 1) or '1',
        p['grad_accum_steps'], 'yes' if p['fits'] else 'no',
        f'{p["memory_used"] / GIB:.1f}', f'{1e3 * p["step_s"]:.1f}',
        f'{p["mfu"]:.1%}', f'{p["communication_fraction"]:.1%}',
        p['limited_by'])
       for p in ordered]))


def _table(head, rows) -> list[str]:
  every = [head, *([str(x) for x in row] for row in rows)]
  wide = [max(len(row[k]) for row in every) for k in range(len(head))]
  return ['  ' + '  '.join(
      cell.ljust(w) if k == 0 else cell.rjust(w)
      for k, (cell, w) in enumerate(zip(row, wide))) for row in every]
