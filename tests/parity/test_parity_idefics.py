"""IDEFICS against transformers.IdeficsForVisionText2Text, in both directions."""

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm
from minivlm import Flamingo, Processor
from minivlm.empty_model import empty_model
from minivlm.layers import image_mask
from minivlm.pretrained import comparable, idefics, names
from minivlm.processor import ProcessorConfig
from tests.sentencepiece import llama_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V, PLACEHOLDER = 60, 61
CONFIG = {
    "vocab_size": V,
    "additional_vocab_size": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "cross_layer_interval": 2,
    "qk_layer_norms": True,
    "max_position_embeddings": 64,
    "use_resampler": True,
    "vision_config": {
        "embed_dim": 20,
        "image_size": 24,
        "patch_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 36,
    },
    "perceiver_config": {
        "use_resampler": True,
        "resampler_depth": 2,
        "resampler_n_latents": 5,
        "resampler_n_heads": 3,
        "resampler_head_dim": 6,
        "qk_layer_norms_perceiver": True,
    },
}
VARIANTS = {
    "idefics-9b": {},
    "without norms of queries and keys": {
        "qk_layer_norms": False,
        "perceiver_config": {**CONFIG["perceiver_config"], "qk_layer_norms_perceiver": False},
    },
    "before every block": {"cross_layer_interval": 1, "hidden_act": "gelu"},
    "a gate for each channel": {"alpha_type": "vector"},
    "without a resampler": {"use_resampler": False, "perceiver_config": None},
    "tied": {"tie_word_embeddings": True},
}
every_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def reference(changes):
    """All weights away from where they start, the gates as well."""
    model = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**{**CONFIG, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def compare(ours, theirs, images, close):
    """Two rows, one of them with a single image and padded on the left, as IDEFICS pads."""
    first = torch.tensor([1, PLACEHOLDER, 20, 21, 22, PLACEHOLDER, 23, 24])
    second = torch.tensor([0, 0, 0, 1, 30, PLACEHOLDER, 31, 32])
    tokens, mask = torch.stack([first, second]), torch.tensor([[True] * 8, [False] * 3 + [True] * 5])
    pixels = images(4, 24).view(2, 2, 3, 24, 24)
    visible = image_mask(tokens, PLACEHOLDER, 2).long()
    given = {"pixel_values": pixels, "attention_mask": mask.long(), "image_attention_mask": visible}
    labels = tokens.masked_fill(~mask, -100)
    with torch.no_grad():
        mine, expected = ours(pixels, tokens, mask, labels), theirs(tokens, **given)
        close(mine.logits[mask], expected.logits[mask])
        loss = torch.nn.functional.cross_entropy(expected.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        close(mine.loss[None], loss[None])
        seen = theirs.model.vision_model(pixels.flatten(0, 1)).last_hidden_state
        resampled = theirs.model.perceiver_resampler(seen) if theirs.config.use_resampler else seen
        close(ours.resample(ours.image_features(pixels)), resampled)
    said = ours.generate(pixels, tokens, mask, max_new_tokens=10, end_tokens=())
    options = dict(do_sample=False, max_new_tokens=10, min_new_tokens=10, eos_token_id=None)
    assert said.tolist() == theirs.generate(tokens, **given, **options)[:, 8:].tolist()


@every_variant
def test_saved_by_transformers_loaded_by_us(changes, tmp_path, images, close):
    theirs = reference(changes)
    theirs.save_pretrained(tmp_path)
    compare(minivlm.load(tmp_path)[0], theirs, images, close)


@every_variant
def test_saved_by_us_loaded_by_transformers(changes, tmp_path, images, close):
    reference(changes).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    cls = transformers.IdeficsForVisionText2Text
    theirs, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, theirs.eval(), images, close)
    back, _ = minivlm.load(tmp_path / "ours")
    assert comparable(back.config) == comparable(ours.config)


def test_defaults_are_those_of_transformers():
    for values in ({}, {"use_resampler": True, "perceiver_config": {"use_resampler": True}, "vision_config": {}}):
        theirs = transformers.IdeficsConfig(**values).to_dict()
        assert comparable(idefics.read_config(values)) == comparable(idefics.read_config(theirs))


def test_idefics_9b_name_by_name():
    """The published config, of which class defaults fill the rest."""
    published = {
        "additional_vocab_size": 2,
        "cross_layer_interval": 4,
        "qk_layer_norms": True,
        "use_resampler": True,
        "perceiver_config": {"qk_layer_norms_perceiver": True, "use_resampler": True},
        "vision_config": {"embed_dim": 1280},
    }
    with torch.device("meta"):
        theirs = transformers.IdeficsForVisionText2Text(transformers.IdeficsConfig(**published))
    ours = empty_model(Flamingo, idefics.read_config(published))
    weights = idefics.prepare(theirs.state_dict())
    names.to_ours(weights, ours.state_dict(keep_vars=True), idefics.rows(ours.config), "9b")  # raises unless all agrees
    assert len(ours.gated) == 8 and ours.config.latents == 64 and ours.config.image_token == 32001
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 8_929_679_632


def test_prompts_are_those_of_transformers():
    """<fake_token_around_image><image><fake_token_around_image>, and one fence between two pictures."""
    tokenizer = llama_tokenizer(idefics.FENCE, "<image>")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    theirs = transformers.IdeficsProcessor(transformers.IdeficsImageProcessorPil(image_size=24), fast)
    about = ProcessorConfig(image_size=24, image_tokens=1, image_fence=idefics.FENCE)
    ours, picture = Processor(tokenizer, about), Image.new("RGB", (30, 41), "red")
    prompt = ["User:", picture, picture, "the cat?\nAssistant:", picture]
    text = "".join("<image>" if part is picture else part for part in prompt)
    expected = theirs(text=[prompt], return_tensors="pt", add_end_of_utterance_token=False)
    assert [1, *ours.ids(text)] == expected["input_ids"][0].tolist()
    visible = image_mask(expected["input_ids"], ours.image_token_id, 3)
    assert torch.equal(visible, expected["image_attention_mask"].bool())


def test_the_pictures_are_those_of_transformers(tmp_path):
    reference({}).save_pretrained(tmp_path)
    theirs = transformers.IdeficsImageProcessorPil(image_size=24)
    theirs.save_pretrained(tmp_path)
    _, ours = minivlm.load(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    expected = theirs([[picture]], return_tensors="pt")
    expected = expected if torch.is_tensor(expected) else expected["pixel_values"]
    assert (ours.images([picture]) - expected.view(1, 3, 24, 24)).abs().max() < 1e-5
