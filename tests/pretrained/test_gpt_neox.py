"""transformers' GPT-NeoX layout without transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import LanguageModel
from minivlm.pretrained import comparable, gpt_neox
from tests.languages import NEOX, REDPAJAMA


def model(config=NEOX):
    model = LanguageModel(config).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("config", [NEOX, REDPAJAMA, replace(NEOX, qkv_bias=False, out_bias=False, norm_eps=1e-3)])
def test_there_and_back(config, tmp_path):
    ours = model(config)
    save(tmp_path, ours, layout="hf")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt_neox"
    back, _ = load(tmp_path)
    assert comparable(back.config) == comparable(config)
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in ours.state_dict().items())


def test_q_k_and_v_are_woven_head_by_head(tmp_path):
    ours = model()
    save(tmp_path, ours, layout="hf")
    fused = load_file(tmp_path / "model.safetensors")["gpt_neox.layers.1.attention.query_key_value.weight"]
    attention = ours.transformer.blocks[1].attention
    K = attention.head_width
    assert torch.equal(fused[:K], attention.q_proj.weight[:K])
    assert torch.equal(fused[K : 2 * K], attention.k_proj.weight[:K])
    assert torch.equal(fused[3 * K : 4 * K], attention.q_proj.weight[K : 2 * K])
    assert torch.equal(fused[5 * K : 6 * K], attention.v_proj.weight[K : 2 * K])


def test_masks_and_angles_of_old_files_are_no_weights(tmp_path):
    ours = model()
    save(tmp_path, ours, layout="hf")
    path = tmp_path / "model.safetensors"
    extra = {"bias": torch.ones(1, 1, 4, 4), "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(1)}
    extra = {f"gpt_neox.layers.0.attention.{name}": t for name, t in extra.items()}
    save_file({**load_file(path), **extra}, path)
    back, _ = load(tmp_path)
    assert torch.equal(back.head.weight, ours.head.weight)


def test_odd_fractions_are_refused():
    with pytest.raises((UserError, ValueError), match="are no pairs"):
        gpt_neox.read_config({"hidden_size": 24, "num_attention_heads": 2, "rotary_pct": 0.25})
