"""transformers' T5 layout without transformers."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import T5, T5Config
from minivlm.pretrained import comparable, t5
from minivlm.processor import Processor, ProcessorConfig

FIRST = T5Config(vocab_size=30, width=16, depth=2, heads=2, scale_head=True, end_tokens=(1,))
FLAN = replace(
    FIRST, decoder_depth=1, head_width=6, mlp_width=24, activation="gelu_tanh", gated_mlp=True, tie_head=False,
    scale_head=False, context=64,
)  # fmt: skip


def logits(model):
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens, labels=tokens[:, :5]).logits


@pytest.mark.parametrize(
    "config",
    [
        FIRST,
        FLAN,
        replace(FIRST, scale_head=False, activation="silu", decoder_depth=2),
        replace(FLAN, scale_head=True, activation="gelu", start_token=4, pad_token=3, end_tokens=(1, 2)),
        replace(FLAN, activation="gelu_tanh", gated_mlp=False, norm_eps=1e-5, relative_buckets=8, relative_distance=9),
    ],
)
@pytest.mark.parametrize("layout", ["minivlm", "hf"])
def test_there_and_back(config, layout, tmp_path):
    model = T5(config).eval()
    save(tmp_path, model, layout=layout)
    back, _ = load(tmp_path)
    assert comparable(back.config) == comparable(config)
    assert torch.equal(logits(back), logits(model))


def test_the_published_names(tmp_path):
    save(tmp_path, T5(FLAN), layout="hf")
    stored = {name.removesuffix(".weight") for name in load_file(tmp_path / "model.safetensors")}
    assert {name for name in stored if ".block." not in name} == {
        *("shared", "lm_head", "encoder.final_layer_norm", "decoder.final_layer_norm")
    }
    attention = ["layer.0.layer_norm", *(f"layer.0.SelfAttention.{n}" for n in "qkvo")]
    cross = ["layer.1.layer_norm", *(f"layer.1.EncDecAttention.{n}" for n in "qkvo")]
    mlp = [["layer_norm", *(f"DenseReluDense.{n}" for n in ("wi_0", "wi_1", "wo"))]] * 2
    first = ["layer.0.SelfAttention.relative_attention_bias"]
    expected = {
        "encoder.block.0.": [*attention, *(f"layer.1.{n}" for n in mlp[0]), *first],
        "encoder.block.1.": [*attention, *(f"layer.1.{n}" for n in mlp[0])],
        "decoder.block.0.": [*attention, *cross, *(f"layer.2.{n}" for n in mlp[1]), *first],
    }
    assert {name for name in stored if ".block." in name} == {p + n for p, names in expected.items() for n in names}
    save(tmp_path / "first", T5(FIRST), layout="hf")
    stored = load_file(tmp_path / "first/model.safetensors")
    assert "lm_head.weight" not in stored and stored["decoder.block.1.layer.2.DenseReluDense.wi.weight"].shape == (
        64,
        16,
    )


def test_a_head_of_its_own_goes_before_a_config_that_ties_it(tmp_path):
    """As transformers 5 writes Flan-T5: tied in its config, untied in its file, and a word about the scale."""
    model = T5(FLAN).eval()
    save(tmp_path, model, layout="hf")
    path = tmp_path / "config.json"
    values = {**json.loads(path.read_text()), "tie_word_embeddings": True, "scale_decoder_outputs": False}
    path.write_text(json.dumps(values))
    back, _ = load(tmp_path)
    assert not back.config.tie_head and not back.config.scale_head
    assert torch.equal(logits(back), logits(model))


def test_without_a_head_in_the_file_it_is_the_embedding(tmp_path):
    model = T5(FLAN).eval()
    save(tmp_path, model, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    back, _ = load(tmp_path)
    assert torch.equal(back.head.weight, model.token_embedding.weight)


def test_a_missing_tensor_is_named(tmp_path):
    save(tmp_path, T5(FIRST), layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    del stored["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"1 missing \(decoder.block.0.layer.0.SelfAttention.relative_attention_bias"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "activation", "gated"),
    [
        ({}, "relu", False),
        ({"feed_forward_proj": "gated-gelu"}, "gelu_tanh", True),
        ({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}, "gelu", True),
        ({"feed_forward_proj": "gated-silu"}, "silu", True),
        ({"feed_forward_proj": "gelu"}, "gelu", False),
    ],
)
def test_what_feed_forward_proj_means(values, activation, gated):
    config = t5.read_config(values)
    assert (config.activation, config.gated_mlp) == (activation, gated)


def test_an_unknown_activation_is_named():
    with pytest.raises(UserError, match="the activation 'snake'"):
        t5.read_config({"feed_forward_proj": "gated-snake"})


def test_the_defaults_are_t5_small():
    config = t5.read_config({"model_type": "t5"})
    small = T5Config(
        vocab_size=32128, width=512, depth=6, heads=8, head_width=64, mlp_width=2048, scale_head=True, end_tokens=(1,)
    )
    assert comparable(config) == comparable(small)


def test_texts_end_and_do_not_begin_with_a_token_and_the_tokeniser_comes_back(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [(letter, -3.0) for letter in "▁abcdefghijklmnopqrstuvwxy"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("▁cat", -2.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    save(tmp_path, T5(replace(FIRST, vocab_size=30)), Processor(tokenizer, ProcessorConfig(context=512)), layout="hf")
    _, processor = load(tmp_path)
    tokens, mask = processor.text(["a cat", "cat"])
    assert tokens.tolist() == [[3, 4, 29, 1], [29, 1, 0, 0]] and mask.sum(dim=1).tolist() == [4, 2]
    assert processor.decode(tokens) == ["a cat", "cat"] and (processor.start_token, processor.end_token) == (None, 1)
    assert processor.context == 512
