"""LLaVA against transformers.LlavaForConditionalGeneration, in both directions."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import minivlm
from minivlm import LLaVA, LLaVAConfig, Processor
from minivlm.conversation import Turn, encode_conversation
from minivlm.empty_model import empty_model
from minivlm.layers import LanguageModelConfig, VisionConfig
from minivlm.pretrained import comparable, llava, names
from minivlm.processor import ProcessorConfig
from tests.sentencepiece import llama_tokenizer

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

V, IMAGE = 60, 50

TEXT = {
    "model_type": "llama",
    "vocab_size": V,
    "max_position_embeddings": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 20,
    "intermediate_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True, "eos_token_id": 7}
FULL = {"vision_feature_select_strategy": "full"}
VARIANTS = {  # text, vision, the rest
    "llava-1.5": ({}, {}, {}),
    "class token": ({}, {}, FULL),
    "first layer": ({}, {}, {"vision_feature_layer": 1}),
    "last layer": ({"num_key_value_heads": 2}, {}, {"vision_feature_layer": -1}),
    "three layers": ({}, {}, {"vision_feature_layer": [-2, 0, -1]}),
    "two layers and class token": ({}, {"hidden_act": "gelu"}, {"vision_feature_layer": [-2, -3], **FULL}),
    "plain projector": ({}, {}, {"multimodal_projector_bias": False, "projector_hidden_act": "relu"}),
    "qwen2": (QWEN2, {}, {}),
    "mistral": ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}, {}, {}),
    "siglip": ({}, SIGLIP, FULL),
    "siglip's last layer": ({}, {**SIGLIP, "hidden_act": "gelu"}, {"vision_feature_layer": -1, **FULL}),
    "siglip without a head": (QWEN2, {**SIGLIP, "vision_use_head": False}, FULL),
}


def reference(text, vision, rest):
    config = transformers.LlavaConfig(
        text_config={**TEXT, **text}, vision_config={**CLIP, **vision}, image_token_index=IMAGE, pad_token_id=1, **rest
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def compare(ours, theirs, images, close):
    """Two rows with a picture each, one with two: in one batch what transformers gives for each alone."""
    places = [IMAGE] * ours.config.image_tokens
    words = lambda n: torch.randint(8, IMAGE, (n,)).tolist()
    rows = [[*words(3), *places, *words(4)], [*places, 9], [2, *places, *words(2), *places, 9]]
    counts, pixels = [1, 1, 2], images(4, 24)
    rows, seen = [torch.tensor(row) for row in rows], pixels.split(counts)
    with torch.no_grad():
        alone = [theirs(row[None], pixel_values=some).logits[0] for row, some in zip(rows, seen, strict=True)]
        close(ours(seen[2][None], rows[2][None]).logits[0], alone[2])
        tokens = pad_sequence(rows[:2], batch_first=True, padding_value=1)
        T = tokens.shape[1]
        mask = torch.arange(T) < torch.tensor([[len(row)] for row in rows[:2]])
        close(ours(pixels[:2], tokens, mask).logits[mask], torch.cat(alone[:2]))
        left = torch.stack([row.roll(T - len(real)) for row, real in zip(tokens, rows, strict=False)])
        close(ours(pixels[:2], left, mask.flip(1)).logits[mask.flip(1)], torch.cat(alone[:2]))
        labels = tokens[:1].masked_fill(tokens[:1] == IMAGE, -100)
        given = {"pixel_values": pixels[:1], "labels": labels}
        close(ours(pixels[:1], tokens[:1], labels=labels).loss[None], theirs(tokens[:1], **given).loss[None])
    said = ours.generate(pixels[:2], tokens, mask, max_new_tokens=12).tolist()
    for row, some, answer in zip(rows, seen, said, strict=False):
        ids = row[None]
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 12}
        expected = theirs.generate(ids, pixel_values=some, **options)[0, len(row) :].tolist()
        assert answer[: len(expected)] == expected


@pytest.mark.parametrize(("text", "vision", "rest"), VARIANTS.values(), ids=VARIANTS)
def test_saved_by_transformers_loaded_by_us(text, vision, rest, tmp_path, images, close):
    theirs = reference(text, vision, rest)
    theirs.save_pretrained(tmp_path)
    ours, _ = minivlm.load(tmp_path)
    compare(ours, theirs, images, close)


@pytest.mark.parametrize(("text", "vision", "rest"), VARIANTS.values(), ids=VARIANTS)
def test_saved_by_us_loaded_by_transformers(text, vision, rest, tmp_path, images, close):
    reference(text, vision, rest).save_pretrained(tmp_path / "theirs")
    ours, _ = minivlm.load(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours", layout="hf")
    cls = transformers.LlavaForConditionalGeneration
    theirs, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    compare(ours, theirs.eval(), images, close)


def test_the_model_in_memory(tmp_path, images, close):
    """Names as transformers 5 has them while it runs: model.language_model, model.vision_tower without vision_model."""
    theirs = reference({}, {}, {})
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    assert any(name.startswith("model.vision_tower.embeddings") for name in theirs.state_dict())
    compare(minivlm.load(tmp_path)[0], theirs, images, close)


def test_shards_in_half_precision(tmp_path, images, close):
    theirs = reference({}, {}, {}).half()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert {p.dtype for p in minivlm.load(tmp_path)[0].parameters()} == {torch.float16}
    exact = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    compare(minivlm.load(tmp_path, dtype=torch.float32)[0], exact, images, close)


def test_defaults_are_those_of_transformers():
    """Nothing said: CLIP-L/14-336 and LLaMA-7B; an empty tower: CLIP-B/32."""
    for values in (
        {},
        {"vision_config": {}, "text_config": {}},
        {"text_config": {"model_type": "mistral", "sliding_window": None}},
    ):
        theirs = transformers.LlavaConfig.from_dict({**values}).to_dict()
        assert comparable(llava.read_config(values)) == comparable(llava.read_config(theirs))


def test_llava_7b_name_by_name():
    text = {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    config = transformers.LlavaConfig(text_config=text)
    with torch.device("meta"):
        theirs = transformers.LlavaForConditionalGeneration(config)
    ours = empty_model(LLaVA, llava.read_config({"text_config": text}))
    state, rows = ours.state_dict(keep_vars=True), llava.rows(ours.config)
    names.to_ours(theirs.state_dict(), state, rows, "7b")  # raises unless every name and shape agrees
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 7_063_427_072
    written = names.to_theirs(state, rows)
    published = [name for name in written if ".layers." not in name]
    assert published == [
        *("vision_tower.vision_model.embeddings.class_embedding", "vision_tower.vision_model.embeddings.position_embedding.weight"),
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        *(f"vision_tower.vision_model.{n}.{k}" for n in ("pre_layrnorm", "post_layernorm") for k in ("weight", "bias")),
        *(f"multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")),
        *("language_model.model.embed_tokens.weight", "language_model.model.norm.weight", "language_model.lm_head.weight"),
    ]  # fmt: skip


def test_the_processor_reaches_transformers(tmp_path, images):
    """Prompt and pixels of ours are those of AutoProcessor, from files that we wrote."""
    tokenizer = llama_tokenizer("<image>", "<pad>")
    mark = tokenizer.token_to_id("<image>")
    language = LanguageModelConfig(
        width=24,
        depth=1,
        heads=4,
        vocab_size=320,
        context=64,
        positions="none",
        rope_theta=1e4,
        norm="rmsnorm",
        gated_mlp=True,
        activation="silu",
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tie_head=False,
        end_tokens=(2,),
        pad_token=mark + 1,
    )
    vision = VisionConfig(width=20, depth=2, heads=2, image_size=24, patch_size=8, activation="quick_gelu")
    config = LLaVAConfig(vision=vision, language=language, image_token=mark)
    about = ProcessorConfig(
        image_size=24,
        resize_to=24,
        context=64,
        pad_token="<pad>",
        image_tokens=9,
        chat="vicuna",
        image_token="<image>",
        answer_end=2,
    )
    ours = Processor(tokenizer, about)
    LLaVA(config).save_pretrained(tmp_path, processor=ours, layout="hf")
    back, processor = minivlm.load(tmp_path)
    assert comparable(back.config) == comparable(config) and processor.config == about
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "LlavaProcessor"
    theirs.image_processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (30, 41, 3), dtype=np.uint8)
    batch = theirs(images=[picture], text="USER: <image>\nthe cat? ASSISTANT:", return_tensors="pt")
    prompt = encode_conversation([Turn("user", "<image>\nthe cat?")], processor, images=1, prompt=True)
    assert prompt.tokens == batch["input_ids"][0].tolist()
    assert torch.equal(processor.images([picture]), batch["pixel_values"])
    assert theirs.tokenizer.pad_token_id == processor.pad_token == mark + 1
    assert theirs.tokenizer.eos_token_id == 2
