"""What transformers writes into a config.json, at both levels, is no obstacle: all of its fields are known."""

import json

import pytest

from minivlm.pretrained import known_fields
from minivlm.pretrained.fields import check_config

transformers = pytest.importorskip("transformers", reason="transformers is not installed (tests/requirements.txt)")

CONFIGS = {
    "clip": "CLIP", "siglip": "Siglip", "align": "Align", "gpt2": "GPT2", "gpt_neox": "GPTNeoX", "opt": "OPT", "t5": "T5",
    "bert": "Bert", "visual_bert": "VisualBert", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "llava": "Llava",
    "blip": "Blip", "blip-2": "Blip2", "Blip2ForImageTextRetrieval": "Blip2", "mpt": "Mpt", "idefics": "Idefics",
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_fields_are_known(kind, tmp_path):
    config = getattr(transformers, f"{CONFIGS[kind]}Config")()
    config.save_pretrained(tmp_path)
    for values in (config.to_dict(), json.loads((tmp_path / "config.json").read_text())):
        check_config(values, "config.json", known_fields(kind, values))
