"""MoM over each memory rule, at the size of configs/mom_380m.py.

The model, data and training of mom_380m with another rule in its memories, so
that rules compare at equal widths and equal states: four heads of 256 x 256,
but for based and rebased, whose keys of 16 become 153 and 136 features. Short
convolution, norm and gate of the read are those that the rule was published
with; gated_delta_product has two updates per token. `:gated_delta` is mom_380m
itself.

  python -m mom_jax.train --config=configs/rules.py:kda --workdir=runs/kda \\
    --config.data.sources=jsonl:slimpajama.jsonl \\
    --config.data.tokenizer.text=tokenizer.json

One memory without a router is the plain layer: --config.model.mixer.top_k=1
--config.model.mixer.num_memories=1 --config.model.mixer.shared=False.

Source: of each rule in mom_jax/rules/; of the rest in mom_380m.

Expected: for gated_delta see mom_380m; the others have no published numbers as
memories of a mixture, and none of ours yet.

Time: as mom_380m.
"""

import pathlib

from mom_jax import config, rules

PUBLISHED = {
    'linear': dict(
        conv_width=0, feature_map='hadamard', output_gate='none'),
    'based': dict(
        conv_width=0, key_dim=16, output_norm='none', output_gate='none'),
    'rebased': dict(
        conv_width=0, key_dim=16, output_norm='none', output_gate='none'),
    'retention': dict(conv_width=0),
    'lightning': dict(conv_width=0, output_norm='all', output_gate='sigmoid'),
    'mamba2': dict(
        key_heads=1, conv_bias=True, output_norm='all',
        output_gate='silu_before_norm'),
    'gla': dict(conv_width=0),
    'hgrn2': dict(conv_width=0, output_norm='all', output_gate='none'),
    'gsa': dict(conv_width=0, output_norm='all', output_gate='self_silu'),
    'delta': dict(output_gate='none'),
    'gated_delta_product': dict(num_householder=2),
    'kda': dict(output_gate='sigmoid', gate_rank=256),
    'gated_delta_2': dict(output_gate='sigmoid', gate_rank=256),
    'rwkv6': dict(conv_width=0, output_norm='group', norm_eps=64e-5),
    'rwkv7': dict(
        conv_width=0, output_norm='group', norm_eps=64e-5,
        output_gate='inner_sigmoid', gate_rank=160),
    'ttt_linear': dict(output_norm='group'),
}


def get_config(rule='gated_delta'):
  if rule not in rules.RULES:
    raise config.UserError(
        f'rule {rule!r} is unknown; known: {", ".join(sorted(rules.RULES))}.'
    )
  base = pathlib.Path(__file__).with_name('mom_380m.py')
  c = config.to_config_dict(config.load(str(base), ()))
  c.model.mixer.rule = rule
  c.model.mixer.update(PUBLISHED.get(rule, {}))
  return c
