import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minivlm import adapters
from minivlm.adapters import load_adapter, save_adapter
from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import LanguageModel, LanguageModelConfig, VisionConfig
from minivlm.layers.lora import LoRAConfig, add_lora, lora_layers, lora_parameters, merge_lora
from minivlm.models.llava import LLaVA, LLaVAConfig
from minivlm.pretrained.names import table, under
from minivlm.testing import assert_same

LANGUAGE = LanguageModelConfig(width=16, depth=2, heads=2, kv_heads=1, vocab_size=30, context=32)
VISION = VisionConfig(width=16, depth=1, heads=2, image_size=16, patch_size=8)
LORA = LoRAConfig(rank=3, alpha=7.0, dropout=0.25, targets=("out_proj", "q_proj"))
TOKENS = torch.arange(18).view(2, 9)

BLOCKS = table("""
    layers.*.self_attn.o_proj    transformer.blocks.*.attention.out_proj
    layers.*.self_attn           transformer.blocks.*.attention
    layers.*                     transformer.blocks.*
    embed_tokens                 token_embedding
    embed_positions              position_embedding
    norm                         norm
""")
HEAD = table("lm_head  head")
SPLIT = under(BLOCKS, "model.", "") + HEAD
LLAVA = adapters.modern(
    [
        *under(BLOCKS, "language_model.model.", "language_model."),
        *under(HEAD, "language_model.", "language_model."),
        *table("""
        multi_modal_projector.linear_1      projector.up_proj
        multi_modal_projector.linear_2      projector.down_proj
        vision_tower                        vision
    """),
    ]
)
FUSED = [*table("transformer.h.*.attn.c_attn  transformer.blocks.*.attention.{q,k,v}_proj  transpose"), *SPLIT]


@pytest.fixture
def published(monkeypatch):
    """Gives every model the table."""
    return lambda rows: monkeypatch.setattr(adapters, "published_rows", lambda model: rows)


def adapted(config: LoRAConfig = LORA, *, language: LanguageModelConfig = LANGUAGE) -> LanguageModel:
    """As after some steps."""
    model = LanguageModel(language).eval()
    add_lora(model, config)
    return moved(model)


def moved(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, other = a.state_dict(), b.state_dict()
    return ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


def edit(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(directory, change):
    path = directory / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, SPLIT, FUSED], ids=["our names", "their names", "fused"])
def test_an_adapter_comes_back_as_it_was(rows, published, tmp_path):
    published(rows)
    model = adapted()
    save_adapter(tmp_path / "new", model, base="out/lm", config=LORA)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        *("adapter_config.json", "adapter_model.safetensors")
    ]
    back = LanguageModel(LANGUAGE).eval()
    assert load_adapter(tmp_path / "new", back, base="out/lm") == LORA
    assert same_state(back, model)
    assert {n for n, p in back.named_parameters() if p.requires_grad} == {
        *(n for n, p in model.named_parameters() if p.requires_grad)
    }
    assert_same(back(TOKENS).logits, model(TOKENS).logits, tolerance=0.0)


def test_the_file_is_peft_s(published, tmp_path):
    published(SPLIT)
    model = adapted()
    save_adapter(tmp_path, model, base="some/llama", config=LORA)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/llama",
        "r": 3,
        "lora_alpha": 7,
        "lora_dropout": 0.25,
        "target_modules": ["o_proj", "q_proj"],
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.model.layers.{i}.self_attn.{name}.lora_{part}.weight"
        for i in range(2)
        for name in ("q_proj", "o_proj")
        for part in "AB"
    }
    layer = model.transformer.blocks[1].attention.out_proj
    name = "base_model.model.model.layers.1.self_attn.o_proj"
    assert_same(tensors[f"{name}.lora_A.weight"], layer.lora_a.weight, tolerance=0.0)
    assert_same(tensors[f"{name}.lora_B.weight"], layer.lora_b.weight, tolerance=0.0)


def test_an_adapter_on_another_one_replaces_it(tmp_path):
    first, second = adapted(), adapted(replace(LORA, rank=2, targets=("q_proj",)))
    save_adapter(tmp_path, second, base="out/lm", config=replace(LORA, rank=2))
    assert load_adapter(tmp_path, first) == replace(LORA, rank=2, targets=("q_proj",))
    assert same_state(first, second)


def test_a_loaded_adapter_can_be_merged_and_trained_on(tmp_path):
    model = adapted()
    save_adapter(tmp_path, model, base="out/lm", config=LORA)
    back = LanguageModel(LANGUAGE).eval()
    load_adapter(tmp_path, back)
    back.losses(TOKENS, TOKENS)["next token"].backward()
    assert all(p.grad.any() for p in lora_parameters(back))
    merge_lora(back)
    assert_same(back(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("rows", [None, LLAVA], ids=["our names", "their names"])
def test_llava_takes_its_projector_along(rows, published, tmp_path):
    published(rows)
    config = LLaVAConfig(vision=VISION, language=LANGUAGE, image_token=29)
    base = LLaVA(config).eval()
    model = deepcopy(base)
    model.vision.requires_grad_(False)
    add_lora(model.language_model, LORA)
    moved(model)
    save_adapter(tmp_path, model, base="out/llava", config=LORA)
    back = deepcopy(base)
    assert load_adapter(tmp_path, back) == LORA
    assert same_state(back, model)
    save(tmp_path / "whole", back)
    assert same_state(load(tmp_path / "whole")[0], model)
    asks = {name.partition(".")[0] for name, p in back.named_parameters() if p.requires_grad}
    assert asks == {"projector", "language_model"}
    if rows is not None:
        values = json.loads((tmp_path / "adapter_config.json").read_text())
        assert values["modules_to_save"] == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
        assert values["target_modules"] == [  # the vision tower has a q_proj as well
            f"model.language_model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("o_proj", "q_proj")
        ]
        rewrite(tmp_path, lambda tensors: {old_name(name): t for name, t in tensors.items()})
        again = deepcopy(base)
        load_adapter(tmp_path, again)
        assert same_state(again, model)


def old_name(name: str) -> str:
    """As peft wrote it beside transformers before 4.52."""
    return name.replace("model.model.language_model", "model.language_model.model").replace("model.model.m", "model.m")


def test_a_fused_layer_that_peft_adapted(published, tmp_path):
    """One A for query, key and value; each has its own rows of B. What is fused there cannot be written, but read."""
    published(FUSED)
    language = replace(LANGUAGE, kv_heads=None)
    save_adapter(tmp_path, adapted(language=language), base="gpt2", config=LORA)
    a, b = torch.randn(2, 3, 16), torch.randn(2, 48, 3)
    names = [f"base_model.model.transformer.h.{i}.attn.c_attn.lora_" for i in (0, 1)]
    rewrite(
        tmp_path,
        lambda _: {f"{n}{part}.weight": t[i].clone() for i, n in enumerate(names) for part, t in (("A", a), ("B", b))},
    )
    edit(tmp_path, target_modules=["c_attn"], fan_in_fan_out=True)
    model, base = LanguageModel(language), LanguageModel(language)
    assert load_adapter(tmp_path, model).targets == ("k_proj", "q_proj", "v_proj")
    for i, block in enumerate(model.transformer.blocks):
        parts = [block.attention.q_proj, block.attention.k_proj, block.attention.v_proj]
        before = base.transformer.blocks[i].attention
        plain = torch.cat([before.q_proj.weight, before.k_proj.weight, before.v_proj.weight])
        assert_same(torch.cat([p.weight for p in parts]), plain + 7 / 3 * b[i] @ a[i])


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    save_adapter(tmp_path, adapted(), base="out/lm", config=LORA)
    return tmp_path


def refused(directory, match, *, model=None, **options):
    """And the model is left as it is."""
    model = model or LanguageModel(LANGUAGE)
    before = deepcopy(model)
    with pytest.raises(UserError, match=match) as error:
        load_adapter(directory, model, **options)
    assert str(error.value).count("\n") == 0 and str(error.value).endswith(".")
    assert same_state(model, before) and all(p.requires_grad for p in model.parameters())


def test_a_base_that_is_smaller(saved):
    model = LanguageModel(replace(LANGUAGE, depth=1))
    refused(saved, r"does not fit this model: .* 4 unknown here \(transformer.blocks.1.attention", model=model)


def test_a_base_that_is_deeper(saved):
    model = LanguageModel(replace(LANGUAGE, depth=3))
    refused(saved, r"4 missing \(transformer.blocks.2.attention.q_proj.lora_A.weight, ", model=model)


def test_a_base_that_is_wider(saved):
    model = LanguageModel(replace(LANGUAGE, width=24))
    refused(saved, r"8 of another shape \(.*q_proj.lora_A.weight is \(3, 16\) instead of \(3, 24\)", model=model)


def test_a_base_of_another_name(saved):
    refused(saved, "is an adapter for out/lm, not for out/clip", base="out/clip")
    load_adapter(saved, LanguageModel(LANGUAGE), base="/elsewhere/lm")


def test_half_an_adapter(saved):
    rewrite(saved, lambda tensors: {name: t for name, t in tensors.items() if "1.attention.q_proj.lora_B" not in name})
    refused(saved, r"1 missing \(transformer.blocks.1.attention.q_proj.lora_B")
    edit(saved, layers_to_transform=[0])  # so that nothing is promised for block 1, but half of it is there
    refused(saved, r"1 missing \(transformer.blocks.1.attention.q_proj.lora_B")


def test_a_tensor_of_another_kind(saved):
    name = "base_model.model.transformer.blocks.0.attention.q_proj.lora_magnitude_vector"
    rewrite(saved, lambda tensors: {**tensors, name: torch.ones(16)})
    refused(saved, r"1 unknown here \(transformer.blocks.0.attention.q_proj.lora_magnitude_vector\)")


def test_a_file_without_lora(saved):
    rewrite(saved, lambda tensors: {"base_model.model.norm.weight": torch.ones(16)})
    edit(saved, target_modules=[])
    refused(saved, "of its tensors, none is of LoRA")


def test_a_head_that_is_the_embedding(saved):
    tensors = {f"base_model.model.head.lora_{k}.weight": torch.ones(s) for k, s in {"A": (3, 16), "B": (30, 3)}.items()}
    rewrite(saved, lambda _: tensors)
    edit(saved, target_modules=["head"])
    refused(saved, r"1 for a weight that other modules share \(head\)")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; only LORA is supported"),
        ({"use_dora": True}, "asks for use_dora = 'True', which is not supported"),
        ({"lora_bias": True}, "asks for lora_bias = 'True'"),
        ({"target_parameters": ["a.b"]}, "asks for target_parameters"),
        ({"of_next_year": {"on": 1}}, "asks for of_next_year = .*on.*, which is not supported"),
        ({"bias": "all"}, "4 missing .*q_proj.bias"),
        ({"bias": "some"}, "bias is 'some', but must be one of none, all, lora_only"),
        ({"target_modules": "(q_proj"}, "target_modules is .* which is no pattern"),
        ({"target_modules": 7}, "target_modules is 7"),
        ({"alpha_pattern": {"((.*)*)*x": 4}}, "alpha_pattern has the pattern .* could take for ever"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern.q_proj is '4', but must be float"),
        ({"rank_pattern": [4]}, r"rank_pattern is \[4\], but must be an object"),
        (
            {"rank_pattern": {"q_proj": 2}},
            r"4 of another shape .*q_proj.lora_A.weight is \(3, 16\) instead of \(2, 16\)",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "asks for init_lora_weights = 'pissa_niter_4'"),
        ({"r": "8"}, "LoRA.rank is '8', but must be int"),
        ({"r": 0}, "LoRA.rank is 0, but must be at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(*value),
)
def test_a_config_that_asks_for_more(values, match, saved):
    edit(saved, **values)
    refused(saved, match)


def test_files_that_are_missing(saved):
    (saved / "adapter_model.safetensors").unlink()
    refused(saved, "adapter_model.safetensors or adapter_model.bin should be there")
    (saved / "adapter_config.json").unlink()
    refused(saved, "adapter_config.json is missing")


def test_only_layers_by_number(saved):
    """peft's layers_to_transform: the rest of the layers has no adapter, and that is right."""
    rewrite(saved, lambda tensors: {name: t for name, t in tensors.items() if "blocks.1." in name})
    edit(saved, layers_to_transform=[1])
    model = LanguageModel(LANGUAGE)
    load_adapter(saved, model)
    assert all(name.startswith("transformer.blocks.1.") for name in lora_layers(model)) and len(lora_layers(model)) == 2


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match=r"adapter_model.safetensors, adapter_config.json could not be written"):
        save_adapter(tmp_path / "file", adapted(), base="out/lm", config=LORA)


def test_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no LoRA layers of rank 3"):
        save_adapter(tmp_path, LanguageModel(LANGUAGE), base="out/lm", config=LORA)
    with pytest.raises(ValueError, match="no LoRA layers of rank 4"):
        save_adapter(tmp_path, adapted(), base="out/lm", config=replace(LORA, rank=4))
    with pytest.raises(ValueError, match="not made with alpha 5"):
        save_adapter(tmp_path, adapted(), base="out/lm", config=replace(LORA, alpha=5.0))
    assert not list(tmp_path.iterdir())


def test_what_is_frozen_stays_so_when_it_is_loaded(saved, tmp_path):
    """Of a model with LoRA in its config: a run that resumes must not train the base."""
    config = LLaVAConfig(vision=VISION, language=LANGUAGE, image_token=29, lora=LORA)
    LLaVA(config).save_pretrained(tmp_path / "whole")
    back, _ = load(tmp_path / "whole")
    learns = {name for name, p in back.language_model.named_parameters() if p.requires_grad}
    assert learns and all("lora_" in name for name in learns)
    model = LanguageModel(LANGUAGE)
    load_adapter(saved, model)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_pattern_that_would_take_for_ever_is_not_tried(saved):
    edit(saved, target_modules="((.*)*)*x")
    model = LanguageModel(LANGUAGE)
    load_adapter(saved, model)  # which layers, its tensors say
    assert len(lora_layers(model)) == 4


def test_what_trains_beside_lora_and_stands_in_two_places(tmp_path):
    tied = replace(LANGUAGE, tie_head=True)
    save_adapter(tmp_path, adapted(language=tied), base="out/lm", config=LORA)
    rewrite(tmp_path, lambda tensors: {**tensors, "base_model.model.token_embedding.weight": torch.ones(30, 16)})
    refused(tmp_path, r"1 for a weight that other modules share \(token_embedding.weight\)", model=LanguageModel(tied))


def test_a_model_whose_adapters_the_config_cannot_tell_is_not_saved_whole(tmp_path):
    with pytest.raises(UserError, match="call save_adapter, or merge_lora before"):
        save(tmp_path, adapted())
    assert not list(tmp_path.iterdir())
    model = LLaVA(LLaVAConfig(vision=VISION, language=LANGUAGE, image_token=29)).eval()
    save_adapter(tmp_path / "all", adapted(), base="x", config=LORA)
    add_lora(model, LORA)  # of the vision tower too
    save_adapter(tmp_path / "all", model, base="x", config=LORA)
    back = LLaVA(LLaVAConfig(vision=VISION, language=LANGUAGE, image_token=29)).eval()
    load_adapter(tmp_path / "all", back)
    assert back.config.lora is None
    with pytest.raises(UserError, match="merge_lora before"):
        save(tmp_path / "whole", back)
