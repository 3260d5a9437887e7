"""docs/overview.md: its code runs as it stands, with small models in place of the published ones."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import minivlm
from minivlm import BLIP2, BLIP2Config, BLIPConfig, CLIPConfig
from minivlm.layers import BERTConfig, QFormerConfig, TextConfig
from minivlm.models.blip import BLIP
from minivlm.models.clip import CLIP
from tests import speakers

PAGE = (Path(__file__).parent.parent / "docs" / "overview.md").read_text(encoding="utf-8")
SIZES = dict(width=16, depth=1, heads=2)


def clip():
    p = speakers.processor(image_tokens=0)
    text = TextConfig(**SIZES, vocab_size=p.vocab_size, context=speakers.CONTEXT, end_token=p.end_token)
    return CLIP(CLIPConfig(vision=speakers.VISION, text=text, embed_width=8)), p


def blip():
    p = speakers.processor(image_tokens=0, chat="encoder")
    text = BERTConfig(**SIZES, vocab_size=p.vocab_size, context=speakers.CONTEXT, cross_attention_every=1)
    ids = dict(decode_token=p.start_token, end_token=p.end_token)
    return BLIP(BLIPConfig(vision=speakers.VISION, text=text, roles="caption", **ids)), p


def blip2():
    p = speakers.processor(image_tokens=3)
    qformer = QFormerConfig(width=16, depth=2, heads=2, queries=3, context_width=16)
    parts = dict(vision=speakers.VISION, qformer=qformer, language=speakers.language())
    return BLIP2(BLIP2Config(**parts, image_token=p.image_token_id)), p


PUBLISHED = {
    "openai/clip-vit-base-patch32": clip,
    "Salesforce/blip-image-captioning-base": blip,
    "Salesforce/blip2-opt-2.7b": blip2,
    "llava-hf/llava-1.5-7b-hf": lambda: (speakers.llava(), speakers.processor()),
}


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with the models and images that the page names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for source, build in PUBLISHED.items():
        model, processor = build()
        model.save_pretrained(source, processor=processor)
    (tmp_path / "photos").mkdir()
    for i, name in enumerate(("cat.jpg", "beach.jpg", "kitchen.jpg", "chart.png", "photos/a.png", "photos/b.png")):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(name)


def test_the_code_of_the_overview_runs_as_it_stands(beside):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) > 10
    names = {}
    for block in blocks:
        exec(compile(block, "docs/overview.md", "exec"), names)
    assert isinstance(names["caption"], str) and isinstance(names["answer"], str) and names["chat"].turns
    assert names["path"].name in ("a.png", "b.png")


def test_every_public_name_and_file_that_the_overview_names_exists():
    assert {name for name in re.findall(r"minivlm\.(\w+)", PAGE) if name[0] != "_"} <= {
        *minivlm.__all__,
        *("metrics", "layers", "datasets"),
    }
    for link in re.findall(r"\]\(\.\./([^)]*)\)", PAGE):
        assert (Path(__file__).parent.parent / link).exists(), link
    from minivlm.recipes import RECIPES

    assert set(re.findall(r"`python train.py ([\w-]+)`", PAGE)) <= set(RECIPES)
