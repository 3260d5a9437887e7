"""Training from weights in half precision: what learns is held in fp32, and left in the precision that was stored."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minivlm
import train
from minivlm.evaluate import Score
from minivlm.layers.lora import LoRAConfig, add_lora, lora_parameters
from minivlm.precision import as_stored, hold_for_training
from minivlm.recipes.job import Job
from tests import test_train_blip, test_train_blip2, test_train_fusion
from tests.speakers import flamingo, llava
from tests.test_train_blip2 import bases, losses, world  # noqa: F401
from tests.test_train_captioner import SHORT, arguments, weights
from tests.test_train_flamingo import RESAMPLER

SLOW = SHORT | {"optimiser.learning_rate": 2e-5, "optimiser.warmup": 1, "optimiser.weight_decay": 0.0, "steps": 2}
SLOW |= {"save_every": 2}
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def dtypes(directory: Path) -> set[torch.dtype]:
    return {t.dtype for t in weights(directory).values() if t.is_floating_point()}


@pytest.fixture(scope="module", params=HALF)
def half(request, bases, tmp_path_factory):  # noqa: F811
    """Eyes and language models in half precision, as published ones are."""
    out = tmp_path_factory.mktemp(request.param)
    for name in ("clip", "lm", "t5"):
        model, processor = minivlm.load(bases / name, dtype=HALF[request.param])
        model.save_pretrained(out / name, processor=processor)
    return request.param, out


@pytest.fixture(scope="module")
def aligned(half, world):  # noqa: F811
    """A LLaVA after stage 1, in half precision."""
    _, out = half
    given = {"data": world, "vision_from": out / "clip", "language_from": out / "lm", "out": out / "stage1"}
    train.main(arguments("llava-stage1", **SLOW | given))
    return half


@pytest.fixture
def unjudged(monkeypatch):
    """Neither a validation nor an evaluation: another test's business."""
    monkeypatch.setattr(Job, "validate", lambda job: 0.5)
    monkeypatch.setattr(Job, "evaluate", lambda job: {"a score": Score(0.5, 0.1)})
    monkeypatch.setattr(Job, "figure", lambda job, path: None)


def moved(directory: Path, before: dict[str, torch.Tensor]) -> float:
    """Of the numbers that learn, the share that is another after training."""
    after = weights(directory / "checkpoints/step-000002")
    trained = load_file(directory / "checkpoints/step-000002/training.safetensors")
    names = {k.removeprefix("optimiser.").removesuffix(".exp_avg") for k in trained if k.endswith("exp_avg")}
    assert names and all(after[name].dtype == torch.float32 for name in names)
    counted = [(after[n] != before[n].float())[trained[f"optimiser.{n}.exp_avg"] != 0] for n in names & before.keys()]
    return torch.cat(counted).float().mean().item()


def test_what_was_put_together_of_halves_is_left_so(aligned):
    kind, out = aligned
    assert dtypes(out / "stage1") == {HALF[kind]}
    assert minivlm.load(out / "stage1")[0].dtype == HALF[kind]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_llava_in_half_precision_learns_at_small_rates(aligned, world, precision, tmp_path, unjudged):  # noqa: F811
    kind, out = aligned
    options = SLOW | {"precision": precision, "data": world, "starts_from": out / "stage1", "out": tmp_path / "llava"}
    train.main(arguments("llava", **options))
    assert moved(tmp_path / "llava", weights(out / "stage1")) > 0.95
    assert dtypes(tmp_path / "llava") == {HALF[kind]}


def test_adapters_on_a_half_learn_in_fp32_and_are_merged_into_it(aligned, world, tmp_path, unjudged):  # noqa: F811
    kind, out = aligned
    options = SLOW | {"lora.rank": 2, "precision": "bf16", "data": world, "starts_from": out / "stage1"}
    train.main(arguments("llava", **options, out=tmp_path))
    adapter = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {t.dtype for name, t in adapter.items() if "lora_" in name} == {torch.float32}
    assert dtypes(tmp_path) == {HALF[kind]}


def test_a_run_in_half_precision_goes_on_as_if_it_had_not_been_stopped(half, world, tmp_path, unjudged):  # noqa: F811
    _, out = half
    given = {"data": world, "vision_from": out / "clip", "language_from": out / "lm", "precision": "bf16"}
    options = SLOW | RESAMPLER | given | {"save_every": 1, "data.lessons": 0.0}
    train.main(arguments("flamingo", **options, out=tmp_path / "whole"))
    train.main(arguments("flamingo", **options, out=tmp_path / "parts", stop_at=1))
    train.main(["flamingo", "--out", str(tmp_path / "parts"), "--resume", "--device", "cpu", "--precision", "bf16"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


SEEING = {  # recipe → its sizes, for those that see with a tower in half precision
    **{name: test_train_fusion.SIZES[name] for name in ("visualbert", "uniter", "vilbert", "vqa", "multitask")},
    "blip": test_train_blip.SIZES | {"model.momentum.queue": 16},
    "blip2-stage1": test_train_blip2.QFORMER | {"model.embed_width": 8},
}


@pytest.mark.parametrize("half", ["fp16"], indirect=True)
@pytest.mark.parametrize("recipe", SEEING)
def test_every_recipe_learns_from_halves(recipe, half, world, tmp_path):  # noqa: F811
    _, out = half
    given = {"data": world, "vision_from": out / "clip", "out": tmp_path, "precision": "bf16"}
    train.main(arguments(recipe, **SLOW | SEEING[recipe] | given))
    held = {t.dtype for t in load_file(tmp_path / "checkpoints/step-000002/training.safetensors").values()}
    assert torch.float32 in held and not held & set(HALF.values())  # moments
    assert len(dtypes(tmp_path)) == 1  # most numbers are new in some, and stored in others
    minivlm.load(tmp_path)


@pytest.mark.parametrize(("lm", "half"), [("lm", "bf16"), ("t5", "fp16")], indirect=["half"])
def test_both_stages_of_blip2_learn_from_halves(lm, half, world, tmp_path):  # noqa: F811
    kind, out = half
    given = {"data": world, "vision_from": out / "clip", "precision": "bf16"}
    train.main(arguments("blip2-stage1", **SLOW | SEEING["blip2-stage1"] | given, out=tmp_path / "stage1"))
    model, processor = minivlm.load(tmp_path / "stage1", dtype=HALF[kind])
    model.save_pretrained(tmp_path / "half", processor=processor)
    given = {"data": world, "starts_from": tmp_path / "half", "language_from": out / lm, "lm": lm, "precision": "bf16"}
    train.main(arguments("blip2", **SLOW | given, out=tmp_path / "stage2"))
    stored = dtypes(tmp_path / "stage2")
    assert stored <= {HALF[kind], torch.float32} and HALF[kind] in stored  # a T5 keeps some in fp32 in fp16


# ---- the parts by themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llava, flamingo])
@pytest.mark.parametrize("kind", HALF)
def test_a_frozen_half_computes_what_it_would_in_fp32(make, kind):
    one, other = make().to(HALF[kind]), make().to(HALF[kind])
    for model in (one, other):
        model.freeze("vision", "language_model")
    hold_for_training(one, torch.bfloat16)
    hold_for_training(other, torch.float32)
    frozen = {p.dtype for p in one.language_model.parameters() if p.ndim > 1}
    assert torch.bfloat16 in frozen and {p.dtype for p in other.parameters()} == {torch.float32}
    marks = [one.config.image_token] * one.config.image_tokens
    tokens = torch.tensor([[*(marks if make is llava else marks[:1]), 5, 6, 7]])
    given = dict(images=torch.randn(1, 3, 16, 16), tokens=tokens, labels=tokens)
    with torch.autocast("cpu", torch.bfloat16):
        results = [model.losses(**given)["next token"] for model in (one, other)]
    assert torch.equal(*results)
    with as_stored(one):
        assert {p.dtype for p in one.parameters()} == {HALF[kind]}
    assert {p.dtype for p in one.parameters() if p.requires_grad} == {torch.float32}


def test_lora_on_a_half_learns_without_autocast_too():
    model = llava().to(torch.bfloat16)
    add_lora(model.language_model, LoRAConfig(rank=2))
    tokens = torch.tensor([[5, 6, 7, 8]])
    loss = model.language_model(tokens, labels=tokens).loss
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in lora_parameters(model))
