"""A config.json of each published layout, and parameters for it."""

import jax
import numpy as np

from mom_jax import models

D, LAYERS, WORDS, T = 16, 3, 40, 21

COMMON = dict(
    hidden_size=D, num_hidden_layers=LAYERS, vocab_size=WORDS, norm_eps=1e-6,
    tie_word_embeddings=False, intermediate_size=24, hidden_act='swish',
)
# A config.json of each layout, as its authors' code writes it, and the tensors
# of a mixer.
PUBLISHED = {
    'gated_deltanet': (
        dict(num_heads=2, head_dim=6, expand_v=2.0, use_gate=True,
             use_short_conv=True, conv_size=4, num_v_heads=None,
             allow_neg_eigval=False),
        'q_proj k_proj v_proj a_proj b_proj g_proj o_proj q_conv1d k_conv1d'
        ' v_conv1d o_norm A_log dt_bias'),
    'delta_net': (
        dict(num_heads=2, expand_k=0.75, expand_v=1.0, use_gate=False,
             use_short_conv=True, conv_size=4, qk_norm='l2',
             qk_activation='silu', use_beta=True, use_output_norm=True),
        'q_proj k_proj v_proj b_proj o_proj q_conv1d k_conv1d v_conv1d'
        ' o_norm'),
    'gla': (
        dict(num_heads=2, expand_k=0.5, expand_v=1.0, use_short_conv=False,
             use_output_gate=True, feature_map=None, num_kv_heads=None,
             clamp_min=None, fuse_norm=True),
        'q_proj k_proj v_proj g_proj o_proj gk_proj.0 gk_proj.1'
        ' gk_proj.1.bias g_norm_swish_gate'),
    'hgrn2': (
        dict(num_heads=2, expand_ratio=8, use_short_conv=False,
             use_lower_bound=True),
        'q_proj f_proj i_proj o_proj g_norm'),
    'gsa': (
        dict(num_heads=2, exapnd_k=1, exapnd_v=1, num_slots=64,
             feature_map='swish', use_output_gate=False, use_norm=True,
             use_short_conv=False, num_kv_heads=None, gate_logit_normalizer=8),
        'q_proj k_proj v_proj f_proj o_proj g_norm'),
    'retnet': (
        dict(num_heads=2, expand_k=1.0, expand_v=2.0, use_output_gate=True,
             feature_map=None, fuse_norm=True),
        'q_proj k_proj v_proj g_proj o_proj g_norm_swish_gate'),
    'linear_attn': (
        dict(num_heads=2, expand_k=1.0, expand_v=1.0, norm_feature_map=False,
             feature_map='elementwise_product', tie_feature_map_qk=False),
        'q_proj k_proj v_proj o_proj norm feature_map_q.layer1'
        ' feature_map_q.layer2 feature_map_k.layer1 feature_map_k.layer2'
        ' feature_map_q.layer1.bias feature_map_q.layer2.bias'
        ' feature_map_k.layer1.bias feature_map_k.layer2.bias'),
    'rwkv7': (
        dict(hidden_act='sqrelu', head_dim=8, num_heads=2,
             decay_low_rank_dim=5, a_low_rank_dim=6, v_low_rank_dim=3,
             gate_low_rank_dim=4, norm_first=True, norm_bias=True,
             value_dim=[16, 16, 16], fuse_norm=True, attn=None),
        'r_proj k_proj v_proj o_proj x_r x_k x_v x_w x_a x_g k_k k_a r_k'
        ' g_norm g_norm.bias w_lora.lora.0 w_lora.lora.2 w_lora.lora.2.bias'
        ' a_lora.lora.0 a_lora.lora.2 a_lora.lora.2.bias v_lora.lora.0'
        ' v_lora.lora.2 v_lora.lora.2.bias g_lora.lora.0 g_lora.lora.2'),
    'mamba2': (
        dict(hidden_act='silu', head_dim=8, state_size=6, expand=1.5,
             conv_kernel=4, n_groups=1, use_bias=False, use_conv_bias=True,
             D_has_hdim=False, rmsnorm=True, norm_before_gate=False,
             dt_limit=[0.0, float('inf')], residual_in_fp32=True),
        'in_proj conv1d conv1d.bias A_log D dt_bias norm out_proj'),
    'transformer': (
        dict(num_heads=2, num_kv_heads=1, qkv_bias=False, qk_norm=False,
             window_size=None, rope_theta=10000.0),
        'q_proj k_proj v_proj o_proj'),
}


def config_of(kind, **more):
  return dict(COMMON, model_type=kind, **PUBLISHED[kind][0]) | more


def random(cfg, seed=0):
  """Parameters of the model, all of them random."""
  shapes = jax.eval_shape(
      lambda: models.lm.init_params(cfg, jax.random.key(0)))
  shapes = jax.tree.map(
      lambda x: x.value, shapes, is_leaf=lambda x: hasattr(x, 'names'))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
      lambda x: 0.5 * rng.normal(size=x.shape).astype(np.float32), shapes)
