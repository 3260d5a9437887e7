"""transformers' LLaVA layout without transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import LanguageModelConfig, ResNetConfig, VisionConfig
from minivlm.layers.lora import LoRAConfig
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.pretrained import comparable, llava
from minivlm.processor import Processor, ProcessorConfig
from tests.sentencepiece import llama_tokenizer

PLACEHOLDER = llama_tokenizer("<image>").token_to_id("<image>")
LANGUAGE = LanguageModelConfig(
    width=16,
    depth=2,
    heads=4,
    mlp_width=24,
    gated_mlp=True,
    activation="silu",
    norm="rmsnorm",
    norm_eps=1e-5,
    rope_theta=10_000.0,
    positions="none",
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    vocab_size=328,
    context=64,
    tie_head=False,
    end_tokens=(2,),
    pad_token=PLACEHOLDER + 1,
)
CLIP = VisionConfig(width=12, depth=3, heads=2, image_size=16, patch_size=8, activation="quick_gelu")
SIGLIP = replace(CLIP, pool="attention", embedding_norm=False, patch_bias=True, activation="gelu_tanh", norm_eps=1e-6)
CONFIG = LLaVAConfig(vision=CLIP, language=LANGUAGE, image_token=PLACEHOLDER)
QWEN2 = replace(LANGUAGE, qkv_bias=True, kv_heads=2, tie_head=True)


def logits(model):
    n = model.config.image_tokens
    tokens = torch.tensor([[1, 290, *[PLACEHOLDER] * n, 291], [1, *[PLACEHOLDER] * n, 292, 293]])
    with torch.no_grad():
        return model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), tokens).logits


def processor(**changes):
    fields = dict(image_size=16, resize_to=16, context=64, pad_token="<pad>", image_tokens=4, chat="vicuna")
    return Processor(llama_tokenizer("<image>", "<pad>"), ProcessorConfig(**{**fields, **changes}))


def rewrite(directory, name="config.json", **changes):
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, class_token=True, vision_layers=(-1,)),
        replace(CONFIG, vision_layers=(-2, 1, -1), projector_activation="relu"),
        replace(CONFIG, projector_bias=False, language=QWEN2),
        replace(CONFIG, vision=SIGLIP, language=replace(QWEN2, end_tokens=(2, 5))),
        replace(CONFIG, vision=replace(SIGLIP, pool="mean"), vision_layers=(0,)),
    ],
)
def test_there_and_back(config, tmp_path):
    model = LLaVA(config).eval()
    save(tmp_path, model, layout="hf")
    back, _ = load(tmp_path)
    assert comparable(back.config) == comparable(config)
    assert torch.equal(logits(back), logits(model))


ORIGINAL = {
    "language_model.model.": "model.",
    "language_model.": "",
    "vision_tower.": "model.vision_tower.vision_tower.",
    "multi_modal_projector.linear_1": "model.mm_projector.0",
    "multi_modal_projector.linear_2": "model.mm_projector.2",
}
SPELLINGS = {  # prefix in the published file → elsewhere
    "published": {},
    "transformers 5, written anew": {"vision_tower.vision_model.": "vision_tower."},
    "4.52, in memory": {
        "language_model.model.": "model.language_model.",
        "language_model.": "",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "transformers 5, in memory": {
        "language_model.model.": "model.language_model.",
        "language_model.": "",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    },
    "without a head's prefix": {"language_model.model.": "language_model.", "language_model.": ""},
    "LLaVA's authors": ORIGINAL,
}


def respell(name, spelling):
    prefix = next((prefix for prefix in spelling if name.startswith(prefix)), "")
    return spelling.get(prefix, prefix) + name.removeprefix(prefix)


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, vision=SIGLIP, language=QWEN2)], ids=["clip", "siglip"])
def test_all_spellings_of_the_names(config, spelling, tmp_path):
    model = LLaVA(config).eval()
    save(tmp_path, model, layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    renamed = {respell(name, spelling): tensor for name, tensor in stored.items()}
    assert len(renamed) == len(stored) and (renamed.keys() == stored.keys()) == (not spelling)
    save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(logits(load(tmp_path)[0]), logits(model))


def test_the_names_are_those_of_the_published_file(tmp_path):
    save(tmp_path, LLaVA(CONFIG), layout="hf")
    tower, language = "vision_tower.vision_model", "language_model.model"
    assert {name for name in load_file(tmp_path / "model.safetensors") if ".layers." not in name} == {
        *(
            f"{tower}.embeddings.{n}"
            for n in ("class_embedding", "patch_embedding.weight", "position_embedding.weight")
        ),
        *(f"{tower}.{n}.{kind}" for n in ("pre_layrnorm", "post_layernorm") for kind in ("weight", "bias")),
        *(f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        *(f"{language}.embed_tokens.weight", f"{language}.norm.weight", "language_model.lm_head.weight"),
    }


def test_a_tower_that_is_not_in_the_file_is_missing(tmp_path):
    save(tmp_path, LLaVA(CONFIG), layout="hf")
    stored = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in stored.items() if "vision" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"55 missing \(vision_tower\.vision_model\.embeddings\.class_embedding, "):
        load(tmp_path)


# ---- config ----------------------------------------------------------------------------------------------------------


def test_what_llava_1_5_leaves_out():
    """The published config says little: LLaMA's sizes, the end token and CLIP's activation are defaults."""
    text = {"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5, "vocab_size": 32064}
    tower = {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    }
    c = llava.read_config(
        {"text_config": text, "vision_config": tower, "pad_token_id": 32001, "image_token_index": 32000}
    )
    assert (c.language.width, c.language.depth, c.language.heads, c.language.hidden_width) == (4096, 32, 32, 11008)
    assert (c.language.end_tokens, c.language.pad_token, c.language.rope_theta) == ((2,), 32001, 1e4)
    assert (c.vision.depth, c.vision.activation, c.vision.pool) == (24, "quick_gelu", "class")
    assert (c.vision_layers, c.class_token, c.image_tokens, c.projector_activation) == ((-2,), False, 576, "gelu")
    assert llava.read_config({"text_config": text}).vision == c.vision
    assert llava.read_config({"text_config": text, "vision_feature_select_strategy": "full"}).image_tokens == 577


def test_a_head_is_tied_by_either_config(tmp_path):
    assert llava.read_config({"tie_word_embeddings": True}).language.tie_head
    assert llava.read_config({"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}}).language.tie_head
    assert not llava.read_config({}).language.tie_head
    save(tmp_path, LLaVA(CONFIG), layout="hf")  # but a head in the file goes before both
    rewrite(tmp_path, tie_word_embeddings=True)
    back, _ = load(tmp_path)
    assert not back.config.language.tie_head
    assert not torch.equal(back.language_model.head.weight, back.language_model.token_embedding.weight)


def test_the_end_of_an_answer(tmp_path):
    save(tmp_path, LLaVA(CONFIG), layout="hf")
    (tmp_path / "generation_config.json").unlink()
    rewrite(tmp_path, eos_token_id=[5, 6])
    assert load(tmp_path)[0].config.language.end_tokens == (5, 6)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "pad_token_id": 4}))
    config = load(tmp_path)[0].config.language
    assert (config.end_tokens, config.pad_token) == ((9,), 4)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"text_config": {"model_type": "gemma"}},
            "language model of type 'gemma'; supported in a LLaVA are llama, mistral",
        ),
        ({"vision_config": {"model_type": "pixtral"}}, "vision tower of type 'pixtral'"),
        ({"vision_feature_select_strategy": "cls"}, "strategy 'cls'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "its first patch would be lost"),
        ({"projector_hidden_act": "tanh"}, "activation 'tanh'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "LLaVA's own code"),
        ({"vision_feature_layer": "last"}, r"vision_layers\[0\] is 'last'"),
        ({"vision_feature_layer": []}, "no model that can be built"),
        ({"text_config": {"rope_scaling": {"type": "yarn"}}}, "of the type 'yarn'"),
    ],
)
def test_configs_that_cannot_be_followed(values, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", **values}))
    with pytest.raises(UserError, match=said) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lora": LoRAConfig()}, r"call merge_lora\(\) before"),
        ({"projector": "linear"}, "LlavaForConditionalGeneration cannot express projector = 'linear'"),
        ({"tiles": 2}, "cannot express tiles = 2"),
        (
            {"language": replace(LANGUAGE, rope_theta=None, positions="learned")},
            "needs a language model with rotary positions",
        ),
        ({"language": replace(LANGUAGE, norm="layernorm")}, "cannot express language.norm = 'layernorm'"),
        ({"vision": replace(CLIP, width=16, stem="convolutions")}, "cannot express vision.stem = 'convolutions'"),
        (
            {"vision": ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=32)},
            "ResNet tower",
        ),
    ],
)
def test_what_transformers_cannot_express_is_named(changes, named, tmp_path):
    with pytest.raises(UserError, match=named):
        save(tmp_path, LLaVA(replace(CONFIG, **changes)), layout="hf")
    assert not list(tmp_path.iterdir())


# ---- processor -------------------------------------------------------------------------------------------------------


def test_the_processor_there_and_back(tmp_path):
    ours = processor()
    save(tmp_path, LLaVA(CONFIG), ours, layout="hf")
    _, back = load(tmp_path)
    assert back.config == replace(ours.config, answer_end=CONFIG.language.end_tokens[0])
    picture = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    assert torch.equal(back.images([picture]), ours.images([picture]))
    a, nothing = (back.tokenizer.token_to_id(t) for t in ("▁a", "▁"))
    assert back.ids("a <image> a") == [a, nothing, *[PLACEHOLDER] * 4, nothing, a]
    assert back.encode(["a <image> a"]) == [[1, a, nothing, PLACEHOLDER, nothing, a]]
    text = "USER: <image>\nthe cat? ASSISTANT: zürich 你好"
    assert back.decode([back.ids(text)]) == [text.replace("<image>", " ")]


def test_siglip_and_qwen2(tmp_path):
    """Placeholders for all patches, SigLIP's pixels, and ChatML where the tokeniser has its tokens."""
    tokenizer = llama_tokenizer("<image>", "<pad>", "<|im_start|>", "<|im_end|>")
    config = replace(CONFIG, vision=SIGLIP, language=QWEN2)
    save(tmp_path, LLaVA(config), Processor(tokenizer, ProcessorConfig(pad_token="<pad>")), layout="hf")
    for name in ("preprocessor_config.json", "chat_template.jinja"):
        (tmp_path / name).unlink()
    c = load(tmp_path)[1].config
    assert (c.image_tokens, c.chat, c.image_size) == (4, "chatml", 16)
    assert (c.resize, c.crop, c.mean) == ("squash", "none", (0.5,) * 3)


def test_another_word_for_the_mark(tmp_path):
    save(tmp_path, LLaVA(CONFIG), Processor(llama_tokenizer("<picture>", "<pad>"), processor().config), layout="hf")
    with pytest.raises(
        UserError, match=rf"has no token '<image>', but image_token_index in config\.json is {PLACEHOLDER}"
    ):
        load(tmp_path)
    rewrite(tmp_path, "processor_config.json", image_token="<picture>")
    assert load(tmp_path)[1].config.image_token == "<picture>"


def test_what_does_not_fit_together(tmp_path):
    save(tmp_path, LLaVA(CONFIG), processor(), layout="hf")
    rewrite(tmp_path, image_token_index=PLACEHOLDER + 1)
    with pytest.raises(
        UserError, match=f"gives '<image>' the id {PLACEHOLDER}, but image_token_index in .* is {PLACEHOLDER + 1}"
    ):
        load(tmp_path)
    rewrite(tmp_path, image_token_index=PLACEHOLDER)
    rewrite(tmp_path, "preprocessor_config.json", crop_size={"height": 24, "width": 24})
    with pytest.raises(UserError, match=r"images of 24 pixels, but the vision tower in config\.json reads 16"):
        load(tmp_path)


def test_the_mark_needs_a_row(tmp_path):
    late = Processor(llama_tokenizer(*(f"<{i}>" for i in range(40)), "<image>"), processor(pad_token=0).config)
    save(tmp_path, LLaVA(CONFIG), late, layout="hf")
    rewrite(tmp_path, image_token_index=PLACEHOLDER + 40)
    with pytest.raises(
        UserError, match=rf"'<image>' is token {PLACEHOLDER + 40}, but vocab_size in config\.json is 328"
    ):
        load(tmp_path)
