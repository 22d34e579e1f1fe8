"""Training: step, loop, losses, optimizer, checkpoints, several processes.

`loop` runs on the host, `step` on the devices.
"""

__all__ = [
    'aux_router', 'checkpoint', 'loop', 'losses', 'metrics', 'multihost',
    'step', 'upcycle']
