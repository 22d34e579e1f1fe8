"""Makes this folder from the whole set of reference arrays.

  python tests/golden/subset.py FOLDER_OF_THE_WHOLE_SET

Arrays that no test reads are left out; the others are copied bit by bit.
"""

import pathlib
import shutil
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
FILES = (
    'layer_cu_seqlens', 'layer_single_kv_no_shared', 'layer_sparse_memory',
    'decode_leftpad', 'model_hybrid', 'op_gated_delta_rule_varlen', 'op_gla',
    'op_gsa', 'op_rwkv6', 'op_rwkv7',
)
CHECKPOINTS = ('hf_untied_bf16',)
# By kind of file: the beginnings of names of arrays that tests do not read,
# what official layers do in training mode and what lies inside a model.
UNREAD = {
    'layer': ('train/', 'grad_train/', 'out_train', 'eval/', 'router_logits',
              'routing_weights', 'selected_memories'),
    'decode': ('router_logits',),
    'model': ('train/', 'hidden_states/', 'router_logits/'),
    'op': (),
}


def arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of a file that tests read."""
  unread = UNREAD[path.stem.partition('_')[0]]
  with np.load(path, allow_pickle=False) as file:
    return {k: file[k] for k in file.files if not k.startswith(unread)}


def main(whole: pathlib.Path) -> None:
  for name in FILES:
    path = whole / f'{name}.npz'
    np.savez_compressed(HERE / path.name, **arrays(path))
  for name in CHECKPOINTS:
    (HERE / name).mkdir(exist_ok=True)
    for path in (whole / name).iterdir():
      shutil.copyfile(path, HERE / name / path.name)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
