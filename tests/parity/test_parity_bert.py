"""BERT against transformers, in both directions."""

import pytest
import torch

import minivlm
from minivlm import BERT
from minivlm.empty_model import empty_model
from minivlm.pretrained import bert, comparable, names

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
CLASSES = ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertForSequenceClassification"]


def compare(ours, theirs, close):
    tokens = torch.randint(60, (3, 9))
    mask = torch.arange(9) < torch.tensor([[9], [5], [7]])
    types = (torch.arange(9) > 3).long().expand(3, -1)
    theirs = getattr(theirs, "bert", theirs)
    for more in ({}, {"token_type_ids": types}):
        with torch.no_grad():
            expected = theirs(tokens, attention_mask=mask, **more).last_hidden_state
            close(ours(tokens, mask, *more.values()).hidden[mask], expected[mask])


def reference(name, **more):
    model = getattr(transformers, name)(transformers.BertConfig(**SIZES, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("more", [{}, {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 3}], ids=str)
def test_saved_by_transformers_loaded_by_us(name, more, tmp_path, close):
    theirs = reference(name, **more)
    theirs.save_pretrained(tmp_path)
    compare(minivlm.load(tmp_path)[0], theirs, close)


def test_saved_by_us_loaded_by_transformers(tmp_path, close):
    reference("BertForMaskedLM").save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.BertModel.from_pretrained(
        tmp_path / "ours", add_pooling_layer=False, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    compare(ours, theirs.eval(), close)


def test_gamma_and_beta(tmp_path, close):
    """The files of 2018, with the prefix and the heads of pre-training."""
    theirs = reference("BertForPreTraining")
    theirs.config.save_pretrained(tmp_path)
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): p
        for n, p in theirs.state_dict().items()
    }
    assert any("gamma" in name for name in old)
    torch.save(old, tmp_path / "pytorch_model.bin")
    config = tmp_path / "config.json"
    config.write_text(
        config.read_text().replace(
            '"transformers_version"', '"architectures": ["BertForPreTraining"], "transformers_version"'
        )
    )
    compare(minivlm.load(tmp_path)[0], theirs, close)


def test_bert_base_name_by_name():
    with torch.device("meta"):
        theirs = transformers.BertForPreTraining(transformers.BertConfig())
    ours = empty_model(BERT, bert.read_config({}))
    assert comparable(bert.read_config({})) == comparable(bert.read_config(transformers.BertConfig().to_dict()))
    names.to_ours(theirs.state_dict(), ours.state_dict(keep_vars=True), bert.rows, "base")
    pooler = 768 * 768 + 768
    assert sum(p.numel() for p in ours.parameters()) + pooler == 109_482_240
