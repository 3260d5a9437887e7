"""Adapters and models without their frozen parts: whose base they are found on, and what is never done unasked."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch

import minivlm
import sample
from minivlm.adapters import save_adapter
from minivlm.errors import UserError
from minivlm.layers.language_model import LanguageModel
from minivlm.layers.lora import LoRAConfig, add_lora
from tests.speakers import language, processor
from tests.test_external_weights import trained  # noqa: F401


@pytest.fixture
def adapter(tmp_path):
    """Of a language model in `lm`; what it names as its base can be changed."""
    model = LanguageModel(language(), seed=1)
    model.save_pretrained(tmp_path / "lm", processor=processor())
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3)

    def make(base, **values):
        save_adapter(tmp_path / "adapter", model, base=str(base), config=LoRAConfig(rank=2))
        path = tmp_path / "adapter/adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return tmp_path / "adapter"

    return make, model


@pytest.fixture
def hub(monkeypatch):
    """What is asked of it, and whether it is only asked for what is here; nothing is."""
    asked = []

    def snapshot_download(name, allow_patterns, local_files_only=False):
        asked.append((name, local_files_only))
        raise huggingface_hub.errors.LocalEntryNotFoundError("not here")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


TOKENS = torch.tensor([[5, 6, 7]])


def test_a_base_on_the_hub_is_not_downloaded_unasked(adapter, hub):
    make, _ = adapter
    directory = make("some/llama")
    with pytest.raises(
        UserError, match=r'adapter belongs to some/llama, .*base="some/llama" for minivlm.load'
    ) as error:
        minivlm.load(directory)
    assert "\n" not in str(error.value) and hub == [("some/llama", True)]
    with pytest.raises(UserError, match="some/llama is no directory here and could not be downloaded"):
        minivlm.load(directory, base="some/llama")
    assert hub[-1] == ("some/llama", False)


def test_the_base_may_lie_elsewhere(adapter, tmp_path):
    make, model = adapter
    directory = make("some/llama")
    loaded, _ = minivlm.load(directory, base=tmp_path / "lm")
    assert torch.allclose(loaded(TOKENS).logits, model.eval()(TOKENS).logits, atol=1e-6)


def test_sample_py_is_told_the_base(adapter, tmp_path, capsys):
    make, _ = adapter
    directory = str(make("some/llama"))
    sample.main(["complete", directory, "is", "--base", str(tmp_path / "lm"), "--max-new-tokens", "2"])
    assert capsys.readouterr().out
    for twice in (["lm", "clip"], ["vision=clip", "lm"], ["vision=a", "vision=b"]):
        bases = [word for base in twice for word in ("--base", base)]
        with pytest.raises(UserError, match="--base is given twice: say which part each is"):
            sample.main(["complete", directory, "is", *bases])
    with pytest.raises(UserError, match=r"odd=1 does not exist"):  # a directory, and no part
        sample.main(["complete", directory, "is", "--base", str(tmp_path / "odd=1")])


@pytest.mark.parametrize("name", [None, "", 7, ["out/lm"]])
def test_an_adapter_that_names_no_base(adapter, name):
    make, _ = adapter
    with pytest.raises(UserError, match="does not name the base"):
        minivlm.load(make("x", base_model_name_or_path=name))


def test_a_revision_of_the_base_is_not_guessed(adapter, tmp_path):
    make, _ = adapter
    directory = make(tmp_path / "lm", revision="v2")
    with pytest.raises(UserError, match="belongs to revision 'v2' of"):
        minivlm.load(directory)
    minivlm.load(directory, base=tmp_path / "lm")


def test_what_belongs_to_itself(adapter, trained, tmp_path):  # noqa: F811
    make, _ = adapter
    with pytest.raises(UserError, match=r"adapter belongs to itself \(.*adapter → .*adapter\)"):
        minivlm.load(make(tmp_path / "adapter"))
    model, base = trained
    for name, other in (("a", "b"), ("b", "a")):
        model.save_pretrained(tmp_path / name, base=base)
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        values["base"]["language_model"]["source"] = str(tmp_path / other)
        path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"a belongs to itself \(.*a → .*b → .*a\)") as error:
        minivlm.load(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_parts_may_lie_elsewhere(trained, tmp_path):  # noqa: F811
    model, base = trained
    model.save_pretrained(tmp_path / "new", base=base)
    moved = Path(base["language_model"]).rename(tmp_path / "moved")
    with pytest.raises(UserError, match="does not exist"):
        minivlm.load(tmp_path / "new")
    minivlm.load(tmp_path / "new", base={"language_model": str(moved)})
    with pytest.raises(UserError, match="has the bases vision and language_model: say which of them"):
        minivlm.load(tmp_path / "new", base=moved)
    with pytest.raises(UserError, match="has no base 'ears'; it has vision and language_model"):
        minivlm.load(tmp_path / "new", base={"ears": str(moved)})
    with pytest.raises(UserError, match="is whole: leave out the base"):
        minivlm.load(moved, base="some/llama")
