"""What BLIP-2's and BERT's published directories say besides their weights, and what is refused."""

import json

import pytest
import torch

from minivlm import BLIP2Stage1, BLIP2Stage1Config, Processor
from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import QFormerConfig, VisionConfig
from minivlm.pretrained import bert, blip2, blip2_itm, recognise
from minivlm.pretrained.names import is_unread, table, to_ours, to_theirs, under
from minivlm.special_tokens import Markup


def test_one_model_type_two_architectures(tmp_path):
    for architecture, kind in (("ForConditionalGeneration", "blip-2"), ("ForImageTextRetrieval", None)):
        values = {"model_type": "blip-2", "architectures": [f"Blip2{architecture}"]}
        (tmp_path / "config.json").write_text(json.dumps(values))
        assert recognise(tmp_path) == (kind or f"Blip2{architecture}")


def test_generation_settings_go_before_the_language_models():
    config = blip2.read_config({"text_config": {"model_type": "opt", "eos_token_id": 2}, "eos_token_id": 50118})
    assert config.language.end_tokens == (50118,)
    assert config.image_token is None and config.qformer.vocab_size is None


def test_the_last_word_of_stage_1_asks_for_a_text():
    config = blip2_itm.read_config({"qformer_config": {"vocab_size": 30523}})
    assert (config.decode_token, config.start_token, config.end_token) == (30522, 101, 102)
    assert not config.text_head and config.temperature is None


def test_a_placeholder_without_a_row_is_no_obstacle(tmp_path):
    """As blip2-itm-vit-g has it: `<image>` is the first token beyond the table, and no text needs it."""
    words = Processor.train(["a red disc"], vocab_size=300, image_size=16, context=12)
    V = words.vocab_size
    qformer = QFormerConfig(width=16, depth=2, heads=2, queries=3, vocab_size=V, context=12, context_width=16)
    vision = VisionConfig(width=16, depth=1, heads=2, image_size=16, patch_size=8, norm_eps=1e-6, patch_bias=True,
                          embedding_norm=False)  # fmt: skip
    config = BLIP2Stage1Config(vision=vision, qformer=qformer, embed_width=8, temperature=None, text_head=False,
                               start_token=101, end_token=102, decode_token=V - 1)  # fmt: skip
    words.tokenizer.add_special_tokens(["<picture>"])
    save(tmp_path, BLIP2Stage1(config), words, layout="hf")
    model, processor = load(tmp_path)
    images = torch.randn(1, 3, 16, 16)
    assert model.match(images, *processor.text(["a red disc"])).isfinite().all()
    with pytest.raises(UserError, match=f"has token {V}, but the model knows tokens 0 to {V - 1}"):
        model.match(images, *processor.text([["a ", Markup("<picture>"), " disc"]]))


@pytest.mark.parametrize(
    ("read", "values", "message"),
    [
        (blip2, {"text_config": {"model_type": "llama"}}, "a language model of type 'llama'; supported .* opt and t5"),
        (blip2, {"vision_config": {"qkv_bias": False}}, "qkv_bias = False, which is not supported"),
        (blip2, {"qformer_config": {"position_embedding_type": "relative_key"}}, "position_embedding_type"),
        (bert, {"is_decoder": True}, "is_decoder = True, which is not supported"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_what_is_refused(read, values, message):
    with pytest.raises(UserError, match=message):
        read.read_config(values)


def test_axes_of_one_in_front():
    rows = table("class class two\n places places one")
    ours = {"class": torch.randn(4), "places": torch.randn(3, 4)}
    theirs = to_theirs(ours, rows)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == {"class": (1, 1, 4), "places": (1, 3, 4)}
    back = to_ours(theirs, ours, rows, "file")
    assert all(torch.equal(back[name], ours[name]) for name in ours)
    with pytest.raises(UserError, match=r"places is \(3, 4\) instead of \(1, 3, 4\)"):
        to_ours({**theirs, "places": ours["places"]}, ours, rows, "file")


def test_parts_that_are_not_read_are_named_in_the_table():
    rows = under(table("word word\n pooler - unread"), ("bert.", ""), "") + table("cls - unread")
    assert all(is_unread(name, rows) for name in ("cls.a.weight", "cls.bias", "bert.pooler.dense.bias", "pooler"))
    assert not any(is_unread(name, rows) for name in ("clss.a", "word", "bert.poolers.bias"))
    ours = {"word": torch.randn(2)}
    assert to_ours({"word": ours["word"], "cls.bias": torch.ones(1)}, ours, rows, "file").keys() == {"word"}
    with pytest.raises(UserError, match=r"1 unexpected \(classes.bias\)"):
        to_ours({"word": ours["word"], "classes.bias": torch.ones(1)}, ours, rows, "file")
