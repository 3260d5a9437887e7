"""What a directory holds, told without its weights being read."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import huggingface_hub
import pytest

from minivlm.errors import UserError
from minivlm.info import info, main
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.lora import LoRAConfig, add_lora
from minivlm.metrics import Score
from minivlm.pretrained.hub import TEXT_FILES
from tests.speakers import language, processor
from tests.test_external_weights import trained  # noqa: F401  a Flamingo, and where its frozen parts come from

SAVED = Path(__file__).parent / "fixtures/saved"


def row(text, name):
    """The rest of the line that begins with this name."""
    [line] = [line for line in text.splitlines() if line.startswith(f"{name} ")]
    return " ".join(line.split()[len(name.split()) :])


def test_a_run_under_way_is_told_by_its_latest_checkpoint():
    text = info(SAVED / "blip2")
    assert text.startswith(f"{SAVED / 'blip2'} holds a run that is not finished; its latest checkpoint:\n")
    assert "step-000002: BLIP2, saved by minivlm 0.6.0\n" in text
    assert row(text, "vision") == "1,004 not trained" and row(text, "qformer") == "2,048 trained"
    assert row(text, "language_model") == "3,544 not trained" and row(text, "all") == "6,668"
    assert row(text, "weights") == "float32, 27.2 kB in model.safetensors"
    assert row(text, "images") == "32 × 32 pixels" and row(text, "image tokens") == "2 in the text for each"
    assert row(text, "context") == "96 tokens" and row(text, "vocabulary") == "270 tokens"
    assert row(text, "chat template") == 'plain: "{} {}"' and {"answer", "caption"} <= {*row(text, "can").split(", ")}
    assert row(text, "run").startswith("blip2, step 2 of 4, ")


@pytest.mark.parametrize("run", sorted(path.name for path in SAVED.iterdir() if path.is_dir()))
def test_every_recipe_leaves_what_can_be_told(run):
    assert int(row(info(SAVED / run), "all").replace(",", "")) > 1000


def test_a_finished_run_has_a_score(tmp_path, capsys):
    shutil.copytree(SAVED / "lm/checkpoints/step-000002", tmp_path / "lm")
    scores = {"perplexity": Score(3.5, 59, share=False), "told scenes": Score(0.9, 0.29)}
    (tmp_path / "lm/metrics.json").write_text(json.dumps({name: asdict(score) for name, score in scores.items()}))
    main([str(tmp_path / "lm")])
    text = capsys.readouterr().out
    assert row(text, "score") == "perplexity 3.50 (chance 59.00); 1 more in metrics.json"
    assert "images" not in text and "complete" in row(text, "can")


def test_published_weights_in_half_precision_are_told_so(tmp_path):
    model = LanguageModel(language())
    model.bfloat16().save_pretrained(tmp_path, processor=processor(), layout="hf")
    text = info(tmp_path)
    assert "LanguageModel, published, gpt2" in text and row(text, "weights").startswith("bfloat16, ")
    assert "trained" not in text


def test_of_a_hub_id_only_the_texts_are_downloaded(tmp_path, monkeypatch):
    LanguageModel(language()).save_pretrained(tmp_path, processor=processor(), layout="hf")
    (tmp_path / "model.safetensors").unlink()
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or tmp_path
    )
    text = info("some/model")
    assert asked == [list(TEXT_FILES)]
    assert row(text, "weights") == "not downloaded" and row(text, "context") == "96 tokens"


def test_parts_that_lie_elsewhere_are_named(trained, tmp_path):  # noqa: F811
    model, base = trained
    model.save_pretrained(tmp_path / "new", processor=processor(), base=base)
    shutil.rmtree(tmp_path / "lm")
    text = info(tmp_path / "new")
    assert row(text, "language_model").endswith(f" not here: that of {tmp_path / 'lm'}")
    assert row(text, "gated") and float(row(text, "weights").split()[1]) < 30


def test_an_adapter_is_told_with_its_base_or_with_why_that_is_not_here(tmp_path):
    from minivlm.adapters import save_adapter

    model = LanguageModel(language(), seed=1)
    model.save_pretrained(tmp_path / "lm", processor=processor())
    add_lora(model, LoRAConfig(rank=2))
    for base, told in (
        ("lm", f"{tmp_path / 'lm'}: LanguageModel"),
        ("gone", "its base is not here: "),
        ("adapter", f"its base is not here: {tmp_path / 'adapter'} belongs to itself"),
    ):
        save_adapter(tmp_path / "adapter", model, base=str(tmp_path / base), config=LoRAConfig(rank=2))
        text = info(tmp_path / "adapter")
        assert f"a LoRA adapter of rank 2, alpha 16, for {tmp_path / base}\n" in text and f"\n{told}" in text


def test_a_directory_that_holds_no_model_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"is no model directory: it has no config.json"):
        info(tmp_path)
