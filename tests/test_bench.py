"""The contest: turns, memory, a peer that is not there. What it measures is for a quiet machine, not for a test."""

import argparse
import time

import pytest

from minivlm import bench


def sleeper(seconds):
    return lambda: time.sleep(seconds) or seconds


def hoarder(megabytes):
    kept = []

    def step():
        kept.append(b"x" * (megabytes * 2**20)) if not kept else None
        return 0.0

    return step


def absent():
    raise ImportError("not here", name="some_peer")


def test_peers_take_turns_and_ratios_are_of_medians(capsys):
    rows = bench.compare({"minivlm": (sleeper, (0.002,)), "slow": (sleeper, (0.008,)), "gone": (absent, ())}, 3, 0.05)
    assert rows.keys() == {"minivlm", "slow"} and rows["slow"]["value"] == 0.008
    assert 2 < rows["slow"]["median"] / rows["minivlm"]["median"] < 6
    bench.print_ratios(rows)
    said = capsys.readouterr().out
    assert "gone" in said and "not installed (some_peer)" in said and "of the fastest other, slow" in said


@pytest.mark.skipif(not bench.STATUS.exists(), reason="memory is told by /proc, which this system has not")
def test_each_peers_memory_is_its_own():
    rows = bench.compare({"small": (hoarder, (1,)), "large": (hoarder, (120,))}, 1, 0.01)
    assert rows["large"]["memory"] - rows["small"]["memory"] > 80 * 2**20


def test_the_loss_bench_runs_and_agrees_with_the_plain_loss(capsys):
    from minivlm.losses import softmax_loss

    bench.bench_loss(argparse.Namespace(batch=256, rounds=1))
    images, texts, scale = bench.loss_inputs(256)
    assert f"loss {softmax_loss(images, texts, scale).item():.4f}" in capsys.readouterr().out


def test_flops_of_vit_b32_are_those_of_the_literature():
    """4.4 GMAC for ViT-B/32's image tower (Radford et al. 2021): a step is six times that, and the text tower's."""
    size = dict(bench.SIZES["ViT-B/32"], text=(512, 0, 8), batch=1)
    assert bench.clip_flops(size) / 6 == pytest.approx(4.4e9, rel=0.02)
