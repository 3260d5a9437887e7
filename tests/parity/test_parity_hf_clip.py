"""CLIP against transformers.CLIPModel, in both directions."""

import json

import pytest
import torch

import minivlm
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.layers import TextConfig, VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig, clip_size
from minivlm.pretrained import comparable, hf_clip, names
from minivlm.processor import Processor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

TEXT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
    "eos_token_id": 2,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
}
VARIANTS = {
    "OpenAI's": {},
    "exact gelu, as LAION's": {"text": {"hidden_act": "gelu"}, "vision": {"hidden_act": "gelu"}},
    "an end token": {"text": {"eos_token_id": 50, "layer_norm_eps": 1e-3}, "vision": {"layer_norm_eps": 1e-2}},
    "an absent end token": {"text": {"eos_token_id": 49407}},
    "relu and silu": {"text": {"hidden_act": "relu"}, "vision": {"hidden_act": "silu"}},
    "tanh gelus": {"text": {"hidden_act": "gelu_new"}, "vision": {"hidden_act": "gelu_pytorch_tanh"}},
    "a border": {"vision": {"image_size": 30, "patch_size": 7}, "projection_dim": 10},
    "one patch": {"vision": {"image_size": 16, "patch_size": 16, "num_hidden_layers": 1}},
}


def reference(variant, dtype=torch.float32):
    """A random CLIPModel, with norms and biases that matter."""
    config = transformers.CLIPConfig(
        text_config={**TEXT, **variant.get("text", {})},
        vision_config={**VISION, **variant.get("vision", {})},
        projection_dim=variant.get("projection_dim", 20),
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(dtype)


def tokens_of(eos=50):
    """(3, 12) ids: the first text ends early, the second holds its end token twice, the third has none."""
    tokens = torch.randint(3, 50, (3, 12))
    tokens[0, 5], tokens[0, 6:] = eos, 1
    tokens[1, [4, 11]] = eos
    return tokens


def compare(ours, theirs, images, close):
    tokens, pixels = tokens_of(), images(3, theirs.config.vision_config.image_size)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 6:] = False
    with torch.no_grad():
        out = ours(pixels, tokens, mask)
        expected = theirs(input_ids=tokens, pixel_values=pixels, attention_mask=mask.long(), return_loss=True)
    close(out.image_features, expected.image_embeds)
    close(out.text_features, expected.text_embeds)
    close(out.logits_per_image, expected.logits_per_image)
    close(out.loss, expected.loss)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saved_by_transformers_loaded_by_us(variant, tmp_path, images, close):
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    compare(ours, theirs, images, close)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saved_by_us_loaded_by_transformers(variant, tmp_path, images, close):
    reference(variant).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, theirs.eval(), images, close)


def test_diff_style_configs(tmp_path):
    """Files hold only what differs from the defaults; text_config_dict, where given, counts instead of text_config."""
    values = {
        "model_type": "clip",
        "text_config": {"hidden_size": 999, "vocab_size": 7},
        "text_config_dict": {"hidden_size": 64, "num_attention_heads": 2},
        "vision_config": {},
        "vision_config_dict": None,
    }
    theirs = transformers.CLIPConfig.from_dict(values)
    ours = hf_clip.read_config(values)
    assert ours == hf_clip.read_config(theirs.to_dict())
    assert (ours.text.width, ours.text.vocab_size, ours.text.pool, ours.text.end_token) == (64, 49408, "end", 49407)
    assert (ours.vision.width, ours.vision.depth, ours.vision.patch_size) == (768, 12, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(dtype, tmp_path, images, close):
    theirs = reference({}, dtype)
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {dtype}
    compare(minivlm.load(tmp_path, dtype=torch.float32)[0], theirs.float(), images, close)
    assert ours.encode_image(images(1, 32)).dtype == dtype  # pixels come as float32 and are taken as they are


def test_sharded_and_pickled_files(tmp_path, images, close):
    theirs = reference({})
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    compare(minivlm.load(tmp_path / "shards")[0], theirs, images, close)
    theirs.config.save_pretrained(tmp_path / "pickle")
    torch.save(theirs.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    compare(minivlm.load(tmp_path / "pickle")[0], theirs, images, close)


WORDS = ["a", "photo", "of", "the", "cat", "and", "two", "dogs;", "it's", "12", "cafés,", "zürich", "你好"]


def test_a_model_of_our_own_reaches_transformers(tmp_path, images, close):
    """Our end token leads transformers to the same position, and AutoTokenizer gives the same ids."""
    processor = Processor.train([" ".join(WORDS)] * 3, vocab_size=300, image_size=32, context=24)
    text = TextConfig(width=32, depth=2, heads=4, context=24, vocab_size=300, end_token=processor.end_token)
    vision = VisionConfig(width=32, depth=2, heads=4, image_size=32, patch_size=8)
    ours = CLIP(CLIPConfig(vision=vision, text=text, embed_width=16)).eval()
    ours.save_pretrained(tmp_path, processor=processor, layout="hf")
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = ["a photo of two cats", "Dogs!", ""]
    tokens, mask = processor.text(texts)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == tokens.tolist()
    assert batch["attention_mask"].bool().tolist() == mask.tolist()
    pixels = images(3, 32)
    with torch.no_grad():
        expected = theirs.eval()(**batch, pixel_values=pixels)
        close(ours(pixels, tokens, mask).logits_per_image, expected.logits_per_image)
    back, back_processor = minivlm.load(tmp_path)
    assert comparable(back.config) == comparable(ours.config)
    assert back_processor.text(texts)[0].tolist() == tokens.tolist()
    assert back_processor.decode(tokens) == processor.decode(tokens)


def test_tokeniser_and_decoding(tmp_path):
    """CLIP's own kind of vocabulary: same ids as CLIPTokenizer, with tokenizer.json or only vocab.json and merges.txt."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("c", "a"), ("ca", "t</w>"), ("o", "f</w>"), ("d", "o"), ("do", "g")]
    symbols = [*letters, *(s + "</w>" for s in letters), *(a + b for a, b in merges)]
    vocab = {s: i for i, s in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    theirs = transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=24)
    config = {"model_type": "clip", "text_config": {**TEXT, "vocab_size": len(vocab), "max_position_embeddings": 24}}
    from minivlm.pretrained import read

    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    theirs.save_pretrained(tmp_path / "whole")
    (tmp_path / "parts" / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "parts" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    texts = [*WORDS, " ".join(WORDS), "", "The  CAT\n of x", "😀 dogs", "e\u0301"]
    for name in ("whole", "parts"):
        ours = read(tmp_path / name, "clip").processor
        for text in texts:
            ids = theirs(text)["input_ids"]
            tokens, mask = ours.text([text])
            assert tokens[0].tolist() == ids and mask.all()
            assert ours.decode(tokens) == [theirs.decode(ids, skip_special_tokens=True)]
        long = "cat " * 40
        assert ours.text([long], cut=True)[0][0].tolist() == theirs(long, truncation=True)["input_ids"]
        assert ours.too_long([long, "cat", long]) == 2
        batch = theirs(texts, padding=True)
        assert ours.text(texts)[0].tolist() == batch["input_ids"]
        assert ours.text(texts)[1].long().tolist() == batch["attention_mask"]


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-L/14", "ViT-H/14"])
def test_published_sizes_name_by_name(name):
    """Every name and shape of the full-size models, both ways, without their memory."""
    big = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    huge = {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120}
    middle = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "eos_token_id": 2}
    options = {
        "ViT-B/32": {"text_config": {"eos_token_id": 2}, "vision_config": {}},
        "ViT-L/14": {"text_config": middle, "vision_config": {**big, "patch_size": 14}, "projection_dim": 768},
        "ViT-H/14": {
            "text_config": {**big, "hidden_act": "gelu", "eos_token_id": 2},
            "vision_config": {**huge, "patch_size": 14, "hidden_act": "gelu"},
            "projection_dim": 1024,
        },
    }[name]
    config = transformers.CLIPConfig(**options)
    with torch.device("meta"):
        theirs = transformers.CLIPModel(config).state_dict()
    ours = empty_model(CLIP, hf_clip.read_config(config.to_dict()))
    assert comparable(ours.config) == comparable(clip_size(name))
    state = ours.state_dict(keep_vars=True)
    names.to_ours(theirs, state, hf_clip.rows, name)  # raises unless every name and shape agrees
    written = names.to_theirs(state, hf_clip.rows)
    stored = {k: v.shape for k, v in theirs.items() if not k.endswith("position_ids")}
    assert {k: v.shape for k, v in written.items()} == stored


def test_refusals_agree_with_what_would_be_wrong(tmp_path):
    theirs = reference({})
    theirs.config.text_config.hidden_act = "tanh"
    with pytest.raises(UserError, match="activation 'tanh'"):
        hf_clip.read_config(theirs.config.to_dict())
