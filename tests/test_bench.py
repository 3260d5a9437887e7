"""The contest: turns, memory, a peer that is not there. What it measures is for a quiet machine, not for a test."""

import argparse
import time

import pytest
import torch

from minivlm.bench import clip, contest, generation, llava, loss, main
from minivlm.errors import UserError
from minivlm.layers import LanguageModelConfig, VisionConfig
from minivlm.losses import next_token_loss
from minivlm.models.llava import LLaVA, LLaVAConfig


def sleeper(seconds):
    return lambda: time.sleep(seconds) or seconds


def counter():
    numbers = iter(range(100))
    return lambda: next(numbers)


def hoarder(megabytes):
    kept = []

    def step():
        kept.append(b"x" * (megabytes * 2**20)) if not kept else None
        return 0.0

    return step


def absent():
    raise ImportError("not here", name="some_peer")


def test_peers_take_turns_and_ratios_are_of_medians(capsys):
    peers = {"minivlm": (sleeper, (0.002,)), "slow": (sleeper, (0.008,)), "gone": (absent, ())}
    rows = contest.compare(peers, 3, 0.05)
    assert rows.keys() == {"minivlm", "slow"} and rows["slow"]["value"] == 0.008
    assert 2 < rows["slow"]["median"] / rows["minivlm"]["median"] < 6
    contest.print_ratios({name: row["median"] for name, row in rows.items()}, "a nap")
    said = capsys.readouterr().out
    assert "gone" in said and "not installed (some_peer)" in said and "of the fastest other, slow" in said
    assert "a nap: minivlm takes 1/" in said


def test_a_turn_of_no_seconds_is_one_call_and_every_value_is_told():
    [row] = contest.compare({"counter": (counter, ())}, 3, 0.0).values()
    assert row["values"] == (1, 2, 3) and row["value"] == 3  # 0 was the call that warms up


@pytest.mark.skipif(not contest.STATUS.exists(), reason="memory is told by /proc, which this system has not")
def test_each_peers_memory_is_its_own():
    rows = contest.compare({"small": (hoarder, (1,)), "large": (hoarder, (120,))}, 1, 0.01)
    assert rows["large"]["memory"] - rows["small"]["memory"] > 80 * 2**20


def test_the_loss_bench_runs_and_agrees_with_the_plain_loss(capsys):
    from minivlm.losses import softmax_loss

    loss.bench_loss(argparse.Namespace(batch=256, rounds=1))
    images, texts, scale = loss.loss_inputs(256)
    assert f"loss {softmax_loss(images, texts, scale).item():.4f}" in capsys.readouterr().out


def test_flops_of_vit_b32_are_those_of_the_literature():
    """4.4 GMAC for ViT-B/32's image tower (Radford et al. 2021): a step is six times that, and the text tower's."""
    size = dict(clip.SIZES["ViT-B/32"], text=(512, 0, 8), batch=1)
    assert clip.clip_flops(size) / 6 == pytest.approx(4.4e9, rel=0.02)


@pytest.mark.parametrize("option", ["rounds", "batch"])
def test_nothing_to_measure(option):
    with pytest.raises(UserError, match=f"--{option} is 0; at least one is needed"):
        main(["decode", f"--{option}", "0"])


class TestLLaVA:
    """Our contestant of both benches, on a thin model that has the prompts' sizes."""

    @pytest.fixture
    def directory(self, tmp_path):
        torch.manual_seed(0)
        vision = VisionConfig(width=8, depth=2, heads=2, image_size=224, patch_size=14)
        language = LanguageModelConfig(width=16, depth=2, heads=2, vocab_size=8000, context=400)
        LLaVA(LLaVAConfig(vision=vision, language=language, image_token=llava.IMAGE_TOKEN)).save_pretrained(tmp_path)
        return str(tmp_path)

    def test_generates_64_tokens_and_gives_the_seconds_they_took(self, directory):
        model = generation.load_minivlm(directory, torch.float32)
        speak = generation.generate_minivlm(directory, torch.float32, 2, "llava")
        start = time.perf_counter()
        spoken = speak()
        passed = time.perf_counter() - start
        images, tokens = llava.inputs(2, 32, 256)
        assert tokens.shape == (2, 288) and (tokens == llava.IMAGE_TOKEN).sum() == 2 * 256
        assert spoken["tokens"] == model.generate(images, tokens, max_new_tokens=64).tolist()
        assert 0.5 * passed < spoken["first"] + 63 * spoken["step"] < passed

    def test_learns_with_its_tower_frozen_from_the_words_alone(self, directory):
        model = generation.load_minivlm(directory, torch.float32)
        images, tokens, labels = llava.llava_inputs()
        assert (labels != -100).sum() == 8 * 64 and not (labels == llava.IMAGE_TOKEN).any()
        states = model.language_model.states(model.embed(images, tokens))
        expected = next_token_loss(states, labels, model.language_model.head.weight).item()
        step = llava.llava_minivlm(directory, "fp32")
        losses = [step() for _ in range(3)]
        assert losses[0] == pytest.approx(expected, rel=1e-5) and losses[2] < losses[1] < losses[0]

    def test_the_table(self, capsys):
        said = [[1] * 64]
        turn = lambda first, step, tokens: dict(first=first, step=step, tokens=tokens)
        rows = {
            "minivlm": dict(values=(turn(0.2, 0.01, said), turn(0.2, 0.01, said))),
            "transformers": dict(values=(turn(0.3, 0.02, said), turn(0.3, 0.02, [[2] * 4 + [1] * 60]))),
        }
        generation.print_generation(rows, 1)
        out = capsys.readouterr().out
        assert "a token: minivlm takes 1/2.00" in out and "the first token: minivlm takes 1/1.50" in out
        assert "60 of 64 tokens are those of transformers" in out and "100.0" in out


@pytest.mark.parametrize("kind", generation.PLACEHOLDERS)
def test_a_model_generates_the_same_in_transformers_and_here(kind, tmp_path):
    pytest.importorskip("transformers")
    thin = dict(width=64, depth=4, mlp_width=96)
    language = generation.LANGUAGE_MODELS.get(kind, generation.llama)(**thin)
    tower = (
        None
        if kind in generation.LANGUAGE_MODELS
        else generation.vision(
            width=24, depth=2, heads=2, patch_size=14 if kind == "llava" else 56, activation="quick_gelu"
        )
    )
    generation.build(kind, tower=tower, language=language).save_pretrained(tmp_path, layout="hf")
    options = (str(tmp_path), torch.float32, 2, kind)
    ours, theirs = generation.generate_minivlm(*options)(), generation.generate_transformers(*options, "sdpa")()
    assert ours["tokens"] == theirs["tokens"] and len(ours["tokens"][0]) == generation.NEW_TOKENS
    assert theirs["first"] > 0 and theirs["step"] > 0


def test_who_misses_transformers_is_told_how_to_get_it(capsys):
    assert contest.compare({"transformers": (absent, ())}, 1) == {}
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("transformers") and line.endswith("pip install -r tests/requirements.txt")
