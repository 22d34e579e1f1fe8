"""MoM over each memory rule, at the size of configs/mom_380m.py.

The model, data and training of mom_380m with another rule in its memories, so
that rules compare at equal widths and equal states: four heads of 256 x 256.
Rules that were published without a short convolution have none here;
gated_delta_product writes twice a token. `:gated_delta` is mom_380m itself.

  python -m mom_jax.train --config=configs/rules.py:kda --workdir=runs/kda \\
    --config.data.sources=jsonl:slimpajama.jsonl \\
    --config.data.tokenizer.text=tokenizer.json

One memory without a router is the plain layer: --config.model.mixer.top_k=1
--config.model.mixer.num_memories=1 --config.model.mixer.shared=False.

Source: of each rule in mom_jax/rules.py; of the rest in mom_380m.

Expected: for gated_delta see mom_380m; the others have no published numbers as
memories of a mixture, and none of ours yet.

Time: as mom_380m.
"""

import pathlib

from mom_jax import config, rules

WITHOUT_CONVOLUTION = ('linear', 'retention', 'gla', 'hgrn2')


def get_config(rule='gated_delta'):
  if rule not in rules.RULES:
    raise config.UserError(
        f'rule {rule!r} is unknown; known: {", ".join(sorted(rules.RULES))}.'
    )
  base = pathlib.Path(__file__).with_name('mom_380m.py')
  c = config.to_config_dict(config.load(str(base), ()))
  c.model.mixer.rule = rule
  if rule in WITHOUT_CONVOLUTION:
    c.model.mixer.conv_width = 0
  if rule == 'gated_delta_product':
    c.model.mixer.writes = 2
  return c
