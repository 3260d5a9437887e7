"""hf:NAME becomes tar shards in the user's cache, or one sentence. The `datasets` package itself is in tests/parity."""

import sys
import types

import pytest
from tars import encoded

from minivlm.datasets import hub_data
from minivlm.datasets.folder_entries import read_folder
from minivlm.datasets.hub_data import HubName
from minivlm.datasets.source import Source
from minivlm.errors import UserError


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class Value:
    def __init__(self, dtype):
        self.dtype = dtype


class ClassLabel:
    def int2str(self, value):
        return ("cat", "dog")[value]


class List:
    def __init__(self, feature):
        self.feature = feature


class Rows(list):
    """As much of a data set as is used."""

    def __init__(self, features, rows):
        super().__init__(rows)
        self.features, self.num_rows = features, len(rows)

    def cast_column(self, key, kind):
        return Rows(self.features | {key: kind}, self)


class DatasetNotFoundError(FileNotFoundError):
    pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of data sets by their names; an exception is raised."""
    known, asked = {}, []
    module = types.ModuleType("datasets")
    module.Image, module.Value, module.ClassLabel = Image, Value, ClassLabel

    def load_dataset(name, config, *, revision):
        asked.append((name, config, revision))
        if isinstance(known[name], Exception):
            raise known[name]
        return known[name]

    module.load_dataset, known["asked"] = load_dataset, asked
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return known


def rows(count, features=None, **columns):
    made = [
        {"image": {"bytes": encoded(i), "path": None}, **{k: v(i) for k, v in columns.items()}} for i in range(count)
    ]
    return Rows({"image": Image(), **(features or {})}, made)


def test_splits_columns_and_classes_become_shards(hub):
    features = {"title": Value("string"), "label": ClassLabel(), "raw": Value("binary")}
    columns = {"title": "kite {}".format, "label": lambda i: i % 2, "raw": lambda i: b"\0"}
    hub["a/b"] = {
        "train": rows(5, features, **columns),
        "validation": rows(2, features, **columns),
        "extra": rows(1, features, **columns),
    }
    source = Source("hf:a/b")
    assert source.path.name == "a--b" and sorted(p.name for p in source.path.iterdir()) == [
        "train-00000.tar",
        "val-00000.tar",
    ]
    found = read_folder(source)
    assert [(item.split, item.label, item.captions) for item in found[4:6]] == [
        ("train", "cat", ["kite 4"]),
        ("val", "cat", ["kite 0"]),
    ]
    assert (source / found[0].image).name == "000000000.image.png"
    assert Source("hf:a/b") == source and hub["asked"] == [("a/b", None, None)]  # once


def test_the_only_split_of_another_name_is_drawn_from_and_many_shards_are_written(hub, monkeypatch):
    monkeypatch.setattr(hub_data, "MOST_SAMPLES", 4)
    hub["b"] = {"everything": rows(9, {"text": Value("string")}, text=str)}
    source = Source("hf:b@v1")
    assert source.path.name == "b--@v1" and [p.name for p in sorted(source.path.iterdir())] == [
        f"data-0000{i}.tar" for i in range(3)
    ]
    assert {item.split for item in read_folder(source)} == {None} and len(read_folder(source)) == 9


def test_one_of_several_columns_of_images_is_chosen(hub):
    made = [
        {"image": {"bytes": encoded(i), "path": None}, "mask": {"bytes": encoded(i + 9), "path": None}, "text": "x"}
        for i in range(2)
    ]
    hub["c"] = {"train": Rows({"image": Image(), "mask": Image(), "text": Value("string")}, made)}
    assert read_folder(Source("hf:c", image_key="mask"))[0].image == "train-00000.tar/000000000.mask.png"
    assert read_folder(Source("hf:c"))[0].image == "train-00000.tar/000000000.image.png"


def test_a_list_of_images_gives_its_first_and_conversations_are_read(hub):
    said = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a kite"}]
    made = [{"images": [{"bytes": encoded(), "path": None}], "conversations": said}]
    hub["d"] = {"train": Rows({"images": List(Image()), "conversations": List({"from": Value("string")})}, made)}
    from minivlm.datasets.folder_entries import read_entries

    (entry,) = read_entries(Source("hf:d"))
    assert entry.images == ["train-00000.tar/000000000.images.png"] and entry.turns[1].text == "a kite"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf:owner/name", HubName("owner/name")),
        ("hf:beans", HubName("beans")),
        ("hf:owner/name@v1.0", HubName("owner/name", "v1.0")),
        ("hf:owner/name/plain_text", HubName("owner/name", None, "plain_text")),
        ("hf:owner/name@abc/en", HubName("owner/name", "abc", "en")),
    ],
)
def test_names_have_a_revision_and_a_configuration(text, name):
    assert HubName.read(text) == name and str(name) == text


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."),
            "there is no such data set on the hub",
        ),
        (
            DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub."),
            "it is gated: accept its terms on its page",
        ),
        (
            ConnectionError("Couldn't reach 'x' on the Hub"),
            r"the hub cannot be reached \(Couldn't reach 'x' on the Hub\)\.$",
        ),
        (
            ValueError("Config name is missing.\nPlease pick one among ['en', 'de']"),
            r"several configurations, \['en', 'de'\]: .* hf:x/CONFIG",
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found x.py"),
            "no longer supported, but found x.py",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(hub, error, sentence):
    hub["x"] = error
    with pytest.raises(UserError, match=f"^hf:x is not to be had: .*{sentence}") as caught:
        Source("hf:x")
    assert "\n" not in str(caught.value)


def test_no_images_no_splits_no_package_and_no_name_are_told(hub, tmp_path, monkeypatch):
    hub["t"] = {"train": Rows({"text": Value("string")}, [{"text": "x"}])}
    with pytest.raises(UserError, match=r"hf:t has the columns text, none of which holds images"):
        Source("hf:t")
    hub["s"] = {"a": rows(1), "b": rows(1)}
    with pytest.raises(UserError, match=r"hf:s has the splits a, b, of which none is train, validation or test"):
        Source("hf:s")
    assert sorted(p.name for p in (tmp_path / "cache" / "minivlm" / "hub").iterdir()) == ["lock"]  # nothing is left
    with pytest.raises(UserError, match=r"hf:a b is no name of a data set: write hf:owner/name"):
        Source("hf:a b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"is read with the `datasets` package: pip install datasets"):
        Source("hf:owner/other")


def test_a_full_disk_leaves_nothing_half(hub, tmp_path, monkeypatch):
    hub["f"] = {"train": rows(3, {"text": Value("string")}, text=str)}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_data.tarfile.TarFile, "addfile", full)
    with pytest.raises(
        UserError, match=r"hf:f could not be written to .*: No space left on device; nothing is kept of it"
    ):
        Source("hf:f")
    assert sorted(p.name for p in (tmp_path / "cache" / "minivlm" / "hub").iterdir()) == ["lock"]
