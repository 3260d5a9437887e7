"""Decoding any picture to the right RGB, refusing the rest with one sentence, and the cache of what was decoded."""

import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from minivlm.datasets import image_cache, images
from minivlm.datasets.image_cache import ImageCache
from minivlm.datasets.images import check_header, read_image
from minivlm.datasets.source import Source, most_bytes
from minivlm.errors import UserError
from minivlm.files import cache_folder, read_bytes


def photo(height=40, width=60, seed=0):
    """A smooth random image, (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def huge_png(path, side=100_000):
    """A few bytes whose header declares side × side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))
    return path


def read(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------------------- decoding


def test_rgb_comes_back_as_written(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), photo())


def test_gray_is_repeated_over_the_channels(tmp_path):
    gray = photo()[..., 0]
    Image.fromarray(gray).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), np.stack([gray] * 3, axis=-1))


def test_sixteen_bit_gray_keeps_its_shades(tmp_path):
    gray = photo()[..., 0]
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert np.array_equal(read(tmp_path / "a.png"), np.stack([gray] * 3, axis=-1))


def test_a_palette_is_looked_up(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), mode=None).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]


def test_transparency_lies_over_white(tmp_path):
    pixels = np.array([[[200, 0, 0, 255], [200, 0, 0, 0]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    assert read(tmp_path / "rgba.png").tolist() == [[[200, 0, 0], [255, 255, 255]]]

    gray = Image.new("L", (2, 1), 7)
    gray.save(tmp_path / "key.png", transparency=7)  # one shade of gray is declared transparent
    assert read(tmp_path / "key.png").tolist() == [[[255] * 3] * 2]


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)  # magenta and yellow make red
    red, green, blue = read(tmp_path / "a.jpg")[4, 4].tolist()
    assert red > 250 and green < 5 and blue < 5


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "the top of the scene is on the right": turn a quarter clockwise to see it upright
    Image.fromarray(photo()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), np.rot90(photo(), -1))


def test_shrinking_keeps_the_shape_and_never_enlarges(tmp_path):
    Image.fromarray(photo(400, 600)).save(tmp_path / "large.jpg", quality=95)
    Image.fromarray(photo(30, 20)).save(tmp_path / "small.png")
    small = read_image(tmp_path / "large.jpg", shorter_side=80)
    assert small.size == (120, 80)
    expected = Image.fromarray(photo(400, 600)).resize((120, 80), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(expected)).mean() < 2
    assert np.array_equal(np.asarray(read_image(tmp_path / "small.png", shorter_side=80)), photo(30, 20))


@pytest.mark.parametrize("reader", [read_image, check_header])
def test_what_is_no_image_is_named(tmp_path, reader):
    (tmp_path / "a.jpg").write_text("not a picture")
    with pytest.raises(
        UserError, match=r"a\.jpg cannot be read as an image: it is no image format that is read here\.$"
    ):
        reader(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"b\.jpg is missing\.$"):
        reader(tmp_path / "b.jpg")


@pytest.mark.parametrize("reader", [read_image, check_header])
@pytest.mark.parametrize(
    "side", [100_000, 10_000]
)  # pillow refuses the first by itself and would only warn of the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_image_is_refused_by_its_header(tmp_path, reader, side):
    with pytest.raises(UserError, match=r"huge\.png cannot be read as an image: .*(pixels|limit)"):
        reader(huge_png(tmp_path / "huge.png", side))


def test_a_truncated_image_is_named(tmp_path):
    Image.fromarray(photo(200, 200)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    check_header(tmp_path / "a.jpg")  # the header is whole
    with pytest.raises(UserError, match=r"a\.jpg cannot be read as an image: .*truncated"):
        read_image(tmp_path / "a.jpg")


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def folder(tmp_path):
    """Three images and a broken one."""
    for i, size in enumerate([(40, 60), (100, 50), (20, 30)]):
        Image.fromarray(photo(*size, seed=i)).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_text("no")
    return tmp_path


KEYS = ["0.png", "1.png", "broken.png", "2.png"]


def open_cache(folder, keys=KEYS, **limit):
    return ImageCache(folder, keys, folder / "cache", shorter_side=40, **limit)


def count_reads(monkeypatch):
    """A list that grows by the name of each file that is decoded."""
    names = []
    monkeypatch.setattr(
        image_cache, "read_image", lambda path, *rest: names.append(path.name) or read_image(path, *rest)
    )
    return names


def test_the_cache_holds_what_read_image_gives(folder):
    for cache in (open_cache(folder), open_cache(folder)):  # built, then found
        for key in ("0.png", "1.png", "2.png"):
            assert np.array_equal(cache[key], np.asarray(read_image(folder / key, 40)))
        assert list(cache.errors) == ["broken.png"]
        assert "no image format" in cache.errors["broken.png"]


def test_a_second_opening_decodes_nothing(folder, monkeypatch):
    open_cache(folder)
    names = count_reads(monkeypatch)
    open_cache(folder)
    assert names == []


def test_a_changed_a_new_and_a_removed_file_are_noticed(folder, monkeypatch):
    open_cache(folder)
    Image.fromarray(photo(50, 50, seed=8)).save(folder / "1.png")
    Image.fromarray(photo(50, 50, seed=9)).save(folder / "3.png")
    names = count_reads(monkeypatch)
    cache = open_cache(folder, ["0.png", "1.png", "3.png"])
    assert sorted(names) == ["1.png", "3.png"]
    for key in ("0.png", "1.png", "3.png"):
        assert np.array_equal(cache[key], np.asarray(read_image(folder / key, 40)))
    assert len(list((folder / "cache").glob("*.bin"))) == 1  # the pixels of before are gone


def test_a_mended_file_is_no_longer_an_error(folder):
    open_cache(folder)
    Image.fromarray(photo()).save(folder / "broken.png")
    assert open_cache(folder).errors == {}


def test_a_damaged_cache_is_built_anew(folder):
    before = open_cache(folder)["1.png"].copy()
    (pixels,) = (folder / "cache").glob("*.bin")
    pixels.write_bytes(pixels.read_bytes()[:100])
    assert np.array_equal(open_cache(folder)["1.png"], before)
    (index,) = (folder / "cache").glob("*.json")
    index.write_text(index.read_text()[:50])
    assert np.array_equal(open_cache(folder)["1.png"], before)


def test_a_build_that_fails_leaves_the_old_cache_and_no_litter(folder, monkeypatch):
    open_cache(folder)
    files = sorted(p.name for p in (folder / "cache").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache.os, "replace", full)
    cache = open_cache(folder, ["0.png"])
    assert "cache of decoded images in" in cache.notes[0]
    assert "could not be written (No space left on device): free some space there" in cache.notes[0]
    assert np.array_equal(cache["0.png"], np.asarray(read_image(folder / "0.png", 40)))  # which goes on without it
    assert sorted(p.name for p in (folder / "cache").iterdir()) == files


# ------------------------------------------------------------------------------------------------------ its limit

SIZES = {"0.png": 40 * 60 * 3, "1.png": 80 * 40 * 3, "2.png": 20 * 30 * 3}


@pytest.mark.parametrize("limit", [0, 100, SIZES["0.png"], SIZES["0.png"] + SIZES["2.png"], 10**6])
def test_the_pixels_are_the_same_whatever_is_kept(folder, limit):
    for cache in (open_cache(folder, limit=limit), open_cache(folder, limit=limit)):  # built, then found
        assert cache.pixels.nbytes <= limit
        for key, image in zip(SIZES, cache.images(list(SIZES)), strict=True):
            assert np.array_equal(image, np.asarray(read_image(folder / key, 40)))
            assert np.array_equal(image, cache[key]) and image.flags.writeable
        assert list(cache.errors) == ["broken.png"]
    kept = sum(cache.rows[:, image_cache.OFFSET] >= 0)
    told = f"{3 - kept} of 4 training images are decoded anew in every epoch: the cache of decoded images is "
    told += f"{'off' if limit == 0 else f'limited to {limit / 1024:.1f} KB'} (--data.cache)."
    assert cache.notes == ([] if kept == 3 else [told])


def test_more_room_keeps_more_and_decodes_only_that(folder, monkeypatch):
    open_cache(folder, limit=SIZES["0.png"])
    names = count_reads(monkeypatch)
    open_cache(folder, limit=SIZES["0.png"])
    open_cache(folder, limit=0)  # takes what is there
    assert names == []
    assert open_cache(folder, limit=10**6).notes == []
    assert sorted(names) == ["1.png", "2.png"]


def test_the_size_is_told_before_anything_is_written(folder, capsys):
    open_cache(folder, limit=10_000)
    assert "decoding images (cache: 9.8 KB of about 18.2 KB)" in capsys.readouterr().err
    open_cache(folder, ["0.png"], limit=0)
    assert "decoding images (cache: off)" in capsys.readouterr().err


def test_by_default_half_of_the_free_disk_is_taken_and_some_is_always_left(folder, monkeypatch):
    monkeypatch.setattr(image_cache, "free_bytes", lambda _: 2**30 + 10_000)
    assert open_cache(folder).made_for == (2**30 + 10_000) // 2
    assert open_cache(folder, ["0.png"], limit=10**12).made_for == 10_000


def test_a_disk_that_fills_up_keeps_what_it_had_room_for(folder, monkeypatch):
    class File:
        """A disk with room for so many bytes."""

        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, content):
            if len(content) > self.room:
                raise OSError(28, "No space left on device")
            self.room -= len(content)
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    enter = image_cache.Pixels.__enter__

    def small(self):
        enter(self)
        self.file = File(self.file, SIZES["0.png"] + 10)
        return self

    monkeypatch.setattr(image_cache.Pixels, "__enter__", small)
    cache = open_cache(folder)
    assert "could not be written (No space left on device)" in cache.notes[0]
    assert cache.notes[1].startswith("2 of 4 training images are decoded anew in every epoch")
    for key in SIZES:
        assert np.array_equal(cache[key], np.asarray(read_image(folder / key, 40)))
    assert cache.pixels.nbytes == SIZES["0.png"]
    assert sorted(path.suffix for path in (folder / "cache").iterdir()) == ["", ".bin", ".json"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told_and_done_without(folder):
    (folder / "cache").mkdir(mode=0o555)
    cache = open_cache(folder)
    assert "Permission denied" in cache.notes[0] and np.array_equal(cache["0.png"], read_image(folder / "0.png", 40))


def test_where_the_cache_belongs_lies_a_file(folder):
    (folder / "cache").write_text("")
    cache = open_cache(folder)
    assert "could not be written" in cache.notes[0]
    assert np.array_equal(cache["0.png"], np.asarray(read_image(folder / "0.png", 40)))


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 2**30), ("500 mb", 500 * 2**20), ("1.5T", 3 * 2**39), ("off", 0), ("123", 123), (None, None)],
)
def test_a_limit_is_a_size(text, size):
    assert most_bytes(text) == size


def test_what_is_no_size_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"--data\.cache lots is no size: give the most .* as 20GB, or off"):
        Source("nowhere", cache="lots")


def test_no_images_make_an_empty_cache(folder):
    assert open_cache(folder, []).errors == {}
    assert open_cache(folder, ["broken.png"]).errors.keys() == {"broken.png"}
    assert open_cache(folder, ["broken.png"]).errors.keys() == {"broken.png"}


def test_images_of_the_cache_are_writable_without_changing_it(folder):
    """torch warns about read-only arrays; the map is copy-on-write."""
    open_cache(folder)["0.png"][:] = 0
    assert open_cache(folder)["0.png"].any()


def test_the_index_can_be_read_by_people(folder):
    open_cache(folder)
    index = json.loads((folder / "cache" / "train-40.json").read_text())
    row = index["rows"]["1.png"]
    row = dict(zip(index["columns"], row, strict=True))
    assert (row["height"], row["width"], row["bytes"]) == (80, 40, (folder / "1.png").stat().st_size)
    assert row["modified"] == os.stat(folder / "1.png").st_mtime_ns


def test_the_cache_lies_in_the_folder_unless_that_is_read_only(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    data = tmp_path / "data"
    data.mkdir()
    assert cache_folder(data) == data / ".minivlm_cache"
    data.chmod(0o555)
    elsewhere = cache_folder(data)
    assert elsewhere.parent == tmp_path / "home" / "minivlm" and elsewhere.name.startswith("data-")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(data).parent == tmp_path / ".cache" / "minivlm"


# --------------------------------------------------------------------------------------------------- files of strangers

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(/tmp/harm) (w) file closefile\nshowpage\n"
)


@pytest.mark.parametrize("reader", [read_image, check_header])
def test_no_format_is_opened_that_does_more_than_decode_pixels(tmp_path, reader, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "photo.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(
        UserError, match=r"photo\.jpg cannot be read as an image: it is no image format that is read here"
    ):
        reader(tmp_path / "photo.jpg")
    assert not {"EPS", "WMF", "IPTC", "GRIB", "HDF5", "BUFR", "FITS", "MPEG"} & {*images.formats()}
    assert {".jpg", ".jfif", ".jpe", ".png", ".webp", ".tif"} <= images.extensions()
    assert not {".eps", ".ps", ".wmf", ".pdf", ".mpg", ".h5"} & images.extensions()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_only_regular_files_are_opened(tmp_path, make):
    make(tmp_path / "x.png")
    for reader in (read_image, check_header, read_bytes):
        with pytest.raises(UserError, match=r"x\.png is (no regular file but a named pipe|a folder, where a file)"):
            reader(tmp_path / "x.png")
    with pytest.raises(UserError, match="is no name that a file can have"):
        read_image("a\0b.png")


# -------------------------------------------------------------------------------------------------------- kinds of pixels


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "La", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "I"])
def test_every_mode_shows_the_colour_it_means(mode):
    """A white and a dark picture, opaque, come back as they are: in memory there is no file to ask."""
    for shade in (255, 51 if mode != "1" else 0):  # 51 is in the palette that pillow takes
        through = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)
        picture = Image.new("RGB", (4, 3), (shade,) * 3).convert("L" if mode == "I" else "RGB").convert(through)
        seen = np.asarray(images.to_rgb(picture.convert(mode))).astype(int)
        assert seen.shape == (3, 4, 3) and np.abs(seen - shade).max() <= 2


def test_integers_are_scaled_by_the_depth_of_their_file(tmp_path):
    dark = np.full((3, 4), 200, dtype=np.uint16)  # of 65535
    for name in ("a.png", "a.tif"):
        Image.fromarray(dark).save(tmp_path / name)
        assert read(tmp_path / name).max() == 0
    (tmp_path / "a.pgm").write_bytes(b"P5 4 3 65535\n" + dark.astype(">u2").tobytes())
    assert read(tmp_path / "a.pgm").max() == 0
    for kind, value, shade in (("<i4", 200, 200), ("<i4", 32896, 128), ("<u2", 32896, 128), (">u2", 32896, 128)):
        array = np.full((3, 4), value, dtype=kind)
        mode = {"<i4": "I", "<u2": "I;16", ">u2": "I;16B"}[kind]
        picture = Image.frombytes(mode, (4, 3), array.tobytes())
        assert np.asarray(images.to_rgb(picture)).tolist() == np.full((3, 4, 3), shade).tolist()
    for low, high in ((-1, 5), (0, 65536)):
        with pytest.raises(
            ValueError, match=f"numbers from {low} to {high}, and what is white among them is not known"
        ):
            images.to_rgb(Image.fromarray(np.array([[low, high]], dtype=np.int32)))


def test_a_transparent_colour_of_sixteen_bits_lies_over_white(tmp_path):
    gray = np.array([[1000, 51400]], dtype=np.uint16)
    image = Image.fromarray(gray)
    image.save(tmp_path / "gray.png", transparency=1000)
    assert read(tmp_path / "gray.png").tolist() == [[[255] * 3, [200] * 3]]
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (40, 50, 60))
    image.info["transparency"] = tuple(value * 257 for value in (10, 20, 30))  # as pillow has it of a file of 16 bits
    assert np.asarray(images.to_rgb(image)).tolist() == [[[255] * 3, [40, 50, 60]]]


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_is_obeyed_by_path_and_in_memory(tmp_path, turn):
    """Pillow's own ImageOps is the reference."""
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ("a.png", "a.tif"):
        Image.fromarray(photo()).save(tmp_path / name, exif=exif)
        want = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / name)))
        assert np.array_equal(read(tmp_path / name), want)
        assert np.array_equal(np.asarray(images.to_rgb(Image.open(tmp_path / name))), want)


def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo()).save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    at = data.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(data[:at] + b"XX\xff\xff" + data[at + 4 :])
    assert read(tmp_path / "a.jpg").shape == (40, 60, 3)


# ------------------------------------------------------------------------------------------------------- planted caches


def test_a_changed_picture_of_the_same_size_is_decoded_anew(folder):
    path = folder / "0.png"
    Image.new("RGB", (60, 40), (10, 20, 30)).save(path, compress_level=0)
    assert open_cache(folder)["0.png"][0, 0].tolist() == [10, 20, 30]
    before = path.stat()
    Image.new("RGB", (60, 40), (200, 100, 50)).save(path, compress_level=0)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert path.stat().st_size == before.st_size
    assert open_cache(folder)["0.png"][0, 0].tolist() == [200, 100, 50]


def changed(index, path, value):
    """The index with one of its values exchanged; path: keys, ... for the row of 1.png."""
    *way, last = ("rows", "1.png", path[1]) if path[0] is ... else path
    place = index
    for key in way:
        place = place[key]
    place[last] = value
    return index


STRANGE = [None, -1, -(2**70), 2**70, 1.5, float("nan"), "7", [], {}, True, "", "../a", "/etc/passwd"]


@pytest.mark.parametrize(
    "path",
    [
        *[(key,) for key in ("pixels", "bytes", "rows", "errors", "limit")],
        *[("rows", "1.png"), (..., 2), (..., 3), ("errors", "broken.png"), ("errors", "1.png")],
    ],
)
def test_an_index_that_no_build_wrote_is_made_anew(folder, path):
    want = open_cache(folder)["1.png"].copy()
    index = folder / "cache" / "train-40.json"
    whole = index.read_text()
    for value in STRANGE:
        index.write_text(json.dumps(changed(json.loads(whole), path, value)))
        cache = open_cache(folder)
        assert np.array_equal(cache["1.png"], want) and sorted(cache.errors) in (
            ["broken.png"],
            ["1.png", "broken.png"],
        )
    for text in ("[]", "1", "null", "{}", "[" * 100_000, "9" * 10_000, "\x00"):
        index.write_text(text)
        assert np.array_equal(open_cache(folder)["1.png"], want)


def test_a_cache_that_points_elsewhere_is_neither_read_nor_harmed(folder, monkeypatch):
    want = open_cache(folder)["1.png"].copy()
    index = folder / "cache" / "train-40.json"
    facts = json.loads(index.read_text())
    (pixels,) = (folder / "cache").glob("*.bin")
    elsewhere = folder / "elsewhere.bin"
    elsewhere.write_bytes(b"\0" * facts["bytes"])
    for name in ("../elsewhere.bin", str(elsewhere)):
        index.write_text(json.dumps({**facts, "pixels": name}))
        assert np.array_equal(open_cache(folder)["1.png"], want)
    pixels.unlink()
    pixels.symlink_to(elsewhere)
    index.write_text(json.dumps(facts))
    assert np.array_equal(open_cache(folder)["1.png"], want)
    assert elsewhere.read_bytes() == b"\0" * facts["bytes"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "home"))
    (folder / ".minivlm_cache").symlink_to(folder / "cache")
    assert cache_folder(folder).parent == folder / "home" / "minivlm"
