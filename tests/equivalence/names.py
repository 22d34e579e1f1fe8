"""What has another name than in the code of tag `base`: old -> new.

Unchanged names need no line. README.md says what each table is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Settings, by dotted key: 'train.accumulate': 'train.grad_accum_steps'.
SETTINGS: dict[str, str] = {
    'train.accumulate': 'train.grad_accum_steps',
    'train.max_bad_steps': 'train.max_nonfinite_steps',
    'mesh.slice': 'mesh.dcn_data',
    'model.mixer.writes': 'model.mixer.num_householder',
    'mesh.expert_slice': 'mesh.dcn_expert',
    'mesh.memory_expert': 'mesh.expert',
    'model.untied': 'model.modality_specific',
    'model.depth.capacity': 'model.mod.capacity',
    'model.depth.router': 'model.mod.router',
    'model.depth.threshold_rate': 'model.mod.threshold_rate',
}
# Settings that the old code does not know; each has its default everywhere.
ADDED: set[str] = set()
# By old key: old value -> new value, such as that of a renamed choice.
VALUES: dict[str, Callable[[Any], Any]] = {
    'model.pattern': lambda x: x.replace('depth/', 'mod/'),
    'model.mixer.output_gate': lambda x: {
        'own': 'self_silu', 'silu_first': 'silu_before_norm'}.get(x, x),
}
# Arguments of recipes: 'moma_90m:mod': 'moma_90m:depth'.
RECIPES: dict[str, str] = {}

# (pattern, replacement) for re.sub, in this order, on paths with slashes. A
# replacement None drops the line; say in a comment what holds it instead.
Renames = list[tuple[str, str | None]]

# Parameters: 'units/block_0/mixer/query/kernel', in states and gradients too.
PARAMETERS: Renames = [
    (r'/depth/', '/mod/'),
    (r'/share$', '/tau_offset'),
]
# What else a state holds, beside parameters' own paths: 'counters/bad_row',
# 'optimizer/inner_states/weight/inner_state/0/mu/' before a parameter.
STATE: Renames = [
    (r'^counters/bad_row$', 'counters/consecutive_nonfinite'),
    (r'^counters/bad_total$', 'counters/total_nonfinite'),
]
# What a step returns: 'routing/block_0/mixer/load_RE', 'objective'.
METRICS: Renames = [
    (r'/depth(/|$)', r'/mod\1'),
    (r'^objective$', 'total_loss'),
    (r'^balance$', 'balance_loss'),
    (r'^bad_row$', 'consecutive_nonfinite'),
    (r'^bad_total$', 'total_nonfinite'),
    (r'^(routing|agreement)/block_(\d+)/', r'\1/\2/'),
    (r'^(routing/.*)/(load|taken)_R', r'\1/\2_'),
    (r'^(routing/.*/entropy)_R$', r'\1'),
]
