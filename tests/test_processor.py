from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minivlm import config
from minivlm.errors import UserError
from minivlm.processor import CLIP_MEAN, CLIP_STD, Processor, ProcessorConfig

TEXTS = [f"a {size} {colour} {shape}" for size in ("small", "big") for colour in ("red", "blue") for shape in ("disc",)]


def plain(**options) -> Processor:
    """No tokeniser; pixels come out as their 0 … 255, so that positions can be read off."""
    options = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "rescale": 1.0, **options}
    return Processor(None, ProcessorConfig(**options))


def gradient(height: int, width: int) -> np.ndarray:
    """(H, W, 3): the first channel holds the row, the second the column."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0], image[..., 1] = np.arange(height)[:, None], np.arange(width)
    return image


@pytest.fixture(scope="module")
def trained() -> Processor:
    return Processor.train(TEXTS, vocab_size=300, image_size=32, context=8)


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_paths_arrays_and_pil_images_are_the_same(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "x.png")
    processor = Processor(None, ProcessorConfig(image_size=32))
    images = processor.images([array, Image.fromarray(array), tmp_path / "x.png", str(tmp_path / "x.png")])
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    assert all(torch.equal(images[0], other) for other in images)


def test_pixels_are_rescaled_and_normalised_by_channel():
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Processor(None, ProcessorConfig(image_size=8)).images([array])[0]
    by_hand = (torch.tensor(array) / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(image, by_hand.permute(2, 0, 1), rtol=1e-6, atol=1e-6)


def test_the_shorter_side_is_resized_by_pil_and_the_longer_rounded_down():
    array = np.random.default_rng(0).integers(0, 256, (30, 58, 3), dtype=np.uint8)
    image = plain(image_size=16, crop="none").images([array])[0]
    resized = Image.fromarray(array).resize((30, 16), Image.Resampling.BICUBIC)  # 16 · 58 / 30 = 30.93
    assert torch.equal(image, torch.tensor(np.asarray(resized)).permute(2, 0, 1).float())
    assert plain(image_size=16, crop="none").images([array.transpose(1, 0, 2)]).shape == (1, 3, 30, 16)


def test_squashing_takes_both_sides():
    array = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    image = plain(image_size=16, resize="squash", crop="none", resample="bilinear").images([array])[0]
    resized = Image.fromarray(array).resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(image, torch.tensor(np.asarray(resized)).permute(2, 0, 1).float())


@pytest.mark.parametrize(
    ("crop", "side", "first"),
    [("floor", 13, 1), ("round", 13, 2), ("floor", 11, 0), ("round", 11, 0), ("floor", 14, 2), ("round", 14, 2)],
)
def test_half_a_pixel_is_rounded_as_configured(crop, side, first):
    """A crop of 10 from 13 begins at 1.5: transformers takes 1, torchvision rounds to the even number 2."""
    image = plain(image_size=10, resize="none", crop=crop).images([gradient(side, side + 1)])[0]
    assert image[0, :, 0].tolist() == list(range(first, first + 10))


@pytest.mark.parametrize(("crop", "before"), [("floor", 2), ("round", 1)])
def test_a_smaller_picture_gets_black_around_it(crop, before):
    image = plain(image_size=10, resize="none", crop=crop).images([gradient(7, 12) + 1])[0]
    rows = [0.0] * before + [1.0, 2, 3, 4, 5, 6, 7] + [0.0] * (3 - before)
    assert image[0, :, 5].tolist() == rows
    assert image[1, before].tolist() == list(range(2, 12))


def test_pictures_of_other_modes_become_rgb():
    gray = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image = plain(image_size=8).images([gray])[0]
    assert all(torch.equal(channel, torch.arange(64.0).view(8, 8)) for channel in image)
    clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))  # wholly transparent: what lies under it is white
    assert (plain(image_size=8).images([clear]) == 255).all()


def test_without_a_crop_one_size_at_a_time():
    processor = plain(image_size=8, crop="none")
    assert processor.images([gradient(8, 10)] * 2).shape == (2, 3, 8, 10)
    with pytest.raises(UserError, match=r"different sizes \(8×9, 8×10\)"):
        processor.images([gradient(8, 10), gradient(8, 9)])


def test_one_image_is_a_batch_of_one(tmp_path):
    Image.fromarray(gradient(8, 8)).save(tmp_path / "x.png")
    expected = plain().images([tmp_path / "x.png"])
    for one in (str(tmp_path / "x.png"), Image.open(tmp_path / "x.png"), gradient(8, 8)):
        assert torch.equal(plain().images(one), expected)


def test_images_and_texts_together_are_what_a_model_is_called_with(trained):
    inputs = trained(text=["a small red disc", "disc"], images=gradient(8, 8), return_tensors="pt", padding=True)
    tokens, mask = trained.text(["a small red disc", "disc"])
    assert torch.equal(inputs["tokens"], tokens) and torch.equal(inputs["mask"], mask)
    assert torch.equal(inputs["images"], trained.images([gradient(8, 8)])) and len(inputs) == 3
    assert list(trained(gradient(8, 8))) == ["images"] and list(trained(text="disc")) == ["tokens", "mask"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"return_tensors": "np"}, "leave both out"),
        ({"padding": False}, "leave both out"),
        ({"text": None}, "images, text"),
    ],
)
def test_what_a_processor_does_not_do_is_refused_in_a_sentence(trained, wrong, told):
    with pytest.raises(UserError, match=told):
        trained(**{"text": "disc", **wrong})


def test_no_pictures_are_an_empty_batch():
    assert plain(image_size=8).images([]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("crop", ["floor", "round"])
@pytest.mark.parametrize("sides", [(1, 100_000), (61, 15_000)])
def test_a_line_of_pixels_does_not_fill_the_memory(crop, sides):
    """1×100,000 at 224 would be 224 × 22,400,000."""
    line = np.zeros((*sides, 3), dtype=np.uint8)
    line[:, sides[1] // 2 :] = 255
    seen = plain(image_size=224, crop=crop).images([line, line.transpose(1, 0, 2)])
    assert seen.shape == (2, 3, 224, 224) and torch.equal(seen[1], seen[0].mT)
    left, right = seen[0, :, :, :112].mean(), seen[0, :, :, 112:].mean()
    assert left < 128 < right
    with pytest.raises(UserError, match="1×100000 is too narrow"):
        plain(image_size=224, crop="none").images([np.zeros((100_000, 1, 3), dtype=np.uint8)])


@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("resize_to", [32, 40, 20])
@pytest.mark.parametrize("size", [(31, 401), (400, 30), (1, 500), (801, 3)])
def test_the_middle_of_a_narrow_picture_is_what_the_crop_of_the_whole_would_keep(monkeypatch, size, resize_to, tiles):
    coarse = np.random.default_rng(0).integers(40, 216, (4, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    processor = plain(image_size=32, resize_to=resize_to, tiles=tiles)
    whole = processor.images([picture])
    monkeypatch.setattr("minivlm.datasets.images.MAX_PIXELS", 900)
    assert (processor.images([picture]) - whole).abs().max() <= 2  # rounded in another order


def test_a_picture_in_memory_lies_as_its_exif_says_and_a_broken_one_is_one_sentence(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gradient(40, 50)).save(tmp_path / "a.jpg", exif=exif)
    processor = plain(image_size=32)
    by_path = processor.images([tmp_path / "a.jpg"])
    assert torch.equal(processor.images([Image.open(tmp_path / "a.jpg")]), by_path)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-100])
    with pytest.raises(UserError, match="an image cannot be read: image file is truncated"):
        processor.images([Image.open(tmp_path / "b.jpg")])
    with pytest.raises(UserError, match="an image cannot be read: its pixels are floating-point numbers"):
        processor.images([Image.new("F", (4, 4))])


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "x.jpg").write_text("no picture")
    for name in ("x.jpg", "missing.jpg"):
        with pytest.raises(UserError, match=name):
            plain().images([tmp_path / name])


@pytest.mark.parametrize("picture", [np.zeros((8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8), np.zeros((8, 8, 3)), 7])
def test_other_arrays_are_refused_with_their_shape(picture):
    with pytest.raises(TypeError, match=r"uint8, not|not int"):
        plain().images([picture])


# ---- strings ---------------------------------------------------------------------------------------------------------


def test_texts_are_framed_and_padded_on_the_right(trained):
    tokens, mask = trained.text(["a small red disc", "disc", ""])
    assert tokens.dtype == torch.int64 and mask.dtype == torch.bool and tokens.shape == mask.shape
    assert mask.sum(dim=1).tolist() == [6, 3, 2]  # a word is one token, wherever it stands
    assert (tokens[:, 0] == trained.start_token).all()
    assert [row[m][-1].item() for row, m in zip(tokens, mask, strict=True)] == [trained.end_token] * 3
    assert (tokens[~mask] == trained.pad_token).all()
    assert tokens[1, 1] == tokens[0, 4]


def test_no_texts_are_an_empty_batch(trained):
    assert trained.text([])[0].shape == (0, 0)


def test_one_string_is_a_batch_of_one(trained):
    assert all(map(torch.equal, trained.text("disc"), trained.text(["disc"])))
    with pytest.raises(TypeError, match="a list of strings"):
        trained.encode("disc")  # whose result is a list for each


def test_longer_texts_are_cut_only_when_asked(trained):
    long = "a small red disc " * 4
    tokens, mask = trained.text([long, "disc"])
    assert tokens.shape[1] == 18 and mask[0].all()  # nothing is cut unseen
    cut, cut_mask = trained.text([long, "disc"], cut=True)
    assert cut.shape[1] == trained.context == 8
    assert cut[0].tolist() == [*tokens[0, :7].tolist(), trained.end_token]
    assert cut[1].tolist() == tokens[1, :8].tolist() and cut_mask[1].tolist() == mask[1, :8].tolist()
    assert trained.too_long([long, "disc", long, "a small red disc"]) == 2


def test_padding_to_the_context():
    source = Processor.train(TEXTS, vocab_size=300, image_size=32, context=8).tokenizer
    processor = Processor(source, ProcessorConfig(context=8, pad_token="<image>", pad_to_context=True))
    tokens, mask = processor.text(["disc"])
    assert tokens.shape == (1, 8) and mask.sum() == 3
    assert (tokens[0, 3:] == source.token_to_id("<image>")).all()


def test_texts_that_have_no_end_token_are_cut_plainly():
    """A tokeniser that puts a token in front alone, as LLaMA's does."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    processor = Processor(tokenizer, ProcessorConfig(context=3))
    assert (processor.start_token, processor.end_token) == (0, None)
    assert processor.text(["a b a b"], cut=True)[0].tolist() == [[0, 1, 2]]
    assert processor.decode(torch.tensor([[0, 1, 2]])) == ["a b"]


def test_settings_inside_a_tokenizer_file_do_not_pad_or_cut(trained):
    copy = Tokenizer.from_str(trained.tokenizer.to_str())
    copy.enable_truncation(3)
    copy.enable_padding(length=20)
    processor = Processor(copy.to_str().encode(), trained.config)
    assert processor.text(["a small red disc"])[0].tolist() == trained.text(["a small red disc"])[0].tolist()


def test_decoding_stops_at_the_end_token(trained):
    tokens, _ = trained.text(["a small red disc", "disc"])
    assert trained.decode(tokens) == trained.decode(tokens.tolist()) == ["a small red disc", "disc"]
    word = tokens[1, 1].item()
    assert trained.decode([[word, trained.end_token, word, word], [word, word]]) == ["disc", "disc disc"]


def test_what_is_encoded_comes_back(trained):
    texts = ["zürich 你好 😀", "it's 12 o'clock", "mixed case and spaces"]
    assert trained.decode(trained.text(texts)[0]) == texts
    assert trained.decode(trained.text(["  Mixed   CASE and \n spaces "])[0]) == ["mixed case and spaces"]


# ---- tokeniser -------------------------------------------------------------------------------------------------------


def test_training_is_deterministic():
    texts = [f"{a} {b}" for a in ("red", "green", "blue") for b in ("disc", "square", "ring")]
    first, second = (Processor.train(iter(texts), vocab_size=280, image_size=8, context=8) for _ in range(2))
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert first.vocab_size <= 280


def test_special_tokens(trained):
    ids = [trained.tokenizer.token_to_id(token) for token in ("<pad>", "<start>", "<image>", "<end>")]
    assert (trained.pad_token, trained.start_token, trained.end_token) == (ids[0], ids[1], ids[3])
    assert trained.end_token != 2  # which transformers would read as "the largest id"
    shows = Processor(trained.tokenizer, replace(trained.config, image_tokens=1))
    assert ids[2] in shows.text(["what is <image> this"])[0][0].tolist()


def test_a_vocabulary_without_room_for_all_bytes():
    with pytest.raises(UserError, match=r"a vocabulary of 100 is too small: .* alone are 260"):
        Processor.train(TEXTS, vocab_size=100, image_size=8, context=8)


def test_no_tokeniser_is_said_when_the_first_text_comes():
    with pytest.raises(UserError, match=r"no tokeniser beside these weights.* a tokenizer\.json is wanted"):
        plain().text(["a"])


def test_a_broken_tokeniser_is_one_sentence():
    with pytest.raises(UserError, match="cannot be read as a tokeniser"):
        Processor(b"{}", ProcessorConfig()).text(["a"])


def test_an_unknown_padding_token_is_named(trained):
    with pytest.raises(UserError, match="no token '<nothing>'"):
        Processor(trained.tokenizer, ProcessorConfig(pad_token="<nothing>")).text(["a"])


def test_the_config_survives_json():
    for c in (ProcessorConfig(), ProcessorConfig(pad_token="</s>", crop="round", resize_to=40, mean=(0.1, 0.2, 0.3))):
        assert config.from_dict(ProcessorConfig, config.to_dict(c)) == c


@pytest.mark.parametrize("text", ["a \ud83d cat", "caf\udce9"])
def test_what_is_no_text_is_refused_in_one_sentence(trained, text):
    for ask in (lambda: trained.text(["fine", text], cut=True), lambda: trained.ids(text)):
        with pytest.raises(UserError, match=r"is no valid text: it holds (half a surrogate|a byte that is no UTF-8)"):
            ask()
    assert trained.text(["a\x00b"])[1].any()


def test_words_of_an_ascii_command_line_are_put_together():
    p = Processor.train(["é → 左"], image_size=8, context=16)
    by_the_byte = "é → 左".encode().decode("ascii", "surrogateescape")  # what sys.argv holds there
    assert p.encode([by_the_byte]) == p.encode(["é → 左"])


@pytest.mark.parametrize("context", [6, 12, 40])
def test_texts_that_are_too_long_are_counted_as_if_all_were_tokenised(context):
    texts = ["", "a", "a red kite", "x" * 30, "é" * 12, "qzx" * 4, "a kite " * 9]
    processor = Processor.train(["a red kite"], vocab_size=300, image_size=8, context=context)
    assert processor.too_long(texts) == sum(len(row) > context for row in processor.encode(texts))
