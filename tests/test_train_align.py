"""ALIGN through train.py's real entry point: pictures with wrong captions, and a tower that others can read."""

import json

import pytest
import torch

import minivlm
import train
from minivlm import LanguageModelConfig
from minivlm.datasets.shapes import make_shapes
from minivlm.layers import BERTConfig, EfficientNet
from minivlm.models.llava import LLaVA, LLaVAConfig

TINY = {
    "steps": 3,
    "batch_size": 16,
    "save_every": 3,
    "device": "cpu",
    "precision": "fp32",
    "model.vision.image_size": 32,
    "model.vision.channels": "[8, 8, 16, 24]",
    "model.text.width": 16,
    "model.text.depth": 1,
    "model.text.heads": 2,
    "model.embed_width": 24,
    "data.vocab_size": 300,
}


@pytest.mark.usefixtures("little_to_judge_by")
def test_a_run_on_noisy_captions_leaves_a_tower_that_others_read(tmp_path, capsys):
    make_shapes(tmp_path / "world", train=64, image_size=32, progress=False)
    options = TINY | {"data": tmp_path / "world", "out": tmp_path / "align"}
    train.main(["align", *(str(x) for name, value in options.items() for x in (f"--{name}", value))])
    assert "26 of the 64 captions are those of another image" in capsys.readouterr().out
    scores = json.loads((tmp_path / "align" / "metrics.json").read_text())
    assert all(0 <= score["value"] <= 1 for score in scores.values())
    model, processor = minivlm.load(tmp_path / "align")
    assert isinstance(model.vision, EfficientNet) and isinstance(model.config.text, BERTConfig)
    assert model.config.label_smoothing == 0.1

    language = LanguageModelConfig(width=16, depth=1, heads=2, vocab_size=processor.vocab_size, context=32)
    reader = LLaVA(LLaVAConfig(vision=model.config.vision, language=language, image_token=5))
    reader.vision.load_state_dict(model.vision.state_dict())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(reader.eval().image_features(images), model.vision.features(images, layer=-2))
