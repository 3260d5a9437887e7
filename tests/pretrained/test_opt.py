"""transformers' OPT layout without transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import LanguageModel, LanguageModelConfig
from minivlm.pretrained import comparable, opt

CONFIG = LanguageModelConfig(
    width=16,
    depth=2,
    heads=2,
    mlp_width=24,
    activation="relu",
    vocab_size=30,
    context=12,
    position_offset=2,
    end_tokens=(2,),
    pad_token=1,
)
POST_NORM = replace(CONFIG, embedding_width=8, norm_place="post", final_norm=False)  # opt-350m


def logits(model):
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        POST_NORM,
        replace(CONFIG, final_norm=False),
        replace(CONFIG, qkv_bias=False, out_bias=False, mlp_bias=False, tie_head=False, activation="gelu"),
    ],
)
def test_there_and_back(config, tmp_path):
    model = LanguageModel(config).eval()
    save(tmp_path, model, layout="hf")
    back, processor = load(tmp_path)
    assert comparable(back.config) == comparable(config)
    assert torch.equal(logits(back), logits(model))
    assert processor.source is None and processor.pad_token == 1


@pytest.mark.parametrize("prefix", ["model.decoder.", "decoder."])
def test_names_with_and_without_model(prefix, tmp_path):
    model = LanguageModel(POST_NORM).eval()
    save(tmp_path, model, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name in stored if ".layers." not in name} == {
        f"model.decoder.{name}.weight" for name in ("embed_tokens", "embed_positions", "project_in", "project_out")
    }
    modules = (
        "self_attn_layer_norm",
        "final_layer_norm",
        "fc1",
        "fc2",
        *(f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")),
    )
    assert {name for name in stored if ".layers.1." in name} == {
        f"model.decoder.layers.1.{m}.{kind}" for m in modules for kind in ("weight", "bias")
    }
    assert stored["model.decoder.embed_positions.weight"].shape == (14, 16)
    save_file({prefix + k.removeprefix("model.decoder."): v for k, v in stored.items()}, tmp_path / "model.safetensors")
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


def test_a_last_norm_too_many_is_unexpected(tmp_path):
    save(tmp_path, LanguageModel(CONFIG), layout="hf")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_remove_final_layer_norm": True}))
    with pytest.raises(UserError, match=r"2 unexpected \(model\.decoder\.final_layer_norm\.bias, "):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position_offset": 3}, "position_offset = 3"),
        ({"norm_place": "post"}, "final_norm = True"),
        ({"out_bias": False}, "out_bias = False"),
        ({"norm_eps": 1e-6}, "norm_eps = 1e-06"),
    ],
)
def test_what_transformers_cannot_express_is_named(changes, named, tmp_path):
    with pytest.raises(UserError, match=f"OPTForCausalLM cannot express {named}; save"):
        save(tmp_path, LanguageModel(replace(CONFIG, **changes)), layout="hf")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ({"activation_function": "tanh"}, "activation 'tanh'"),
    ],
)
def test_configs_that_cannot_be_followed(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "opt", **values}))
    with pytest.raises(UserError, match=said):
        load(tmp_path)


def test_defaults_are_those_of_125m():
    c = opt.read_config({"model_type": "opt"})
    assert (c.width, c.depth, c.heads, c.hidden_width, c.vocab_size, c.context) == (768, 12, 12, 3072, 50272, 2048)
    assert (c.activation, c.norm_place, c.final_norm, c.embedding_width) == ("relu", "pre", True, None)
    assert (c.position_offset, c.tie_head, c.end_tokens, c.pad_token) == (2, True, (2,), 1)


def test_vocabulary_and_merges_make_a_tokeniser(tmp_path):
    """The hub has no tokenizer.json for OPT. Texts begin with </s>, and come back to the byte."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "Ġc", "at", "Ġcat"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ c\na t\nĠc at\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    save(tmp_path, LanguageModel(replace(CONFIG, vocab_size=len(vocab))), layout="hf")
    _, processor = load(tmp_path)
    tokens, mask = processor.text(["a cat", "a"])
    assert tokens.tolist() == [[2, vocab["a"], vocab["Ġcat"]], [2, vocab["a"], 1]]
    assert mask.tolist() == [[True] * 3, [True, True, False]]
    texts = [" two  spaces\n", "zürich 你好 😀", "", "it's 12%"]
    assert processor.decode(processor.text(texts)[0]) == texts
