"""Settings of the MoM layer that its laws are tested over."""

from mom_jax import rules

VARIANTS = {
    'no_shared': dict(shared=False),
    'single_kv': dict(single_kv_proj=True),
    'one_choice': dict(top_k=1),
    'all': dict(num_memories=3, top_k=3),
    'many': dict(num_memories=16),
    'plain': dict(num_memories=1, top_k=1, shared=False),
    'no_gate': dict(output_gate='none'),
    'sigmoid_gate': dict(output_gate='sigmoid', gate_rank=4),
    'gate_first': dict(output_gate='silu_before_norm', output_norm='all'),
    'group_norm': dict(output_norm='group', rule='linear', conv_width=0),
    'features': dict(rule='linear', feature_map='hedgehog', normaliser=True),
    'decayed_features': dict(
        rule='decay', feature_map='elu', normaliser=True),
    'raw': dict(router='softmax_topk_raw', top_k=1),
    'sigmoid': dict(router='sigmoid_topk'),
    'biased': dict(router='softmax_topk_bias'),
    'token_choice': dict(router='token_choice'),
    'plain_shift': dict(
        rule='rwkv7', num_memories=1, top_k=1, shared=False, conv_width=0,
        output_gate='inner_sigmoid', gate_rank=4),
    'wide_values': dict(value_dim=16),
    'one_key': dict(rule='mamba2', key_heads=1, conv_bias=True),
    'low_ranks': dict(rule='kda', low_ranks=(3,)),
    'one_tap': dict(conv_width=1),
    'no_conv': dict(conv_width=0),
    'two_writes': dict(rule='gated_delta_product', num_householder=2),
    'single_kv_low_rank': dict(rule='kda', single_kv_proj=True),
}
ALL = [dict(rule=r) for r in sorted(rules.RULES)] + list(VARIANTS.values())
IDS = sorted(rules.RULES) + list(VARIANTS)
