import numpy as np
import pytest
from PIL import Image

from minivlm.datasets.class_episodes import class_episodes, class_lessons, read_classes
from minivlm.datasets.shapes.episodes import is_held_out
from minivlm.errors import UserError


def draw(folder, classes, pictures=4):
    """Alphabets of characters: the red value of a picture tells its class, the green one which picture it is."""
    for i in range(classes):
        place = folder / f"alphabet{i // 3}" / f"character{i % 3}"
        place.mkdir(parents=True)
        for j in range(pictures):
            Image.new("RGB", (3, 3), (10 * i, 10 * j, 0)).save(place / f"{j}.png")
    return folder


@pytest.fixture
def omniglot(tmp_path):
    draw(tmp_path / "train", 6)
    return draw(tmp_path / "test", 5).parent


def test_a_class_is_a_folder_that_holds_pictures(omniglot):
    (omniglot / "test" / ".hidden").mkdir()
    Image.new("RGB", (3, 3)).save(omniglot / "test" / ".hidden" / "0.png")
    test = read_classes(omniglot, "test")
    assert [one.image for one in test] == [f"test/alphabet{i // 3}/character{i % 3}" for i in range(5)]
    assert all([path.name for path in one.images] == ["0.png", "1.png", "2.png", "3.png"] for one in test)
    assert {one.image.split("/")[0] for one in read_classes(omniglot, "train")} == {"train"}


def test_classes_are_drawn_into_splits_as_a_whole(tmp_path):
    draw(tmp_path, 60, pictures=1)
    splits = [{one.image for one in read_classes(tmp_path, split)} for split in ("train", "val", "test")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 60 and all(len(split) > 1 for split in splits)


@pytest.mark.parametrize(("ways", "shots"), [(5, 5), (3, 6), (2, 3), (4, 0)])
def test_an_episode_names_pictures_of_a_few_classes(omniglot, ways, shots):
    episodes = class_episodes(omniglot, 40, shots=shots, ways=ways)
    asked = set()
    for examples, query in episodes:
        named = {}
        for image, label in [*examples, query]:
            assert named.setdefault(label, image[0, 0, 0]) == image[0, 0, 0] and is_held_out(label)
        assert len({*named.values()}) == len(named)
        counts = [sum(shot.label == label for shot in examples) for label in {shot.label for shot in examples}]
        assert len(examples) == shots and len(counts) == min(ways, shots) and max([0, *counts]) == -(-shots // ways)
        assert len({shot.image.tobytes() for shot in [*examples, query]}) == shots + 1  # the query's picture is new
        asked.add(query.image[0, 0, 0])
    assert len(asked) > 2
    again = class_episodes(omniglot, 40, shots=shots, ways=ways)
    assert [e.query.label for e in again] == [e.query.label for e in episodes]
    assert [e.query.label for e in class_episodes(omniglot, 40, shots=shots, ways=ways, seed=1)] != [
        e.query.label for e in episodes
    ]


def test_lessons_to_train_on_know_their_pictures(omniglot):
    classes = read_classes(omniglot, "test")
    lessons, pictures = class_lessons(classes)
    meant = {}
    for picture, word in lessons.episode(np.random.default_rng(0), shots=4, ways=2, held_out=False):
        assert not is_held_out(word)
        assert meant.setdefault(word, pictures[picture].parent) == pictures[picture].parent
    assert len(meant) == 2


def test_what_is_missing_is_told(omniglot, tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        class_episodes(tmp_path / "nowhere", 1, shots=1)
    with pytest.raises(UserError, match=r"has 5 test classes .* but an episode has 6: ask for fewer --ways, or put"):
        class_episodes(omniglot, 1, shots=6, ways=6)
    with pytest.raises(
        UserError, match=r"character0 has 4 images, but an episode shows 4 of them and asks for another"
    ):
        class_episodes(omniglot, 1, shots=8, ways=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no sub-folders of images, one a class"):
        class_episodes(tmp_path / "empty", 1, shots=1)


@pytest.mark.parametrize("names", [("2023", "2024"), ("00000", "00001")])
def test_what_is_no_class_is_no_class_of_an_episode_either(tmp_path, names):
    for name in names:
        (tmp_path / name).mkdir()
        Image.new("RGB", (3, 3)).save(tmp_path / name / "0.png")
    with pytest.raises(UserError, match="so their names would be"):
        read_classes(tmp_path, "train")
    (tmp_path / "class_names.txt").write_text("".join(f"{name} anything\n" for name in names))
    assert [one.image for one in read_classes(tmp_path, "train")] == list(names)


def test_synsets_are_classes_where_no_name_is_read(tmp_path):
    for name in ("n01440764", "n01443537"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (3, 3)).save(tmp_path / "train" / name / "0.jfif", format="JPEG")
    assert len(read_classes(tmp_path, "train")) == 2
