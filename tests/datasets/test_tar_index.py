"""Members of tar files: read where they lie, by an index that is made once; and tar files that cannot be read."""

import gzip
import os
import tarfile

import numpy as np
import pytest
from tars import encoded, samples, write_tar

from minivlm.datasets import tar_index
from minivlm.datasets.class_folders import list_folder
from minivlm.datasets.image_cache import ImageCache
from minivlm.datasets.images import check_header, read_image
from minivlm.datasets.tar_index import key_of, open_tar
from minivlm.errors import UserError
from minivlm.tasks.image_index import list_images


@pytest.fixture(autouse=True)
def forgotten():
    """Nothing is known from another test."""
    tar_index.indexed.cache_clear()


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "data" / "shard-000.tar", samples(5, txt="a kite {}"))


def test_every_member_is_read_as_the_file_that_it_was(shard):
    for i in range(5):
        (shard.parent / "file.png").write_bytes(encoded(i))
        assert read_image(shard / f"00000{i}.png").tobytes() == read_image(shard.parent / "file.png").tobytes()
        check_header(shard / f"00000{i}.png")
    with pytest.raises(UserError, match=r"000009\.png is missing: shard-000\.tar holds no such member\.$"):
        read_image(shard / "000009.png")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_names_are_found_however_they_are_written(tmp_path, form):
    names = ["./a.png", "deep/er/b.png", "Straße.png" if form != tarfile.USTAR_FORMAT else "c.png"]
    names += ["n" * 150 + ".png"] if form != tarfile.USTAR_FORMAT else []
    tar = write_tar(tmp_path / "a.tar", [(name, encoded(i)) for i, name in enumerate(names)], format=form)
    for i, name in enumerate(names):
        want = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        assert np.array_equal(np.asarray(read_image(tar / name)), want)
    assert open_tar(tar).all_names() == [name.removeprefix("./") for name in names]


def test_a_second_process_reads_the_index_and_no_header(shard, monkeypatch):
    before = open_tar(shard)
    tar_index.indexed.cache_clear()
    monkeypatch.setattr(tar_index, "read_headers", None)  # nothing to call
    after = open_tar(shard)
    assert after.all_names() == before.all_names() and after.offsets.tolist() == before.offsets.tolist()
    assert after.all_texts() == before.all_texts() == [t for i in range(5) for t in (None, f"a kite {i}".encode())]


def test_a_tar_file_that_changed_is_indexed_anew(shard):
    open_tar(shard)
    write_tar(shard, samples(2, first=7, txt="another"))
    os.utime(shard, ns=(1, 1))
    assert len(open_tar(shard)) == 4 and read_image(shard / "000008.png").size == (50, 40)


@pytest.mark.parametrize("kind", ["cut", "text", "offsets", "ends", "about"])
def test_an_index_that_does_not_fit_is_made_anew(shard, kind):
    want = open_tar(shard).all_names()
    (kept,) = (shard.parent / ".minivlm_cache" / "tars").glob("*.npz")
    with np.load(kept) as arrays:
        arrays = dict(arrays)
    if kind == "cut":
        kept.write_bytes(kept.read_bytes()[:200])
    elif kind == "text":
        kept.write_text("no index")
    else:
        if kind == "about":
            arrays["about"] = arrays["about"][:1]
        else:
            arrays["numbers"][1 if kind == "offsets" else 0] += 2**40
        with kept.open("wb") as file:
            np.savez(file, **arrays)
    tar_index.indexed.cache_clear()
    assert open_tar(shard).all_names() == want and read_image(shard / "000001.png").size == (50, 40)


def test_where_no_index_can_be_kept_the_images_are_read_all_the_same(shard, monkeypatch):
    def full(path, write):
        raise UserError("the disk is full.")

    monkeypatch.setattr(tar_index, "write_atomically", full)
    assert open_tar(shard).all_texts()[1] == b"a kite 0"
    assert "is made at every start: the disk is full." in open_tar(shard).notes[0]


def test_a_cache_of_decoded_images_holds_members(shard):
    keys = [f"shard-000.tar/00000{i}.png" for i in range(5)]
    cache = ImageCache(shard.parent, keys, shard.parent / "cache", shorter_side=20)
    for key in keys:
        assert np.array_equal(cache[key], np.asarray(read_image(shard.parent / key, 20)))


def test_a_folder_of_tar_files_lists_their_images_unless_it_has_images_of_its_own(shard):
    write_tar(shard.parent / "more" / "b.tar", samples(1, cls="3"))
    found = list_folder(shard.parent, tars=True)
    assert found.images == ["more/b.tar/000000.png", *(f"shard-000.tar/00000{i}.png" for i in range(5))]
    (shard.parent / "x.png").write_bytes(encoded())
    assert list_folder(shard.parent, tars=True).images == ["x.png"]


def test_keys_go_up_to_the_first_dot():
    assert key_of("a/b.c/d.seg.PNG") == ("a/b.c/d", "seg.png") and key_of("d") == ("d", "")


# --------------------------------------------------------------------------------------------------- what cannot be read


def cut(shard, at):
    shard.write_bytes(shard.read_bytes()[:at])


def broken(shard, kind):
    whole = shard.read_bytes()
    third = open_tar(shard).offsets[4]  # 000002.png, behind two whole samples
    tar_index.indexed.cache_clear()
    if kind == "within a file":
        shard.write_bytes(whole[: third + 100])
    elif kind == "within a header":
        shard.write_bytes(whole[: third - 100])
    elif kind == "a damaged header":
        shard.write_bytes(whole[: third - 512] + b"x" * 512 + whole[third:])
    elif kind == "compressed":
        shard.write_bytes(gzip.compress(whole))
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "no tar":
        shard.write_bytes(b"<html>not found</html>" * 50)
    else:
        members = {
            "twice": [("a.png", encoded()), ("./a.png", encoded(1))],
            "outside": [("../a.png", encoded())],
            "absolute": [("/etc/a.png", encoded())],
        }
        write_tar(shard, members[kind])


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (
            "within a file",
            r"is cut off: it ends within a file, behind 2 whole samples; fetch it again, or remove it\.$",
        ),
        ("within a header", r"is cut off: it ends within a file, behind 2 whole samples"),
        ("a damaged header", r"is damaged behind 2 samples \(what follows is no header of a file\)"),
        ("compressed", r"is compressed, and .* decompress it \(gzip -d shard-000\.tar\)"),
        ("empty", r"is empty: it has no bytes"),
        ("no tar", r"is no tar file \("),
        ("twice", r"holds two members named 'a\.png'"),
        ("outside", r"holds a member named '\.\./a\.png', which leads out of the folder"),
        ("absolute", r"holds a member named '/etc/a\.png', which leads out of the folder"),
    ],
)
def test_a_tar_file_that_cannot_be_read_is_named_with_what_to_do(shard, kind, sentence):
    broken(shard, kind)
    for use in (open_tar, lambda tar: read_image(tar / "000000.png")):
        with pytest.raises(UserError, match=f"shard-000.tar {sentence}"):
            use(shard)


def test_links_and_sparse_files_are_passed_over_and_told(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png"), (tarfile.FIFOTYPE, "c.png")):
            about = tarfile.TarInfo(name)
            about.type, about.linkname = kind, "/etc/passwd"
            archive.addfile(about)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    assert len(open_tar(path)) == 0
    assert open_tar(path).notes == (
        f"{path}: 3 members that are links or sparse files are passed over (a.png, b.png, c.png).",
    )


def test_a_tar_file_without_its_end_mark_is_read_and_told(shard):
    index = open_tar(shard)
    end = int(index.offsets[-1]) + 512
    cut(shard, end)
    assert len(open_tar(shard)) == 10
    assert "lacks the mark that ends a tar file: if it should have more than 5 samples" in open_tar(shard).notes[0]


def test_an_empty_member_is_no_image(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("a.png", b"")])
    with pytest.raises(UserError, match=r"a\.tar/a\.png cannot be read as an image"):
        read_image(tar / "a.png")


def test_a_tar_file_is_searched_like_a_folder(shard):
    assert list_images(shard) == {f"00000{i}.png": (len(encoded(i)), os.stat(shard).st_mtime_ns) for i in range(5)}
    with pytest.raises(UserError, match="is not a folder"):
        list_images(shard.parent / "nothing.tar")
