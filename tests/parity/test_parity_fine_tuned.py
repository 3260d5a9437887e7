"""What was fine-tuned from a published model goes back to transformers: trained here, with and without LoRA, saved in its
layout, loaded there, with equal numbers in the precision in which it came."""

from types import SimpleNamespace

import pytest
import torch

import minivlm
from minivlm.layers.lora import LoRAConfig, add_lora, lora_parameters, merge_lora
from minivlm.precision import cast, hold_for_training

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

import test_parity_bert  # noqa: E402  the same small models, and the same comparisons
import test_parity_blip  # noqa: E402
import test_parity_blip2  # noqa: E402
import test_parity_hf_clip  # noqa: E402
import test_parity_language  # noqa: E402
import test_parity_llava  # noqa: E402
import test_parity_siglip  # noqa: E402
import test_parity_t5  # noqa: E402


def family(module, *how, part="", images=True, roles=()):
    """How a published model is made, compared, and trained; part: where LoRA goes."""

    def compare(ours, theirs, pixels, close):
        module.compare(*roles, ours, theirs, *([pixels] if images else []), close)

    return SimpleNamespace(make=lambda: module.reference(*how), compare=compare, part=part, images=images)


FAMILIES = {
    "CLIP": family(test_parity_hf_clip, {}, part="text"),
    "SigLIP": family(test_parity_siglip, {}, part="vision"),
    "BLIP that captions": family(test_parity_blip, "caption", {}, {}, part="decoder", roles=("caption",)),
    "BLIP that matches": family(test_parity_blip, "match", {}, {}, part="encoder", roles=("match",)),
    "BLIP-2 with OPT": family(test_parity_blip2, test_parity_blip2.OPT, {}, {}, {}, part="language_model"),
    "BLIP-2 with T5": family(test_parity_blip2, test_parity_blip2.T5, {}, {}, {}, part="language_model"),
    "LLaVA": family(test_parity_llava, {}, {}, {}, part="language_model"),
    "LLaMA": family(test_parity_language, *test_parity_language.VARIANTS["SmolLM2"], images=False),
    "GPT-2": family(test_parity_language, *test_parity_language.VARIANTS["gpt2"], images=False),
    "OPT": family(test_parity_language, *test_parity_language.VARIANTS["opt-350m"], images=False),
    "T5": family(test_parity_t5, test_parity_t5.FLAN, images=False),
    "BERT": family(test_parity_bert, "BertModel", images=False),
}


def train(model, part, *, lora):
    """Two steps at a high rate that move whatever learns; the model is left in the precision in which it came."""
    if lora:
        model.requires_grad_(False)
        add_lora(model.get_submodule(part), LoRAConfig(rank=2), generator=torch.Generator().manual_seed(0))
    hold_for_training(model, torch.float32)
    learning = lora_parameters(model) if lora else [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in learning} == {torch.float32}
    for step in range(2):  # gradients of any loss would do
        torch.manual_seed(step)
        for p in learning:
            p.grad = torch.randn_like(p)
        torch.optim.AdamW(learning, lr=0.02).step()
    merge_lora(model)
    cast(model, model.stored)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("one", FAMILIES.values(), ids=FAMILIES)
def test_what_was_fine_tuned_gives_the_same_numbers_in_transformers(one, lora, tmp_path, images, close):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if lora else torch.float32
    theirs = one.make().to(dtype)
    theirs.save_pretrained(tmp_path / "hub")
    model, _ = minivlm.load(tmp_path / "hub")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, one.part, lora=lora)
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert moved and all(one.part in name for name in moved if lora)

    model.eval().save_pretrained(tmp_path / "tuned", layout="hf")
    back, info = type(theirs).from_pretrained(tmp_path / "tuned", output_loading_info=True, dtype=torch.float32)
    assert not [name for name in info["missing_keys"] if "pooler" not in name]  # of BERT, whose pooler is not read
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(theirs.config).from_pretrained(tmp_path / "tuned").dtype == dtype
    ours, _ = minivlm.load(tmp_path / "tuned")
    assert ours.dtype == dtype
    one.compare(minivlm.load(tmp_path / "tuned", dtype=torch.float32)[0], back.eval(), images, close)
