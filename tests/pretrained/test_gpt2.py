"""transformers' GPT-2 layout without transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import LanguageModel, LanguageModelConfig
from minivlm.pretrained import comparable, gpt2
from minivlm.processor import Processor

CONFIG = LanguageModelConfig(width=16, depth=2, heads=2, vocab_size=300, context=12, end_tokens=(3,), pad_token=3)


def logits(model):
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def model():
    """Biases and norms are not what they are born as, so that a lost one would be seen."""
    model = LanguageModel(CONFIG).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu_tanh", "mlp_width": 24, "norm_eps": 1e-6, "dropout": 0.1, "pad_token": 0},
        {"tie_head": False, "activation": "quick_gelu", "end_tokens": (3, 5)},
        {"end_tokens": (), "head_width": 8, "kv_heads": 2},
    ],
)
def test_there_and_back(changes, tmp_path):
    config = replace(CONFIG, **changes)
    ours = LanguageModel(config).eval()
    processor = Processor.train(["a red disc"], vocab_size=300, image_size=16, context=12)
    save(tmp_path, ours, processor, layout="hf")
    back, back_processor = load(tmp_path)
    assert comparable(back.config) == comparable(config)
    assert torch.equal(logits(back), logits(ours))
    assert back_processor.text(["a disc"])[0].tolist() == processor.text(["a disc"])[0].tolist()
    assert (back_processor.pad_token, back_processor.context) == (0, 12)
    assert not (tmp_path / "preprocessor_config.json").exists()


def test_linear_layers_are_stored_in_out_and_q_k_v_in_one_piece(tmp_path):
    ours = model()
    save(tmp_path, ours, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    modules = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert set(stored) == {
        *("transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
        *(f"transformer.h.{i}.{m}.{kind}" for i in (0, 1) for m in modules for kind in ("weight", "bias")),
    }
    a = ours.transformer.blocks[1].attention
    x = torch.randn(3, 16)
    fused = x @ stored["transformer.h.1.attn.c_attn.weight"] + stored["transformer.h.1.attn.c_attn.bias"]
    torch.testing.assert_close(fused, torch.cat([a.q_proj(x), a.k_proj(x), a.v_proj(x)], dim=-1))
    up = ours.transformer.blocks[1].mlp.up_proj
    assert torch.equal(stored["transformer.h.1.mlp.c_fc.weight"], up.weight.T)
    assert torch.equal(stored["transformer.h.1.mlp.c_fc.bias"], up.bias)


def rewrite(directory, change):
    path = directory / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path)


def test_the_published_file_has_bare_names_and_masks(tmp_path):
    ours = model()
    save(tmp_path, ours, layout="hf")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril() for i in range(2)}
    rewrite(tmp_path, lambda t: {k.removeprefix("transformer."): v for k, v in t.items()} | masks)
    assert torch.equal(logits(load(tmp_path)[0]), logits(ours))


def test_old_files_have_masks_and_the_embedding_again_as_head(tmp_path):
    ours = model()
    save(tmp_path, ours, layout="hf")
    masks = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(2) for name in ("bias", "masked_bias")}
    rewrite(tmp_path, lambda t: {**t, **masks, "lm_head.weight": t["transformer.wte.weight"].clone()})
    back, _ = load(tmp_path)
    assert torch.equal(logits(back), logits(ours))
    assert back.config.tie_head and back.head.weight is back.token_embedding.weight


def test_another_head_in_the_file_is_the_head(tmp_path):
    ours = model()
    save(tmp_path, ours, layout="hf")
    head = torch.randn(300, 16)
    rewrite(tmp_path, lambda t: {**t, "lm_head.weight": head})
    back, _ = load(tmp_path)
    assert not back.config.tie_head and torch.equal(back.head.weight, head)
    assert torch.equal(back.token_embedding.weight, ours.token_embedding.weight)


def test_weights_are_views_of_the_file_and_can_be_trained(tmp_path):
    save(tmp_path, model(), layout="hf")
    before = (tmp_path / "model.safetensors").read_bytes()
    back, _ = load(tmp_path)
    memory = [p.untyped_storage().data_ptr() for block in back.transformer.blocks for p in block.attention.parameters()]
    assert len(set(memory)) < len(memory)  # q, k and v are three views of one tensor
    optimiser = torch.optim.AdamW(back.parameters(), lr=0.01, fused=True)
    tokens = torch.randint(300, (4, 12))
    losses = []
    for _ in range(5):
        loss = back.train()(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.95 * losses[0]
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm'"),
        ({"gated_mlp": True}, "gated_mlp = True"),
        ({"final_norm": False}, "final_norm = False"),
        ({"qkv_bias": False}, "qkv_bias = False"),
        ({"norm_place": "post", "kv_heads": 1}, "kv_heads = 1, norm_place = 'post'"),
        ({"positions": "none"}, "positions = 'none'"),
        ({"embedding_width": 8}, "embedding_width = 8"),
    ],
)
def test_what_transformers_cannot_express_is_named(changes, named, tmp_path):
    with pytest.raises(UserError) as error:
        save(tmp_path, LanguageModel(replace(CONFIG, **changes)), layout="hf")
    assert f"transformers' GPT2LMHeadModel cannot express {named}; save" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True, which is not supported"),
        ({"scale_attn_weights": False}, "scale_attn_weights = False"),
        ({"add_cross_attention": True}, "add_cross_attention = True"),
        ({"activation_function": "tanh"}, "activation 'tanh'"),
        ({"n_head": 7}, "no model that can be built"),
        ({"n_embd": "768"}, "width is '768', but must be int"),
        ({"eos_token_id": "</s>"}, r"end_tokens\[0\] is '</s>', but must be int"),
    ],
)
def test_configs_that_cannot_be_followed(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **values}))
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_the_smallest():
    c = gpt2.read_config({"model_type": "gpt2"})
    assert (c.width, c.depth, c.heads, c.hidden_width, c.vocab_size, c.context) == (768, 12, 12, 3072, 50257, 1024)
    assert (c.activation, c.norm_eps, c.tie_head, c.end_tokens, c.pad_token) == (
        "gelu_tanh",
        1e-5,
        True,
        (50256,),
        50256,
    )


def test_a_tokeniser_larger_than_the_embedding(tmp_path):
    processor = Processor.train(["a red disc"], vocab_size=300, image_size=16, context=12)
    size = processor.vocab_size
    for vocab_size in (size, size - 1):
        save(tmp_path, LanguageModel(replace(CONFIG, vocab_size=vocab_size)), processor, layout="hf")
        if vocab_size == size:
            load(tmp_path)
    with pytest.raises(UserError, match=rf"is token {size - 1}, but vocab_size in config\.json is {size - 1}, so"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{}", "[]", "no JSON", '{"model": {"vocab": {"a": 0}}}'])
def test_a_broken_tokeniser(content, tmp_path):
    save(tmp_path, model(), layout="hf")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokeniser"):
        load(tmp_path)
