"""The hub is never reached here: snapshot_download is replaced by what it would do."""

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

import minivlm
from minivlm.errors import UserError
from minivlm.pretrained.hub import is_hub_id, locate
from minivlm.recipes.parts import load_language_model, load_vision_tower


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(files) makes a repository of empty files; returns the list of what is downloaded, in order."""
    fetched = []

    def make(*files):
        def snapshot_download(name, allow_patterns):
            for file in files:
                if any(fnmatch(file, pattern) for pattern in allow_patterns):
                    (tmp_path / file).touch()
                    fetched.append(file)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return fetched

    return make


def weights_of(directory: Path) -> tuple[str, ...]:
    assert (directory / "config.json").exists()
    return ("model*.safetensors", "pytorch_model*.bin")


def test_only_one_kind_of_weights_is_downloaded(hub, tmp_path):
    fetched = hub("config.json", "merges.txt", "pytorch_model.bin", "model.safetensors", "flax_model.msgpack")
    assert locate("owner/name", weights_of) == tmp_path
    assert fetched == ["config.json", "merges.txt", "model.safetensors"]


def test_the_second_kind_where_the_first_is_missing(hub):
    fetched = hub("config.json", "pytorch_model.bin")
    locate("owner/name", weights_of)
    assert fetched == ["config.json", "pytorch_model.bin"]


def test_offline_is_one_sentence(monkeypatch):
    def offline(name, allow_patterns):
        raise LocalEntryNotFoundError("cannot find it on the local disk.\nCheck your connection.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        UserError, match=r"^owner/name is no directory here .*cannot find it on the local disk\); check"
    ):
        locate("owner/name", weights_of)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, r"^owner/name asks for its terms to be accepted on its hub page, and for `hf auth login`\.$"),
        (
            RepositoryNotFoundError,
            r"^owner/name is neither a directory here nor a public model on the Hugging Face hub\.$",
        ),
    ],
)
def test_a_model_that_is_gated_or_absent_is_one_sentence(kind, message, monkeypatch):
    def refuse(name, allow_patterns):
        raise kind("401 Client Error.\nCannot access it.", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for ask in (minivlm.load, load_vision_tower, load_language_model):
        with pytest.raises(UserError, match=message):
            ask("owner/name")


def test_a_repository_of_gguf_files_says_what_to_do(hub):
    hub("README.md")
    with pytest.raises(UserError, match=r"holds GGUF files: download one \(hf download owner/name-GGUF FILE\.gguf\)"):
        locate("owner/name-GGUF", weights_of)


def test_what_reads_as_a_path_is_not_sent_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    missing = ("./clip", "../clip", "/nowhere/clip", "~/nowhere/clip", "runs/clip", "a/b/c", "owner/name/", Path("a/b"))
    for source in missing:
        assert not is_hub_id(source)
        with pytest.raises(UserError, match=f"^{source} does not exist.$"):
            locate(source, weights_of)
    with pytest.raises(UserError, match=r"out/clip does not exist; train it with python train\.py clip\."):
        locate("out/clip", weights_of)


def test_directories_and_files(tmp_path):
    assert locate(str(tmp_path), weights_of) == locate(tmp_path, weights_of) == tmp_path
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="is a file; give the directory"):
        locate(tmp_path / "model.safetensors", weights_of)


def test_hub_ids():
    assert (
        is_hub_id("openai/clip-vit-base-patch32") and is_hub_id("gpt2") and is_hub_id("laion/CLIP-ViT-H-14-s32B.b79K")
    )


@pytest.mark.parametrize("source", ["a" * 5000, "~nobody-of-this-name/x"])
def test_what_is_no_name_of_a_directory(source):
    with pytest.raises(UserError, match="is no name that a directory can have"):
        locate(source, weights_of)
