"""peft on every family of transformers' models: adapters it made are read here, merged on both sides, and every weight is
compared, whatever peft was told; and what train.py leaves is read by peft."""

import json

import pytest
import torch

import minivlm
import train
from minivlm.layers import TextConfig, VisionConfig
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.lora import merge_lora
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
peft = pytest.importorskip("peft", reason="peft is not installed (tests/requirements.txt)")

from tests.parity import (  # noqa: E402  (they need transformers)
    test_parity_align,
    test_parity_bert,
    test_parity_blip,
    test_parity_blip2,
    test_parity_hf_clip,
    test_parity_idefics,
    test_parity_language,
    test_parity_llava,
    test_parity_mpt,
    test_parity_siglip,
    test_parity_t5,
    test_parity_visualbert,
)
from tests.test_train_blip2 import world  # noqa: E402, F401
from tests.test_train_captioner import SHORT, arguments  # noqa: E402

language = lambda name: test_parity_language.reference(*test_parity_language.VARIANTS[name])
BLIP = ["query", "value", "qkv", "vision_model.encoder.layers.0.mlp.fc1"]
FAMILIES = {
    "align": (lambda: test_parity_align.reference({}), ["query", "output.dense", "text_projection"]),
    "bert": (lambda: test_parity_bert.reference("BertModel"), ["query", "intermediate.dense"]),
    "blip caption": (lambda: test_parity_blip.reference("caption", {}, {}), BLIP),
    "blip answer": (lambda: test_parity_blip.reference("answer", {}, {}), BLIP),
    "blip match": (lambda: test_parity_blip.reference("match", {}, {}), [*BLIP, "itm_head"]),
    "blip-2 opt": (lambda: blip2("opt"), ["q_proj", "query", "qkv", "language_projection"]),
    "blip-2 t5": (lambda: blip2("t5"), ["q", "wo", "value", "fc2"]),
    "blip-2 itm": (lambda: test_parity_blip2.itm_reference(), ["query", "qkv"]),
    "clip": (lambda: test_parity_hf_clip.reference({}), ["q_proj", "fc1", "visual_projection"]),
    "gpt2": (lambda: language("gpt2"), ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": (lambda: language("pythia"), ["query_key_value", "dense_4h_to_h"]),
    "idefics": (lambda: test_parity_idefics.reference({}), ["q_proj", "k_proj", "down_proj"]),
    "llama": (lambda: language("llama"), ["q_proj", "o_proj", "gate_proj"]),
    "llava": (lambda: test_parity_llava.reference({}, {}, {}), ["q_proj", "out_proj", "linear_1"]),
    "mpt": (lambda: test_parity_mpt.reference({}), ["Wqkv", "up_proj"]),
    "opt": (lambda: language("opt"), ["v_proj", "fc2"]),
    "qwen2": (lambda: language("qwen2"), ["q_proj", "down_proj"]),
    "siglip": (lambda: test_parity_siglip.reference({}), ["q_proj", "fc2"]),
    "t5": (lambda: test_parity_t5.reference(test_parity_t5.FIRST), ["q", "wi"]),
    "visualbert": (lambda: test_parity_visualbert.reference(), ["query", "visual_projection"]),
}


def blip2(language):
    return test_parity_blip2.reference(*next(v for n, v in test_parity_blip2.VARIANTS.items() if language in n.lower()))


def moved(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def compare(theirs, tmp_path, close, **options):
    """Every weight of the base with the adapter in it, here and there."""
    theirs.save_pretrained(tmp_path / "base")
    before, _ = minivlm.load(tmp_path / "base")
    adapted = moved(peft.get_peft_model(theirs, peft.LoraConfig(**options)))
    adapted.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    ours, _ = minivlm.load(tmp_path / "adapter")
    merge_lora(ours)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    expected = minivlm.load(tmp_path / "merged")[0].state_dict()
    changed = 0
    for name, tensor in ours.state_dict().items():
        close(tensor, expected[name])
        changed += not torch.equal(tensor, before.state_dict()[name])
    assert changed > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_for_every_family(family, tmp_path, close):
    make, targets = FAMILIES[family]
    compare(make(), tmp_path, close, r=3, lora_alpha=5, target_modules=targets)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(q_proj|fc1)"},
        {"target_modules": ["q_proj", "fc1"], "use_rslora": True},
        {"target_modules": ["q_proj", "fc1"], "rank_pattern": {"fc1": 2, "^text_model.*q_proj": 5}, "r": 3},
        {
            "target_modules": ["q_proj", "fc1"],
            "alpha_pattern": {"text_model.encoder.layers.0.mlp.fc1": 9},
            "use_rslora": True,
        },
        {"target_modules": ["q_proj", "fc1"], "alpha_pattern": {"fc1": 9}, "rank_pattern": {r"layers\.0\.mlp\.fc1": 4}},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*text_model.*"},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj"], "modules_to_save": ["visual_projection", "final_layer_norm"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.2},
    ],
    ids=str,
)
def test_whatever_peft_was_told(options, tmp_path, close):
    compare(test_parity_hf_clip.reference({}), tmp_path, close, **{"r": 3, "lora_alpha": 5, **options})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["patch_embedding"]}, "patch_embedding.lora_A"),
        ({"target_modules": ["token_embedding"]}, "token_embedding.lora_embedding_A"),
        (
            {"target_modules": ["q_proj"], "trainable_token_indices": {"token_embedding": [3]}},
            "trainable_token_indices",
        ),
    ],
    ids=str,
)
def test_what_is_not_followed_is_refused_by_name(options, said, tmp_path, close):
    with pytest.raises(minivlm.errors.UserError, match=said):
        compare(test_parity_hf_clip.reference({}), tmp_path, close, **{"r": 3, "target_modules": ["q_proj"], **options})


# ---- what a recipe leaves --------------------------------------------------------------------------------------------


def test_peft_reads_what_train_py_leaves(world, tmp_path, close, images):  # noqa: F811
    words = Processor.train(["a red disc", "is there a blue ring?"], vocab_size=300, image_size=32, context=224)
    vision = VisionConfig(image_size=32, patch_size=16, width=12, depth=2, heads=2, activation="quick_gelu")
    text = TextConfig(width=16, depth=1, heads=2, vocab_size=words.vocab_size, context=8, end_token=words.end_token)
    CLIP(CLIPConfig(vision=vision, text=text, embed_width=16)).save_pretrained(tmp_path / "clip", processor=words)
    llama = LanguageModelConfig(
        **dict(width=16, depth=2, heads=2, vocab_size=words.vocab_size, context=224, end_tokens=(words.end_token,)),
        **dict(positions="none", norm="rmsnorm", activation="silu", gated_mlp=True, rope_theta=1e4, tie_head=False),
        **dict(qkv_bias=False, out_bias=False, mlp_bias=False, pad_token=words.pad_token),
    )
    LanguageModel(llama).save_pretrained(tmp_path / "lm", processor=words)
    base = {"vision_from": tmp_path / "clip", "language_from": tmp_path / "lm"}
    train.main(arguments("llava-stage1", **SHORT | base, data=world, out=tmp_path / "stage1"))
    learnt = {"lora.rank": 8, "starts_from": tmp_path / "stage1", "out": tmp_path / "llava"}
    train.main(arguments("llava", **SHORT | learnt, data=world))

    model, processor = minivlm.load(tmp_path / "stage1")
    model.save_pretrained(tmp_path / "published", processor=processor, layout="hf")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "published").eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "llava/adapter").eval()
    ours, _ = minivlm.load(tmp_path / "llava/adapter")
    tokens = torch.tensor([[model.config.image_token] * model.config.image_tokens + [5, 9, 6, 7]])
    pixels = images(1, 32)
    with torch.no_grad():
        got = ours(pixels, tokens).logits
        close(got, theirs(input_ids=tokens, pixel_values=pixels).logits)
        assert (got - model(pixels, tokens).logits).abs().max() > 1e-3
    again, _ = minivlm.load(tmp_path / "llava")  # merged
    close(again(pixels, tokens).logits, got)
