"""Small language models in the ways of the published families, for tests of the brick and of its fast twin."""

from dataclasses import replace

from minivlm.layers import LanguageModelConfig

GPT2 = LanguageModelConfig(width=16, depth=2, heads=4, vocab_size=30, context=40, activation="gelu_tanh")
OPT = replace(GPT2, activation="relu", position_offset=2)
OPT_350M = replace(GPT2, norm_place="post", final_norm=False, embedding_width=6, position_offset=2)
LLAMA = replace(
    GPT2,
    kv_heads=2,
    positions="none",
    rope_theta=100.0,
    norm="rmsnorm",
    activation="silu",
    gated_mlp=True,
    mlp_width=24,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)
QWEN2 = replace(LLAMA, qkv_bias=True)
NEOX = replace(GPT2, positions="none", rope_theta=100.0, rotary_fraction=0.5, parallel_residual=True, tie_head=False)
REDPAJAMA = replace(NEOX, rotary_fraction=1.0, parallel_residual=False)
