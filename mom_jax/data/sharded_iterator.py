"""Batches that do not depend on the number of processes.

The documents of a run are divided among `data.readers` readers. Each gives its
rows of every batch, in the order of the readers, and each process runs as many
readers. Checkpoints hold the position of each reader, so that a run may resume
with any number of processes that divides the readers, on the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from etils import epath
import grain
import numpy as np
import orbax.checkpoint as ocp

from mom_jax import digest


class ShardedIterator(grain.DatasetIterator):
  """The readers of this process as one iterator of batches.

  Args:
    readers: iterators of batches (tuples of arrays) by index of the reader.
    num_readers: of all processes.
  """

  def __init__(
      self, readers: Mapping[int, grain.DatasetIterator], num_readers: int
  ):
    super().__init__()
    self.readers = dict(sorted(readers.items()))
    self.num_readers = num_readers

  def __next__(self) -> Any:
    batches = [next(reader) for reader in self.readers.values()]
    if len(batches) == 1:
      return batches[0]
    return type(batches[0])(*(np.concatenate(x) for x in zip(*batches)))

  def get_state(self) -> dict[str, Any]:
    return {str(k): r.get_state() for k, r in self.readers.items()}

  def set_state(self, state: dict[str, Any]) -> None:
    for k, reader in self.readers.items():
      reader.set_state(state[str(k)])

  def start_prefetch(self) -> None:
    for reader in self.readers.values():
      reader.start_prefetch()

  def close(self) -> None:
    for reader in self.readers.values():
      reader.close()


def readers_of_process(
    num_readers: int, process_index: int, process_count: int
) -> range:
  """Indices of the readers that a process runs."""
  per_process = num_readers // process_count
  return range(process_index * per_process, (process_index + 1) * per_process)


def _readers(data: grain.DatasetIterator) -> tuple[dict[int, Any], int]:
  """(readers by index, number of readers of all processes)."""
  if isinstance(data, ShardedIterator):
    return data.readers, data.num_readers
  return {0: data}, 1


class Handler(ocp.CheckpointHandler):
  """Saves a file per reader, named as Grain names that of a process."""

  def save(self, directory: epath.PathLike, args: Save) -> None:
    readers, num_readers = _readers(args.item)
    for k, reader in readers.items():
      position = digest.sealed({'position': reader.get_state()})
      _file(directory, k, num_readers).write_text(json.dumps(position))

  def restore(self, directory: epath.PathLike, args: Restore) -> Any:
    readers, num_readers = _readers(args.item)
    for k, reader in readers.items():
      file = _file(directory, k, num_readers)
      if not file.exists():
        raise ValueError(f'{file} does not exist')
      position = digest.unsealed(json.loads(file.read_text()))['position']
      reader.set_state(position)
      reader.start_prefetch()
    return args.item

  def structure(self, directory: epath.PathLike) -> None:
    del directory

  def metadata(self, directory: epath.PathLike) -> None:
    del directory

  def finalize(self, directory: epath.PathLike) -> None:
    del directory

  def close(self) -> None:
    pass


def _file(
    directory: epath.PathLike, reader: int, num_readers: int
) -> epath.Path:
  return epath.Path(directory) / f'process_{reader}-of-{num_readers}.json'


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):
  """Saves the positions of an iterator's readers."""

  item: grain.DatasetIterator


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):
  """Moves an iterator's readers to their positions."""

  item: grain.DatasetIterator
