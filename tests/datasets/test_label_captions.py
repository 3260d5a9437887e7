"""Labels as captions of training images, for a share of the time."""

import json

import numpy as np
import pytest
from PIL import Image

import train
from minivlm.datasets.folder import TEMPLATES, open_pairs
from minivlm.datasets.label_captions import LabelCaptions
from minivlm.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Eight images to train on, the last without a label; one to judge by each split, of a class that is never trained."""
    folder = tmp_path / "photos"
    folder.mkdir()
    splits = ["train"] * 8 + ["val", "test"]
    rows = []
    for i, split in enumerate(splits):
        Image.new("RGB", (20, 20), (i * 20, 90, 0)).save(folder / f"{i}.png")
        label = "held_out" if split != "train" else ["red_rose", "oak", "fir"][i % 3] if i < 7 else None
        rows.append(
            {"image": f"{i}.png", "caption": f"thing {i}", "split": split} | ({"label": label} if label else {})
        )
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def captions_of(pairs, times=400):
    rng = np.random.default_rng(0)
    return [pairs.captions(range(8), rng) for _ in range(times)]


def test_a_labelled_image_has_its_class_for_a_caption_for_a_share_of_the_time(folder):
    pairs = LabelCaptions(open_pairs(folder, "train", image_size=16), 0.25, folder)
    drawn = captions_of(pairs)
    sentences = {template.format("red rose") for template in TEMPLATES}
    first = [captions[0] for captions in drawn]
    assert set(first) == {"thing 0", *sentences}
    assert 0.2 < np.mean([caption in sentences for caption in first]) < 0.3
    assert {captions[7] for captions in drawn} == {"thing 7"}  # it has no label
    assert any("7 of the 8 training images have a label" in note for note in pairs.notes)
    assert set(captions_of(LabelCaptions(pairs.pairs, 1.0, folder), 1)[0][:7]).isdisjoint(
        {f"thing {i}" for i in range(8)}
    )


def test_no_training_text_names_a_class_of_held_out_images_alone(folder):
    pairs = LabelCaptions(open_pairs(folder, "train", image_size=16), 0.5, folder)
    assert "held_out" in pairs.classes
    texts = [*pairs.texts(), *(text for captions in captions_of(pairs) for text in captions)]
    assert any("oak" in text for text in texts) and not any("held" in text for text in texts)


def test_a_folder_without_labels_and_a_share_that_is_none_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="between 0 and 1"):
        LabelCaptions(open_pairs(folder, "train", image_size=16), 1.5, folder)
    text = (folder / "captions.jsonl").read_text().replace('"label"', '"kind"')
    (folder / "captions.jsonl").write_text(text)
    with pytest.raises(UserError, match="has a label to make a sentence of"):
        train.main(["clip", "--data", str(folder), "--out", str(tmp_path / "out"), "--data.label_captions", "0.5"])
