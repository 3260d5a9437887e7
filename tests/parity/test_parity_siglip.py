"""SigLIP against transformers.SiglipModel, in both directions."""

import pytest
import torch

import minivlm
from minivlm.empty_model import empty_model
from minivlm.errors import UserError
from minivlm.models.clip import CLIP
from minivlm.pretrained import names, siglip
from tests.pretrained.test_tokenizer_config import gemma, write

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 10,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
VARIANTS = {
    "Google's": {},
    "a border, as so400m's": {"vision": {"image_size": 38, "patch_size": 9}},
    "another text width": {"text": {"hidden_size": 32, "num_attention_heads": 4, "projection_size": 24}},
    "other functions": {"text": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, "vision": {"hidden_act": "relu"}},
}


def reference(variant):
    config = transformers.SiglipConfig(
        text_config={**TEXT, **variant.get("text", {})}, vision_config={**VISION, **variant.get("vision", {})}
    )
    model = transformers.SiglipModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def compare(ours, theirs, images, close):
    tokens, pixels = torch.randint(60, (3, 10)), images(3, theirs.config.vision_config.image_size)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 6:] = False  # must not matter: SigLIP reads its padding
    with torch.no_grad():
        out = ours(pixels, tokens, mask)
        expected = theirs(input_ids=tokens, pixel_values=pixels, return_loss=True)
    close(out.image_features, expected.image_embeds)
    close(out.text_features, expected.text_embeds)
    close(out.logits_per_image, expected.logits_per_image)
    close(out.loss, expected.loss)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saved_by_transformers_loaded_by_us(variant, tmp_path, images, close):
    theirs = reference(variant)
    theirs.save_pretrained(tmp_path)
    compare(minivlm.load(tmp_path)[0], theirs, images, close)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_saved_by_us_loaded_by_transformers(variant, tmp_path, images, close):
    reference(variant).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    theirs, info = transformers.SiglipModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, theirs.eval(), images, close)


@pytest.mark.parametrize("family", ["Siglip2Tokenizer", "GemmaTokenizer"])
def test_siglip_2_of_one_size_has_gemmas_tokens_padded_to_the_context(family, tmp_path, images, close):
    theirs = reference({"text": {"vocab_size": 300}})
    theirs.save_pretrained(tmp_path)
    frame = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write(tmp_path, gemma(), tokenizer_class=family, padding_side="right", add_eos_token=True, **frame)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours, processor = minivlm.load(tmp_path)
    texts = ["a cat", " Two  cafés! 你", "a\ncat.", ""]
    texts = texts if family == "Siglip2Tokenizer" else [text.lower() for text in texts]
    texts = [text[:4] for text in texts]  # that the ten tokens of the context hold
    tokens, mask = processor.text(texts)
    expected = tokenizer(texts, padding="max_length", max_length=10, return_tensors="pt")["input_ids"]
    assert tokens.tolist() == expected.tolist()
    pixels = images(len(texts), 32)
    with torch.no_grad():
        close(ours(pixels, tokens, mask).logits_per_image, theirs(expected, pixels).logits_per_image)


def test_siglip_2_with_naflex_is_refused_in_a_sentence(tmp_path):
    transformers.Siglip2Config(text_config=TEXT, vision_config={}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"NaFlex, .* google/siglip2-base-patch16-224\.$"):
        minivlm.load(tmp_path)


def test_a_model_without_pooling_head_is_refused():
    with pytest.raises(UserError, match="vision_use_head"):
        siglip.read_config({"vision_config": {"vision_use_head": False}})


def test_published_size_name_by_name():
    with torch.device("meta"):
        theirs = transformers.SiglipModel(transformers.SiglipConfig())
    ours = empty_model(CLIP, siglip.read_config({"text_config": {}, "vision_config": {}}))
    stored = theirs.state_dict()
    names.to_ours(stored, ours.state_dict(keep_vars=True), siglip.rows, "siglip-base")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 203_155_970
    written = names.to_theirs(ours.state_dict(), siglip.rows)
    assert {k: v.shape for k, v in written.items()} == {
        k: v.shape for k, v in stored.items() if "position_ids" not in k
    }
