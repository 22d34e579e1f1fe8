"""The device mesh: shardings, per-device code, rows that travel.

`sharding` makes the mesh and says how arrays lie on it, `per_device` runs code
on the part of the arrays that each device holds, `all_to_all` sends rows to the
device that owns their memory or expert and back.
"""

__all__ = ['all_to_all', 'per_device', 'sharding']
