"""Adapters against the `peft` library, in both directions: ours on its model, its on ours."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from minivlm import adapters
from minivlm.adapters import load_adapter, save_adapter
from minivlm.layers import LanguageModel, LanguageModelConfig, VisionConfig
from minivlm.layers.lora import LoRAConfig, add_lora, lora_layers
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.pretrained import hf_clip
from minivlm.pretrained.names import table, to_ours, under

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")
peft = pytest.importorskip("peft", reason="peft is not installed (tests/requirements.txt)")

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
VISION_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LANGUAGE = LanguageModelConfig(
    **dict(width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, vocab_size=40, context=32, positions="none"),
    **dict(norm="rmsnorm", activation="silu", gated_mlp=True, rope_theta=1e4, tie_head=False),
    **dict(qkv_bias=False, out_bias=False, mlp_bias=False),
)
VISION = VisionConfig(width=16, depth=2, heads=2, mlp_width=24, image_size=16, patch_size=8, activation="quick_gelu")
LLAVA = LLaVAConfig(vision=VISION, language=LANGUAGE, image_token=39)

DECODER = table("""
    embed_tokens                        token_embedding
    layers.*.input_layernorm            transformer.blocks.*.attention_norm
    layers.*.self_attn.o_proj           transformer.blocks.*.attention.out_proj
    layers.*.self_attn                  transformer.blocks.*.attention
    layers.*.post_attention_layernorm   transformer.blocks.*.mlp_norm
    layers.*.mlp                        transformer.blocks.*.mlp
    norm                                norm
""")
LLAMA_ROWS = under(DECODER, "model.", "") + table("lm_head  head")
LLAVA_ROWS = adapters.modern([
    *under(DECODER, "language_model.model.", "language_model."),
    *under(hf_clip.VISION, "vision_tower.", "vision."),
    *table("""
        lm_head                            language_model.head
        multi_modal_projector.linear_1     projector.up_proj
        multi_modal_projector.linear_2     projector.down_proj
    """),
])  # fmt: skip


@pytest.fixture(autouse=True)
def published(monkeypatch):
    rows = {LanguageModel: LLAMA_ROWS, LLaVA: LLAVA_ROWS}
    monkeypatch.setattr(adapters, "published_rows", lambda model: rows[type(model)])


def llama() -> nn.Module:
    return moved(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), 0.1).eval()


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES),
        vision_config=transformers.CLIPVisionConfig(**VISION_SIZES),
        image_token_index=39,
    )
    return moved(transformers.LlavaForConditionalGeneration(config), 0.1).eval()


def ours(theirs: nn.Module) -> nn.Module:
    if isinstance(theirs, transformers.LlamaForCausalLM):
        model, rows = LanguageModel(LANGUAGE), LLAMA_ROWS
    else:
        model, rows = LLaVA(LLAVA), LLAVA_ROWS
    model.load_state_dict(to_ours(theirs.state_dict(), model.state_dict(keep_vars=True), rows, "theirs"))
    return model.eval()


def moved(model: nn.Module, by: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))
    return model


def logits(model: nn.Module, images) -> torch.Tensor:
    """Of two texts, behind a picture (four patches) where the model sees."""
    torch.manual_seed(1)
    pixels, tokens = images(2, 16), torch.arange(2, 16).view(2, 7)
    behind = torch.cat([torch.full((2, 4), 39), tokens], dim=1)
    with torch.no_grad():
        match model:
            case LLaVA():
                return model(pixels, behind).logits
            case LanguageModel():
                return model(tokens).logits
        if isinstance(model.get_base_model(), transformers.LlamaForCausalLM):
            return model(input_ids=tokens).logits
        return model(input_ids=behind, pixel_values=pixels).logits


@pytest.fixture
def agree(images, close):
    """Asserts that our adapted model and theirs say the same, and something else than the base."""

    def check(model, theirs, base):
        numbers, before = logits(model, images), logits(base, images)
        close(numbers, logits(theirs, images))
        assert (numbers - before).abs().max() > 0.05 * before.abs().max()

    return check


@pytest.mark.parametrize(
    "config", [LoRAConfig(), LoRAConfig(rank=3, alpha=5.0, targets=("q_proj", "down_proj"))], ids=["attention", "MLP"]
)
def test_llama_ours_on_theirs(config, tmp_path, agree):
    theirs = llama()
    base, model = ours(theirs), ours(theirs)
    add_lora(model, config)
    moved(model)
    save_adapter(tmp_path, model, base="tiny-llama", config=config)
    agree(model, peft.PeftModel.from_pretrained(theirs, tmp_path).eval(), base)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], r".*\.0\.mlp\..*_proj", "all-linear"])
def test_llama_theirs_on_ours(targets, tmp_path, agree):
    theirs = llama()
    base, model = ours(theirs), ours(theirs)
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    theirs = moved(peft.get_peft_model(theirs, config)).eval()
    theirs.save_pretrained(tmp_path)
    loaded = load_adapter(tmp_path, model)
    assert (loaded.rank, loaded.alpha, loaded.dropout) == (3, 7.0, 0.1)
    assert len(lora_layers(model)) == sum(name.endswith("lora_A") for name, _ in theirs.named_modules()) > 0
    agree(model, theirs, base)


def test_llava_ours_on_theirs(tmp_path, agree):
    theirs = llava()
    base, model = ours(theirs), ours(theirs)
    model.vision.requires_grad_(False)
    add_lora(model.language_model, LoRAConfig())
    moved(model)  # the projector is trained as well
    save_adapter(tmp_path, model, base="tiny-llava", config=LoRAConfig())
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    adapted = [name for name, _ in theirs.named_modules() if name.endswith("lora_A")]
    assert len(adapted) == 8 and all("language_model" in name for name in adapted)  # not the vision tower's q_proj
    agree(model, theirs, base)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.q_proj"])
def test_llava_theirs_on_ours(targets, tmp_path, agree):
    """A list of names means the vision tower's layers as well."""
    theirs = llava()
    base, model = ours(theirs), ours(theirs)
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["multi_modal_projector"])
    theirs = moved(peft.get_peft_model(theirs, config)).eval()
    theirs.save_pretrained(tmp_path)
    load_adapter(tmp_path, model)
    assert model.projector.up_proj.weight.requires_grad
    agree(model, theirs, base)


def test_what_peft_writes_it_reads_from_us_again(tmp_path):
    theirs = llama()
    model = ours(theirs)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    moved(peft.get_peft_model(theirs, config)).save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(tmp_path / "theirs", model)
    save_adapter(tmp_path / "ours", model, base="tiny-llama", config=loaded)
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    given = peft.LoraConfig.from_pretrained(tmp_path / "theirs")
    written = peft.LoraConfig.from_pretrained(tmp_path / "ours")
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "bias", "init_lora_weights"):
        assert getattr(given, name) == getattr(written, name)
