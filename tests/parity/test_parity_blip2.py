"""BLIP-2 against transformers: both language models, and stage 1; in both directions, and by name in the published sizes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import minivlm
from minivlm import BLIP2, BLIP2Stage1
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.layers import VIT_SIZES
from minivlm.pretrained import blip2, blip2_itm, comparable, names
from minivlm.processor import Processor, ProcessorConfig

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V, IMAGE, Q = 60, 58, 3
VISION = {
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
QFORMER = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "encoder_hidden_size": 20,
    "max_position_embeddings": 16,
}
OPT = {
    "model_type": "opt",
    "vocab_size": V,
    "hidden_size": 24,
    "ffn_dim": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 24,
    "eos_token_id": 7,
}
T5 = {
    "model_type": "t5",
    "vocab_size": V,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
VARIANTS = {
    "opt": (OPT, {}, {}, {}),
    "opt, one cross-attention": ({**OPT, "activation_function": "gelu"}, {"cross_attention_frequency": 3}, {}, {}),
    "opt, relu": (OPT, {"hidden_act": "relu", "layer_norm_eps": 1e-6}, {"hidden_act": "quick_gelu"}, {}),
    "opt, every block": (OPT, {"cross_attention_frequency": 1, "num_attention_heads": 4}, {"patch_size": 12}, {}),
    "t5": (T5, {}, {}, {}),
    "t5 of the first kind": ({**T5, "feed_forward_proj": "relu", "dense_act_fn": "relu"}, {}, {}, {}),
}


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def reference(text, qformer, vision, rest):
    config = transformers.Blip2Config(
        vision_config={**VISION, **vision},
        qformer_config={**QFORMER, **qformer},
        text_config=text,
        num_query_tokens=Q,
        image_token_index=IMAGE,
        **rest,
    )
    return shaken(transformers.Blip2ForConditionalGeneration(config))


def compare(ours, theirs, images, close):
    words = torch.randint(8, V - 4, (2, 6))
    words[:, 0] = 2
    tokens = torch.cat([torch.full((2, Q), IMAGE), words], dim=1)
    mask = torch.arange(Q + 6) < torch.tensor([[Q + 6], [Q + 4]])
    pixels, labels = images(2, 24), torch.randint(8, V - 4, (2, 5))
    encodes = theirs.config.text_config.model_type == "t5"
    given = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": mask.long()}
    with torch.no_grad():
        if encodes:
            close(ours(pixels, tokens, mask, labels).logits, theirs(**given, labels=labels).logits)
        else:
            close(ours(pixels, tokens, mask).logits[mask], theirs(**given).logits[mask])
            left = torch.stack([tokens[0], tokens[1].roll(2)]), torch.stack([mask[0], mask[1].roll(2)])
            old = theirs(pixel_values=pixels, input_ids=left[0], attention_mask=left[1].long()).logits
            close(ours(pixels, *left).logits[left[1]], old[left[1]])
    said = ours.generate(pixels, tokens, mask, max_new_tokens=8).tolist()
    for i, answer in enumerate(said):
        n = int(mask[i].sum())
        alone = {"pixel_values": pixels[i : i + 1], "input_ids": tokens[i : i + 1, :n]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        expected = theirs.generate(**alone, do_sample=False, max_new_tokens=8)[0]
        expected = (
            expected[1:].tolist() if encodes else expected[n:].tolist() if len(expected) > n else expected.tolist()
        )
        assert answer[: len(expected)] == expected


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saved_by_transformers_loaded_by_us_and_back(variant, tmp_path, images, close):
    theirs = reference(*variant)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    compare(ours, theirs, images, close)
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    cls = transformers.Blip2ForConditionalGeneration
    back, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, back.eval(), images, close)


def test_older_files_have_no_image_token(tmp_path, images, close):
    """There the queries stand in front of the text, which is what the token says in newer ones."""
    theirs = reference(OPT, {}, {}, {})
    theirs.save_pretrained(tmp_path)
    newer, _ = minivlm.load(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace(f'"image_token_index": {IMAGE}', '"image_token_index": null'))
    older, _ = minivlm.load(tmp_path)
    assert older.config.image_token is None
    words, pixels = torch.randint(8, V - 4, (2, 6)), images(2, 24)
    tokens = torch.cat([torch.full((2, Q), IMAGE), words], dim=1)
    with torch.no_grad():
        close(older(pixels, words).logits, theirs(pixel_values=pixels, input_ids=tokens).logits[:, Q:])
    said = [model.generate(pixels, words, max_new_tokens=6) for model in (older, newer)]
    assert torch.equal(*said)


def itm_reference(**qformer):
    config = transformers.Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": True, **qformer},
        text_config={"model_type": "opt"},
        num_query_tokens=Q,
        image_text_hidden_size=16,
    )
    return shaken(transformers.Blip2ForImageTextRetrieval(config))


def compare_itm(ours, theirs, images, close):
    tokens, pixels = torch.randint(5, 50, (3, 7)), images(3, 24)
    mask = torch.arange(7) < torch.tensor([[7], [4], [6]])
    given = {"pixel_values": pixels, "input_ids": tokens, "attention_mask": mask.long()}
    with torch.no_grad():
        matched = theirs(**given, use_image_text_matching_head=True).logits_per_image
        close(ours.match(pixels, tokens, mask), matched)
        out = theirs(**given, use_image_text_matching_head=False)
        close(ours.encode_image(pixels), out.image_embeds)
        close(ours.encode_text(tokens, mask), out.text_embeds)
        close(ours(pixels, tokens, mask).logits_per_image, out.logits_per_image)


@pytest.mark.parametrize("qformer", [{}, {"cross_attention_frequency": 1, "hidden_act": "relu"}], ids=str)
def test_stage_1_in_both_directions(qformer, tmp_path, images, close):
    theirs = itm_reference(**qformer)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    assert isinstance(ours, BLIP2Stage1)
    compare_itm(ours, theirs, images, close)
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    cls = transformers.Blip2ForImageTextRetrieval
    back, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare_itm(ours, back.eval(), images, close)


def test_what_transformers_cannot_express_is_named(tmp_path):
    theirs = itm_reference()
    theirs.save_pretrained(tmp_path)
    config = blip2_itm.read_config(read_json(tmp_path / "config.json"))
    model = BLIP2Stage1(replace(config, text_head=True, temperature=0.07))
    with pytest.raises(UserError, match=r"cannot express temperature = 0\.07, text_head = True"):
        model.save_pretrained(tmp_path / "ours", layout="hf")


PUBLISHED_OPT = {
    "model_type": "opt",
    "vocab_size": 50304,
    "hidden_size": 2560,
    "ffn_dim": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "word_embed_proj_dim": 2560,
    "eos_token_id": 50118,
}
PUBLISHED_T5 = {
    "model_type": "t5",
    "vocab_size": 32128,
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_decoder_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "dense_act_fn": "gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}


@pytest.mark.parametrize(
    ("text", "mark"), [(PUBLISHED_OPT, 50265), (PUBLISHED_T5, 32100)], ids=["opt-2.7b", "flan-t5-xl"]
)
def test_published_sizes_name_by_name(text, mark):
    values = {"text_config": text, "image_token_index": mark}
    config = transformers.Blip2Config(**values)
    with torch.device("meta"):
        theirs = transformers.Blip2ForConditionalGeneration(config)
    ours = empty_model(BLIP2, blip2.read_config(values))
    rows, state = blip2.rows(ours.config), ours.state_dict(keep_vars=True)
    names.to_ours(theirs.state_dict(), state, rows, "published")
    assert ours.config.vision == VIT_SIZES["g/14"] and ours.config.image_tokens == 32
    tied = text is PUBLISHED_T5  # transformers 5 ties the head of a T5 in memory, unless the file has one of its own
    head = 32128 * 2048 if tied else 0
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) + head


def test_itm_vit_g_name_by_name():
    values = {
        "qformer_config": {"vocab_size": 30523, "use_qformer_text_input": True},
        "text_config": {"model_type": "opt"},
        "image_token_index": 30523,
    }
    with torch.device("meta"):
        theirs = transformers.Blip2ForImageTextRetrieval(transformers.Blip2Config(**values))
    ours = empty_model(BLIP2Stage1, blip2_itm.read_config(values))
    names.to_ours(theirs.state_dict(), ours.state_dict(keep_vars=True), blip2_itm.rows, "published")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_defaults_are_those_of_transformers():
    theirs = transformers.Blip2Config().to_dict()
    assert comparable(blip2.read_config({})) == comparable(blip2.read_config(theirs))


def test_the_processor_reaches_transformers(tmp_path):
    """Pixels of ours are those of BlipImageProcessor, from files that we wrote."""
    theirs = reference(OPT, {}, {}, {})
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    pixels = dict(image_size=24, resize="squash", resize_to=24, crop="none")
    about = ProcessorConfig(**pixels, context=64, pad_token=1, image_tokens=Q, chat="blip2")
    ours.save_pretrained(tmp_path / "ours", processor=Processor(None, about), layout="hf")
    _, processor = minivlm.load(tmp_path / "ours")
    assert processor.config == about
    picture = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    expected = transformers.BlipImageProcessorPil.from_pretrained(tmp_path / "ours")(picture, return_tensors="pt")
    assert torch.equal(processor.images([picture]), expected["pixel_values"])
