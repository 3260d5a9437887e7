"""IDEFICS in transformers' layout: names, configs old and new, and what its processor does."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm import Flamingo, FlamingoConfig, Processor
from minivlm.checkpoint import load, save
from minivlm.conversation import Turn, encode_conversation, with_images
from minivlm.errors import UserError
from minivlm.layers import GatedConfig, LanguageModelConfig, PerceiverConfig, VisionConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.pretrained import comparable, idefics
from minivlm.processor import ProcessorConfig
from tests.sentencepiece import llama_tokenizer

TOKENIZER = llama_tokenizer("<fake_token_around_image>", "<image>")
PLACEHOLDER = TOKENIZER.token_to_id("<image>")
VISION = VisionConfig(width=16, depth=2, heads=2, image_size=16, patch_size=8)
LANGUAGE = LanguageModelConfig(
    width=24, depth=4, heads=4, vocab_size=PLACEHOLDER + 1, context=64, positions="none", rope_theta=1e4, norm="rmsnorm",
    norm_eps=1e-6, gated_mlp=True, activation="silu", qkv_bias=False, out_bias=False, mlp_bias=False, tie_head=False,
    end_tokens=(2,), pad_token=0,
)  # fmt: skip
RESAMPLER = PerceiverConfig(width=16, depth=2, heads=2, head_width=6, latents=3, activation="relu", qk_norm="layernorm")
GATED = GatedConfig(norm="rmsnorm", norm_eps=1e-6, gated_mlp=True, activation="silu", qk_norm="rmsnorm")
CONFIG = FlamingoConfig(
    vision=VISION, language=LANGUAGE, resampler=RESAMPLER, gated=GATED, image_token=PLACEHOLDER, every=2, class_token=True,
    vision_norm=False,
)  # fmt: skip
IMAGES = dict(image_size=16, resize="squash", resize_to=16, crop="none")


def processor():
    config = ProcessorConfig(
        **IMAGES, context=64, pad_token="<unk>", image_tokens=1, image_fence=idefics.FENCE, chat="idefics"
    )
    return Processor(TOKENIZER, config)


def flamingo():
    model = Flamingo(CONFIG).eval()
    for p in model.gated.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def logits(model):
    torch.manual_seed(0)
    return model(torch.randn(1, 1, 3, 16, 16), torch.tensor([[1, PLACEHOLDER, 20, 21]])).logits


def rewrite(directory, name="config.json", **values):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_there_and_back(tmp_path):
    model, ours = flamingo(), processor()
    save(tmp_path, model, ours, layout="hf")
    back, read = load(tmp_path)
    assert comparable(back.config) == comparable(CONFIG) and read.config == ours.config
    assert torch.allclose(logits(back), logits(model), atol=1e-6)
    picture = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    assert torch.equal(read.images([picture]), ours.images([picture]))
    assert read.encode(["<image>a"])[0].count(PLACEHOLDER) == 1 == read.ids("<image>a").count(PLACEHOLDER)


def test_an_instructed_model_is_known_by_the_end_of_its_turns(tmp_path):
    words = llama_tokenizer("<fake_token_around_image>", "<image>", idefics.TURN_END)
    model = Flamingo(replace(CONFIG, language=replace(LANGUAGE, vocab_size=words.get_vocab_size())))
    save(tmp_path, model, Processor(words, processor().config), layout="hf")
    _, read = load(tmp_path)
    assert read.config.chat == "idefics-instruct"
    prompt = encode_conversation([Turn("user", with_images("a"))], read, prompt=True)
    assert words.token_to_id(idefics.TURN_END) in prompt.tokens and prompt.tokens.count(PLACEHOLDER) == 1


def test_a_mark_is_fenced_in(tmp_path):
    """Once between two pictures, and once where the text brings its own."""
    ours = processor()
    F = TOKENIZER.token_to_id(idefics.FENCE)
    words = lambda text: [{PLACEHOLDER: "i", F: "f"}.get(id, "w") for id in ours.ids(text)]
    assert words("<image>") == [*"fif"]
    assert words("<image><image>") == [*"fifif"]
    assert "".join(words("a<image>a")).replace("w", "") == "fif"
    assert words(f"{idefics.FENCE}<image>{idefics.FENCE}") == [*"fif"]
    assert "i" not in words("a") and "f" not in words("a")
    plain = Processor(llama_tokenizer("<image>"), replace(ours.config, image_fence=None))
    assert plain.ids("<image><image>") == [plain.image_token_id] * 2
    assert ours.placeholder_tokens == (PLACEHOLDER, F) and plain.placeholder_tokens == (plain.image_token_id,)


def test_added_words_are_stored_apart(tmp_path):
    """As the published files have it: LLaMA's words in one tensor, two more in another."""
    model = flamingo()
    save(tmp_path, model, processor(), layout="hf")
    words = PLACEHOLDER - 1
    stored = load_file(tmp_path / "model.safetensors")
    for whole, added in idefics.ADDED.items():
        stored[whole], stored[added] = (part.clone() for part in stored[whole].split([words, 2]))
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(3)
    save_file(stored, tmp_path / "model.safetensors")
    rewrite(tmp_path, vocab_size=words, additional_vocab_size=2, image_token_id=None)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["image_token_id"]  # the published files do not name it
    (tmp_path / "config.json").write_text(json.dumps(config))
    back, _ = load(tmp_path)
    assert back.config.image_token == PLACEHOLDER and back.config.language.vocab_size == PLACEHOLDER + 1
    assert torch.allclose(logits(back), logits(model), atol=1e-6)


def test_the_first_files_have_flat_configs():
    flat = {
        "model_type": "idefics",
        "use_resampler": True,
        "resampler_depth": 3,
        "resampler_n_latents": 8,
        "qk_layer_norms_perceiver": True,
        "vision_embed_dim": 1280,
        "vision_num_hidden_layers": 30,
        "cross_layer_interval": 4,
    }
    c = idefics.read_config(flat)
    assert (c.vision.width, c.vision.depth, c.resampler.width) == (1280, 30, 1280)
    assert (c.resampler.depth, c.resampler.latents, c.resampler.qk_norm) == (3, 8, "layernorm")
    assert c.block_indices == range(0, 32, 4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"cross_layer_interval": 3}, "is no multiple of cross_layer_interval = 3"),
        ({"alpha_type": "matrix"}, "alpha_type = 'matrix'; there are float, vector"),
        ({"hidden_act": "tanh"}, "activation 'tanh'"),
        ({"vision_config": {"embed_dim": 20, "num_channels": 4}}, "images of 4 channels"),
    ],
)
def test_configs_that_cannot_be_followed(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "idefics", "num_hidden_layers": 4, **values}))
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attend_to": "all"}, "cannot express attend_to = 'all'"),
        ({"offset": 1}, "cannot express offset = 1"),
        ({"class_token": False}, "cannot express class_token = False"),
        ({"vision_norm": True}, "cannot express vision_norm = True"),
        ({"gated": replace(GATED, heads=8)}, "cannot express gated.heads = 8"),
        ({"gated": replace(GATED, norm="layernorm")}, "cannot express gated.norm = 'layernorm'"),
        ({"gated": replace(GATED, mlp_width=12)}, "cannot express gated.mlp_width = 12"),
        ({"resampler": replace(RESAMPLER, activation="gelu")}, "cannot express resampler.activation = 'gelu'"),
        ({"resampler": replace(RESAMPLER, max_images=2)}, "cannot express resampler.max_images = 2"),
        ({"language": replace(LANGUAGE, norm="layernorm")}, "cannot express language.norm = 'layernorm'"),
        ({"language": replace(LANGUAGE, alibi=True)}, "cannot express language.alibi = True"),
    ],
)
def test_what_transformers_cannot_express_is_named(changes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        save(tmp_path, Flamingo(replace(CONFIG, **changes)), layout="hf")
    assert not list(tmp_path.iterdir())


def test_a_resnet_has_no_place_there(tmp_path):
    resnet = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
    wide = replace(RESAMPLER, context_width=256)
    with pytest.raises(UserError, match="cannot express a ResNet tower"):
        save(tmp_path, Flamingo(replace(CONFIG, vision=resnet, resampler=wide)), layout="hf")


def test_another_tokeniser(tmp_path):
    save(tmp_path, flamingo(), processor(), layout="hf")
    rewrite(tmp_path, image_token_id=PLACEHOLDER - 1)
    with pytest.raises(
        UserError, match=f"gives '<image>' the id {PLACEHOLDER}, but by its config.json it is {PLACEHOLDER - 1}"
    ):
        load(tmp_path)
    save(tmp_path, flamingo(), Processor(llama_tokenizer(), processor().config), layout="hf")
    with pytest.raises(UserError, match="has no token '<image>'"):
        load(tmp_path)
