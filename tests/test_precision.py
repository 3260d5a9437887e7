"""A model is used in one precision, whatever its file has; fp16 gets what it has too little room for in fp32."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import minivlm
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.t5 import T5, T5Config
from minivlm.precision import cast, dtype_called, main_dtype

LM = LanguageModelConfig(width=16, depth=2, heads=2, vocab_size=50, context=20)
SPEAKER = T5Config(vocab_size=50, width=16, depth=2, heads=2, mlp_width=32, end_tokens=(1,))
TOKENS = torch.tensor([[5, 6, 7, 8]])
HALF = [torch.float16, torch.bfloat16]


def edit(directory, change, **config):
    """Every tensor t called n becomes change(n, t)."""
    path = directory / "model.safetensors"
    save_file({n: change(n, t) for n, t in load_file(path).items()}, path)
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | config))


def dtypes(model):
    return {p.dtype for p in model.parameters()}


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize(
    "wide", [lambda n, t: t.ndim < 2, lambda n, t: "embedding" in n, lambda n, t: n.startswith("norm")]
)
def test_a_file_of_two_precisions_is_used_in_that_of_most_numbers(half, wide, tmp_path):
    LanguageModel(LM, seed=1).save_pretrained(tmp_path)
    right, _ = minivlm.load(tmp_path)
    edit(tmp_path, lambda n, t: t if wide(n, t) else t.to(half))
    model, _ = minivlm.load(tmp_path)
    assert dtypes(model) == {half}
    torch.testing.assert_close(model(TOKENS).logits.float(), right(TOKENS).logits, rtol=0, atol=0.05)
    assert dtypes(minivlm.load(tmp_path, dtype=torch.float32)[0]) == {torch.float32}


def test_of_the_precisions_in_a_published_file_the_config_chooses(tmp_path):
    LanguageModel(LM).save_pretrained(tmp_path, layout="hf")
    mixed = lambda n, t: t if t.ndim < 2 else t.half()
    for told, used in (
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("bfloat16", torch.float16),
        (7, torch.float16),
    ):
        edit(tmp_path, mixed, torch_dtype=told)
        assert dtypes(minivlm.load(tmp_path)[0]) == {used}, told
    edit(tmp_path, lambda n, t: t.half(), torch_dtype="float32")
    assert dtypes(minivlm.load(tmp_path)[0]) == {torch.float16}  # one precision: as stored


def test_weights_that_need_a_scale_of_their_own_are_refused(tmp_path):
    LanguageModel(LM).save_pretrained(tmp_path)
    edit(tmp_path, lambda n, t: t.to(torch.float8_e4m3fn) if "mlp" in n else t)
    with pytest.raises(UserError, match="float8_e4m3fn"):
        minivlm.load(tmp_path)


def test_a_t5_in_fp16_keeps_in_fp32_what_passes_65504(tmp_path):
    model = T5(SPEAKER, seed=1).eval()
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.mlp.down_proj.weight *= 1e6
    model.save_pretrained(tmp_path)
    for asked in (torch.float16, None):
        half, _ = minivlm.load(tmp_path, dtype=asked)
        if asked is None:
            assert dtypes(half) == {torch.float32}
            continue
        assert {n.split(".")[-2] for n, p in half.named_parameters() if p.dtype == torch.float32} == {"down_proj"}
        got, want = (m(TOKENS, labels=TOKENS).logits.float() for m in (half, model))
        torch.testing.assert_close(got, want, rtol=0, atol=0.02 * want.abs().max().item())
        said = half.generate(TOKENS, max_new_tokens=5)
        assert torch.equal(said, model.generate(TOKENS, max_new_tokens=5))
        half.save_pretrained(tmp_path / "again")
        assert dtypes(minivlm.load(tmp_path / "again")[0]) == {torch.float16, torch.float32}


def test_a_t5_that_is_in_fp16_altogether_stays_finite(tmp_path):
    model = T5(SPEAKER, seed=1).eval()
    with torch.no_grad():
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            block.mlp.down_proj.weight *= 3e4
            block.attention.out_proj.weight *= 3e4
    half = model.half()
    assert half(TOKENS, labels=TOKENS).logits.isfinite().all()
    assert half.generate(TOKENS, max_new_tokens=5).shape == (1, 5)


def test_names_of_precisions():
    assert dtype_called("torch.float16") == dtype_called("float16") == torch.float16
    assert [dtype_called(x) for x in ("auto", None, 3, ["float16"], "int8")] == [None] * 5
    assert main_dtype([torch.ones(3).half(), torch.ones(2), torch.ones(9).long()]) == torch.float16
    assert main_dtype([]) is None


def test_a_cast_forgets_the_copies_that_models_speak_with():
    model = LanguageModel(LM).eval()
    model.generate(TOKENS, max_new_tokens=4)
    assert model.packing.current is not None
    cast(model, torch.bfloat16)
    assert model.packing.current is None and dtypes(model) == {torch.bfloat16}
