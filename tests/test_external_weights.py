"""Only what is new is stored; the rest comes back from where it was trained on, if it is still the same."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from minivlm import CLIP, CLIPConfig, Flamingo, FlamingoConfig, LanguageModel
from minivlm.checkpoint import load, save
from minivlm.errors import UserError
from minivlm.layers import PerceiverConfig, TextConfig
from minivlm.layers.vocabulary import with_vocabulary
from tests.speakers import VISION, language, processor

PLACEHOLDER = processor().image_token_id
CONFIG = FlamingoConfig(
    vision=VISION,
    language=language(),
    resampler=PerceiverConfig(width=16, depth=1, heads=2, latents=3),
    image_token=PLACEHOLDER,
)
TEXT = TextConfig(width=16, depth=1, heads=2, vocab_size=40, context=8, causal=True, end_token=3)
IMAGES, TOKENS = torch.randn(1, 1, 3, 16, 16), torch.tensor([[1, PLACEHOLDER, 20, 21]])


@pytest.fixture
def trained(tmp_path):
    """A Flamingo on a CLIP and a language model that lie in directories of their own, and where each is."""
    clip, lm = CLIP(CLIPConfig(vision=VISION, text=TEXT, embed_width=8), seed=3), LanguageModel(language(), seed=4)
    save(tmp_path / "clip", clip)
    save(tmp_path / "lm", lm)
    model = Flamingo(CONFIG).eval()
    model.vision.load_state_dict(clip.vision.state_dict())
    model.language_model.load_state_dict(lm.state_dict())
    for p in model.gated.parameters():
        p.data += 0.3 * torch.randn_like(p)
    model.freeze("vision", "language_model")
    return model, {"vision": str(tmp_path / "clip"), "language_model": str(tmp_path / "lm")}


def sentence(error):
    assert "\n" not in str(error.value)


def test_only_what_is_new_is_stored(trained, tmp_path):
    model, base = trained
    model.save_pretrained(tmp_path / "new", processor=processor(), base=base)
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as file:
        assert {name.partition(".")[0] for name in file.keys()} == set(model.trained_parts)  # noqa: SIM118
    back, read = load(tmp_path / "new")
    assert back.config == CONFIG and read.config == processor().config
    state = back.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert back.language_model.head.weight is back.language_model.token_embedding.weight  # still tied
    assert torch.allclose(back(IMAGES, TOKENS).logits, model(IMAGES, TOKENS).logits, atol=1e-6)
    assert load(tmp_path / "new", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_one_part_may_be_left_out(trained, tmp_path):
    model, base = trained
    save(tmp_path / "new", model, base={"language_model": base["language_model"]})
    back, _ = load(tmp_path / "new")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    save(tmp_path / "whole", back)  # it can be stored whole again
    assert torch.equal(load(tmp_path / "whole")[0](IMAGES, TOKENS).logits, back(IMAGES, TOKENS).logits)


def test_a_language_model_that_did_not_know_the_mark_is_as_good(trained, tmp_path):
    model, base = trained
    lm, _ = load(base["language_model"])
    new = with_vocabulary(lm, lm.config.vocab_size + 1)
    grown = Flamingo(replace(CONFIG, language=new.config, image_token=lm.config.vocab_size)).eval()
    grown.vision.load_state_dict(model.vision.state_dict())
    grown.language_model.load_state_dict(new.state_dict())
    grown.freeze("vision", "language_model")
    grown.save_pretrained(tmp_path / "new", base=base)
    state = load(tmp_path / "new")[0].state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in grown.state_dict().items())
    rows = state["language_model.token_embedding.weight"]
    assert torch.allclose(rows[-1], rows[:-1].mean(dim=0), atol=1e-6)


def test_a_base_of_another_kind_or_precision_is_as_good(trained, tmp_path):
    """The language model may lie in half precision, or in the whole of another model."""
    model, _ = trained
    save(tmp_path / "lm", model.language_model.half())
    model.language_model.float()
    whole = tmp_path / "whole"
    save(whole, model)
    save(tmp_path / "new", model, base={"vision": str(whole), "language_model": str(tmp_path / "lm")})
    back, _ = load(tmp_path / "new", dtype=torch.float32)
    assert torch.allclose(back(IMAGES, TOKENS).logits, model(IMAGES, TOKENS).logits, atol=1e-4)


def test_a_part_that_learns_is_not_left_out(trained, tmp_path):
    model, base = trained
    model.language_model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match="language_model is trained, so it cannot be stored as that of"):
        save(tmp_path / "new", model, base=base)


def test_layouts_of_others_know_no_bases(trained, tmp_path):
    model, base = trained
    with pytest.raises(UserError, match="layout='hf' stores a model whole"):
        save(tmp_path / "new", model, layout="hf", base=base)


@pytest.mark.parametrize(
    ("other", "how"),
    [
        (lambda: LanguageModel(language(), seed=5), "has other weights"),
        (lambda: LanguageModel(language(depth=3), seed=4), "has depth = 3 instead of 2"),
        (lambda: LanguageModel(language(width=16), seed=4), "has width = 16 instead of 32, mlp_width"),
    ],
)
def test_a_base_that_is_another_now(trained, tmp_path, other, how):
    model, base = trained
    save(tmp_path / "new", model, base=base)
    save(tmp_path / "lm", other())
    with pytest.raises(
        UserError, match=rf"new was trained on the language_model of .*lm, but what is there now {how}"
    ) as e:
        load(tmp_path / "new")
    sentence(e)


def test_a_base_that_is_gone(trained, tmp_path):
    model, base = trained
    save(tmp_path / "new", model, base=base)
    (tmp_path / "lm").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"lm does not exist") as e:
        load(tmp_path / "new")
    sentence(e)


def test_a_base_without_the_part(trained, tmp_path):
    model, base = trained
    save(tmp_path / "new", model, base=base)
    save(tmp_path / "lm", load(tmp_path / "clip")[0])
    with pytest.raises(UserError, match=r"trained on the language_model of .*, but there is a CLIP without one") as e:
        load(tmp_path / "new")
    sentence(e)


@pytest.mark.parametrize("base", ["out/lm", {"language_model": "out/lm"}, {"gated": {"source": "a", "fingerprint": 1}}])
def test_a_base_that_cannot_be_read(trained, tmp_path, base):
    save(tmp_path / "new", trained[0])
    path = tmp_path / "new" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": base}))
    with pytest.raises(UserError, match="in a way that cannot be read") as e:
        load(tmp_path / "new")
    sentence(e)
