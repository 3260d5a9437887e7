"""Directories of VisualBERT: what is in them, and what they are refused for."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import minivlm
from minivlm.errors import UserError
from minivlm.layers import BERTConfig
from minivlm.models.visualbert import VisualBERT, VisualBERTConfig
from minivlm.pretrained import names, visualbert
from minivlm.testing import assert_same

CONFIG = VisualBERTConfig(
    text=BERTConfig(vocab_size=30, context=12, width=16, depth=1, heads=2, mlp_width=64),
    region_width=8,
    answers=("yes", "no"),
)
TOKENS = torch.tensor([[1, 5, 6, 2]])


def published(directory, **changes):
    """As uclanlp/visualbert-vqa: a pickle, no tokeniser, and the wrong padding token in its config."""
    model = VisualBERT(CONFIG).eval()
    values = visualbert.write_config(CONFIG) | {"pad_token_id": 1} | changes
    (directory / "config.json").write_text(json.dumps(values))
    tensors = names.to_theirs(model.state_dict(), visualbert.rows)
    position_ids = {"visual_bert.embeddings.position_ids": torch.arange(12)[None]}
    torch.save(tensors | position_ids, directory / "pytorch_model.bin")
    return model


def test_a_pickle_without_a_tokeniser_is_read(tmp_path):
    model, features = published(tmp_path), torch.randn(1, 4, 8)
    back, processor = minivlm.load(tmp_path)
    assert back.config == CONFIG
    assert_same(back.answer(features, TOKENS), model.answer(features, TOKENS), tolerance=0)
    with pytest.raises(UserError, match="no tokeniser beside these weights"):
        processor.text(["is it red?"])


def test_what_cannot_be_followed_is_refused(tmp_path):
    published(tmp_path, bypass_transformer=True)
    with pytest.raises(UserError, match="bypass_transformer = True, which is not supported"):
        minivlm.load(tmp_path)


TELLING = replace(CONFIG, answers=(), heads=("words", "matching"), word_bias=True)


def test_the_heads_of_pre_training_are_read_and_written(tmp_path):
    """Under their names; whether they match stands the other way round there."""
    model, features = VisualBERT(TELLING).eval(), torch.randn(1, 4, 8)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path, layout="hf")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["VisualBertForPreTraining"]
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["cls.seq_relationship.bias"], model.match_head.bias.flip(0))
    assert torch.equal(stored["cls.predictions.bias"], model.word_bias)
    back, _ = minivlm.load(tmp_path)
    assert back.config == TELLING
    for name, logits in model(features, TOKENS).logits.items():
        assert_same(back(features, TOKENS).logits[name], logits)
    copy = stored["visual_bert.embeddings.word_embeddings.weight"].clone()
    save_file({**stored, "cls.predictions.decoder.weight": copy}, tmp_path / "model.safetensors")
    minivlm.load(tmp_path)
    save_file({**stored, "cls.predictions.decoder.weight": copy + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="but a table of its own"):
        minivlm.load(tmp_path)


def test_a_head_that_is_not_known_is_refused(tmp_path):
    published(tmp_path, architectures=["VisualBertForVisualReasoning"])
    with pytest.raises(UserError, match="asks for a VisualBertForVisualReasoning; of VisualBERT there are"):
        minivlm.load(tmp_path)


@pytest.mark.parametrize("changes", [{"region_positions": True}, {"answer_at": "first"}, {"heads": ("matching",)}])
def test_what_transformers_cannot_express_is_not_written(tmp_path, changes):
    with pytest.raises(UserError, match=f"cannot express {next(iter(changes))}"):
        VisualBERT(replace(CONFIG, **changes)).save_pretrained(tmp_path, layout="hf")
