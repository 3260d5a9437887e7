"""VisualBERT against transformers, in both directions."""

import pytest
import torch

import minivlm
from minivlm.empty_model import empty_model
from minivlm.models.visualbert import VisualBERT
from minivlm.pretrained import names, visualbert

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
    "visual_embedding_dim": 12,
}


def reference(name="VisualBertForQuestionAnswering", **more):
    model = getattr(transformers, name)(transformers.VisualBertConfig(**SIZES, num_labels=5, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def inputs():
    tokens, features = torch.randint(60, (3, 9)), torch.randn(3, 5, 12)
    mask, region_mask = torch.arange(9) < torch.tensor([[9], [5], [7]]), torch.arange(5) < torch.tensor([[2], [5], [4]])
    theirs = dict(
        input_ids=tokens,
        attention_mask=mask.long(),
        visual_embeds=features,
        visual_attention_mask=region_mask.long(),
        visual_token_type_ids=torch.ones(3, 5, dtype=torch.long),
    )
    return tokens, mask, features, region_mask, theirs


def compare(ours, theirs, close):
    tokens, mask, features, region_mask, given = inputs()
    with torch.no_grad():
        out = ours(features, tokens, mask, region_mask=region_mask)
        close(out.logits["answers"], theirs(**given).logits)
        hidden = theirs.visual_bert(**given).last_hidden_state
        close(out.text[mask], hidden[:, :9][mask])
        close(out.regions[region_mask], hidden[:, 9:][region_mask])
        answers = torch.rand(3, 5)
        loss = ours.losses(features, tokens, mask, region_mask=region_mask, answers=answers)["answers"]
        close(loss, theirs(**given, labels=answers).loss)


@pytest.mark.parametrize("more", [{}, {"hidden_act": "relu", "layer_norm_eps": 1e-3, "type_vocab_size": 3}], ids=str)
def test_saved_by_transformers_loaded_by_us(more, tmp_path, close):
    theirs = reference(**more)
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    assert isinstance(ours, VisualBERT) and len(ours.config.answers) == 5
    compare(ours, theirs, close)


def test_saved_by_us_loaded_by_transformers(tmp_path, close):
    reference().save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.VisualBertForQuestionAnswering.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(ours.config.answers))
    compare(ours, theirs.eval(), close)


def compare_heads(ours, theirs, close):
    """What is told of words, and whether they match: their first column says yes, ours the second."""
    tokens, mask, features, region_mask, given = inputs()
    with torch.no_grad():
        out = ours(features, tokens, mask, region_mask=region_mask)
        expected = theirs(**given)
        close(out.logits["words"][mask], expected.prediction_logits[:, :9][mask])
        close(out.logits["matching"].flip(1), expected.seq_relationship_logits)
        close(ours.match(features, tokens, mask, region_mask=region_mask), out.logits["matching"])
        labels = torch.full((3, 14), -100)
        labels[:, 2], labels[0, 4] = 7, 8
        told = torch.tensor([True, False, True])
        losses = ours.losses(features, tokens, mask, region_mask=region_mask, labels=labels[:, :9], matches=told)
        total = theirs(**given, labels=labels, sentence_image_labels=(~told).long()).loss
        close(losses["words"] + losses["matching"], total)


def test_the_heads_of_pre_training_there_and_back(tmp_path, close):
    theirs = reference("VisualBertForPreTraining")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    compare_heads(ours, theirs, close)
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    back, info = transformers.VisualBertForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    compare_heads(ours, back.eval(), close)


def test_without_answers_what_is_read_is_the_encoder(tmp_path, close):
    theirs = reference("VisualBertModel")
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    tokens, mask, features, region_mask, given = inputs()
    with torch.no_grad():
        out = ours(features, tokens, mask, region_mask=region_mask)
        close(out.pooled, theirs(**given).pooler_output)
    assert not out.logits


def test_visualbert_vqa_name_by_name():
    """The published size, without weights: 113,856,825 parameters (its file has 455,427,300 bytes)."""
    values = {
        "architectures": ["VisualBertForQuestionAnswering"],
        "visual_embedding_dim": 2048,
        "id2label": {str(i): f"answer {i}" for i in range(3129)},
    }
    config = visualbert.read_config(values)
    with torch.device("meta"):
        theirs = transformers.VisualBertForQuestionAnswering(
            transformers.VisualBertConfig(visual_embedding_dim=2048, num_labels=3129)
        )
    ours = empty_model(VisualBERT, config)
    names.to_ours(theirs.state_dict(), ours.state_dict(keep_vars=True), visualbert.rows, "visualbert-vqa")
    assert sum(p.numel() for p in ours.parameters()) == 113_856_825
    assert config.answers[10] == "answer 10"
