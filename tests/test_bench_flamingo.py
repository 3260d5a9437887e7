"""The contestants of the Flamingo bench, thin and short."""

import pytest
import torch

from minivlm.bench import flamingo, generation
from minivlm.layers import LanguageModelConfig, VisionConfig


@pytest.fixture
def small(monkeypatch):
    sizes = dict(B=2, IMAGES=2, N=3, T=8, D=32, HEADS=2, DEPTH=1, LATENTS=4)
    for name, value in sizes.items():
        monkeypatch.setattr(flamingo, name, value)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_reaches_every_layer(small, precision, monkeypatch):
    seen = []
    zero = torch.nn.Module.zero_grad
    note = lambda layers, **how: (seen.append([p.grad for p in layers.parameters()]), zero(layers, **how))
    monkeypatch.setattr(torch.nn.ModuleList, "zero_grad", note)
    step = flamingo.layers_minivlm(precision)
    first = step()
    assert step() == pytest.approx(first) and len(seen) == 2
    assert all(grad is not None and grad.abs().sum() > 0 for grads in seen for grad in grads)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_theirs_runs_as_well(small, attention):
    pytest.importorskip("transformers")
    step = flamingo.layers_transformers("fp32", attention)
    assert step() == pytest.approx(step())


def test_who_is_not_there_is_told(small):
    pytest.importorskip("transformers")
    for build in (flamingo.layers_open_flamingo, flamingo.layers_flamingo_pytorch):
        try:
            step = build("fp32")
        except ImportError as error:
            assert error.name
        else:
            assert step() == pytest.approx(step())


def test_an_idefics_speaks_the_same_in_transformers_and_here(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    vision = VisionConfig(width=24, depth=1, heads=2, image_size=224, patch_size=56, activation="quick_gelu")
    llama = dict(rope_theta=1e4, positions="none", norm="rmsnorm", activation="silu", gated_mlp=True)
    bare = dict(qkv_bias=False, out_bias=False, mlp_bias=False)
    sizes = dict(width=32, depth=4, heads=2, mlp_width=48, vocab_size=generation.VOCABULARY, context=128)
    monkeypatch.setattr(flamingo.llava, "sizes", lambda: (vision, LanguageModelConfig(**sizes, **llama, **bare)))
    flamingo.save_model(str(tmp_path))
    ours = flamingo.speak_minivlm(str(tmp_path), torch.float32, 2)()
    theirs = flamingo.speak_transformers(str(tmp_path), torch.float32, 2, "sdpa")()
    assert ours["tokens"] == theirs["tokens"] and len(ours["tokens"][0]) == generation.NEW_TOKENS
    assert len({*map(tuple, ours["tokens"])}) == 2  # the pictures and words of the rows differ
