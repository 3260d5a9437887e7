import json
import os
import pickle
import sys

import pytest
import torch
from safetensors.torch import save_file

from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.pretrained.files import open_weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def check(weights):
    assert set(weights) == {"a", "b"} and "c" not in weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(KeyError):
        weights["c"]


def test_safetensors_are_mapped_and_never_written_to(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    path, weights = open_weights(tmp_path)
    assert path.name == "model.safetensors"
    check(weights)
    weights["a"].zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_shards_are_found_through_the_index(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "model-2.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check(open_weights(tmp_path)[1])
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-1\.safetensors is missing, although the index"):
        open_weights(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        open_weights(tmp_path)


def test_an_index_names_no_file_outside_its_directory(tmp_path):
    save_file(TENSORS, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    for name in ("../secret.safetensors", str(tmp_path / "secret.safetensors")):
        index = {"weight_map": dict.fromkeys(TENSORS, name)}
        (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"names .*secret\.safetensors.*, which is no file of weights beside it"):
            open_weights(tmp_path / "model")


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_pickles_of_tensors_are_read(zipped, tmp_path):
    torch.save(TENSORS, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    check(open_weights(tmp_path)[1])


class Evil:
    """Makes a folder while it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore")  # torch warns of pickle protocols
@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_a_pickle_that_would_run_code_is_refused_unrun(save, tmp_path):
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        save({"a": Evil(tmp_path / "was run")}, file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin is refused") as error:
        open_weights(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "was run").exists()


def test_other_content_of_a_pickle_is_refused(tmp_path):
    for content in ([torch.zeros(1)], {"a": 1}):
        torch.save(content, tmp_path / "pytorch_model.bin")
        with pytest.raises(UserError, match="plain dictionary of tensors"):
            open_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not weights at all")
    with pytest.raises(UserError, match="refused"):
        open_weights(tmp_path)


@pytest.mark.filterwarnings("ignore")  # torch warns of its own format
def test_torchscript_archives_are_refused(tmp_path):
    if sys.version_info >= (3, 14):
        pytest.skip("this Python has no torch.jit")
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="refused"):
        open_weights(tmp_path)


def test_broken_safetensors_are_one_sentence(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20], b"", b"\x00" * 100):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"model\.safetensors is no whole safetensors file"):
            open_weights(tmp_path)
    torch.save(TENSORS, path)
    with pytest.raises(UserError, match="a pickle, which could run code"):
        open_weights(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"holds no weights: model\.safetensors or pytorch_model\.bin should be there"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b"", "line 1"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"[1]", "holds a list"),
    ],
)
def test_broken_json_is_one_sentence(content, said, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_json(tmp_path / "config.json")


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"other\.json is missing"):
        read_json(tmp_path / "other.json")
    with pytest.raises(UserError, match="is a folder, where a file is wanted"):
        read_json(tmp_path)
