"""Where data stands, whoever reads it: by reader, not by process.

A run's documents are dealt to `data.readers` readers. Each gives its rows of
every batch, in the order of their numbers, and each process runs an equal share
of them. What is saved is the position of each reader, so a run may go on with
any number of processes that divides the readers, and draws the same batches.
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


class Readers(grain.DatasetIterator):
  """The readers of this process as one iterator of batches.

  Args:
    readers: iterators of batches (tuples of arrays) by reader's number.
    count: readers of all processes.
  """

  def __init__(self, readers: Mapping[int, grain.DatasetIterator], count: int):
    super().__init__()
    self.readers, self.count = dict(sorted(readers.items())), count

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


def share(count: int, process_index: int, process_count: int) -> range:
  """The readers of a process."""
  each = count // process_count
  return range(process_index * each, (process_index + 1) * each)


def _numbered(data: grain.DatasetIterator) -> tuple[dict[int, Any], int]:
  if isinstance(data, Readers):
    return data.readers, data.count
  return {0: data}, 1


class Handler(ocp.CheckpointHandler):
  """A file for each reader, of the name that Grain gives to a process's."""

  def save(self, directory: epath.PathLike, args: Save) -> None:
    readers, count = _numbered(args.item)
    for k, reader in readers.items():
      _file(directory, k, count).write_text(json.dumps(reader.get_state()))

  def restore(self, directory: epath.PathLike, args: Restore) -> Any:
    readers, count = _numbered(args.item)
    for k, reader in readers.items():
      file = _file(directory, k, count)
      if not file.exists():
        raise ValueError(f'{file} does not exist')
      reader.set_state(json.loads(file.read_text()))
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


def _file(directory: epath.PathLike, reader: int, count: int) -> epath.Path:
  return epath.Path(directory) / f'process_{reader}-of-{count}.json'


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
