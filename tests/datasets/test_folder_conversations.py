"""Folders of conversations, questions and captions: what is read, what is said, and one sentence for every mistake."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from minivlm.conversation import Turn, encode_conversation
from minivlm.datasets import Question, check, open_conversations, open_pairs
from minivlm.datasets.folder_entries import read_entries
from minivlm.errors import UserError
from tests.speakers import processor


def photo(seed):
    """A random image, (50, 70, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    """0.png to 5.png in images/, and nothing that is said about them."""
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(photo(i)).save(tmp_path / "images" / f"{i}.png")
    return tmp_path


def write_lines(folder, *lines, name="vqa.jsonl"):
    (folder / name).write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")


def write_conversations(folder, *entries):
    (folder / "conversations.json").write_text(json.dumps(entries), encoding="utf-8")


def entry(*texts, image=None, **more):
    """Human and gpt take turns."""
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {**({} if image is None else {"image": image}), "conversations": turns, **more}


def talk_of(folder, split="train", image_size=32):
    return open_conversations(folder, split, image_size=image_size)


def rng(seed=0):
    return np.random.default_rng(seed)


# ------------------------------------------------------------------------------------------------------------- questions

QUESTIONS = [
    {"image": "0.png", "question": "what is it?", "answer": "a cat", "split": "train"},
    {"image": "images/0.png", "question": "how many?", "answer": 2, "split": "train", "answer_type": "number"},
    {"image": "0.png", "question": "held out?", "answer": "yes", "split": "test", "kind": "yes/no"},
    {"image": "1.png", "question": "where?", "answers": ["left", "at home", "at home"], "split": "val"},
    {
        "image": "2.png",
        "question": "who?",
        "answer": "a, b",
        "answers": ["a", "b"],
        "split": "test",
        "question_type": "w",
    },
]


def test_questions_about_one_image_are_one_sample(folder):
    write_lines(folder, *QUESTIONS)
    train, val, test = (talk_of(folder, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1, 1, 2)
    assert [train.key(0), val.key(0), test.key(0), test.key(1)] == [f"images/{i}.png" for i in (0, 1, 0, 2)]
    assert train.questions() == [Question(0, "what is it?", ("a cat",)), Question(0, "how many?", ("2",), "number")]
    assert val.questions() == [Question(0, "where?", ("left", "at home", "at home"))]
    assert test.questions() == [  # what is learnt is right as well
        Question(0, "held out?", ("yes",), "yes/no"),
        Question(1, "who?", ("a, b", "a", "b"), "w"),
    ]
    assert val.conversation(0, rng())[1].text == "at home"  # what most people said
    assert list(train.texts()) == ["what is it? a cat", "how many? 2"]
    assert train.captions(0) == [] and train.notes == [] and train.one_image_each


def test_a_conversation_asks_up_to_four_questions_in_any_order(folder):
    write_lines(folder, *({"image": "0.png", "question": f"q{i}", "answer": f"a{i}"} for i in range(6)))
    talk = talk_of(folder)
    said, firsts, asked = talk.conversation(0, rng()), set(), set()
    assert said == talk.conversation(0, rng()) != talk.conversation(0, rng(1))
    for seed in range(60):
        turns = talk.conversation(0, rng(seed))
        assert [turn.role for turn in turns] == ["user", "assistant"] * 4
        assert turns[0].text.startswith("<image>\n") and not any("<image>" in turn.text for turn in turns[1:])
        texts = [turn.text.removeprefix("<image>\n") for turn in turns]
        assert all(q[1:] == a[1:] for q, a in zip(texts[::2], texts[1::2], strict=True))
        assert len(set(texts)) == 8
        firsts.add(texts[0])
        asked.update(texts[::2])
    assert firsts == asked == {f"q{i}" for i in range(6)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"it is not JSON \(.*\"question\": "),
        ({"question": "q", "answer": "a"}, 'it names no "image"'),
        ({"image": "0.png", "answer": "a"}, 'it has no "question"'),
        ({"image": "0.png", "question": " ", "answer": "a"}, 'it has no "question"'),
        ({"image": "0.png", "question": "q"}, "it has no answer"),
        ({"image": "0.png", "question": "q", "answers": []}, "it has no answer"),
        ({"image": "0.png", "question": "q", "answer": ["a"]}, "an answer is a string"),
        ({"image": "0.png", "question": "q", "answers": [{"answer": "a"}]}, "an answer is a string"),
        ({"image": "0.png", "question": "q", "answer": float("nan")}, "an answer is a string"),
        ({"image": "0.png", "question": "q", "answer": None, "answers": None}, "it has no answer"),
        ({"image": "0.png", "question": "q", "answer": " "}, "its answer is empty"),
        ({"image": "9.png", "question": "q", "answer": "a"}, "there is no image '9.png'"),
        ({"image": "0.png", "question": "q", "answer": "a", "split": "dev"}, "its split is 'dev'"),
    ],
)
def test_a_broken_line_is_named_by_its_number(folder, line, message):
    write_lines(folder, QUESTIONS[0], "", line, name="questions.jsonl")
    with pytest.raises(UserError, match=r"questions\.jsonl, line 3: " + message):
        talk_of(folder)


def test_a_file_without_questions_is_an_error(folder):
    write_lines(folder)
    with pytest.raises(UserError, match=r"vqa\.jsonl is empty: it needs one line a question"):
        talk_of(folder)


# --------------------------------------------------------------------------------------------------------- conversations


def test_llavas_format_is_read(folder):
    write_conversations(
        folder,
        entry("<image>\nwhat is it?", "a cat ", "really?", "yes", image="0.png", id="x1", split="train"),
        entry("which <image> or <image>?", "the first", image=["1.png", "2.png"], split="train"),
        {
            "id": "words",
            "split": "train",
            "conversations": [
                {"from": "system", "value": "be brief."},
                {"from": "human", "value": "hello"},
                {"from": "gpt", "value": "hi"},
            ],
        },
        entry("one <image>", "so", "and another <image>", "so so", image=["3.png", "4.png"], split="test"),
    )
    talk = talk_of(folder)
    assert [talk.key(i) for i in range(len(talk))] == ["images/0.png", "images/1.png", "words"]
    assert [len(pictures) for pictures in talk.images([0, 1, 2])] == [1, 2, 0] and not talk.one_image_each
    assert talk.conversation(0, rng()) == [
        Turn("user", "<image>\nwhat is it?"),
        Turn("assistant", "a cat "),
        Turn("user", "really?"),
        Turn("assistant", "yes"),
    ]
    assert talk.conversation(2, rng())[0] == Turn("system", "be brief.")
    assert talk.questions() == [Question(0, "what is it?", ("a cat",)), Question(1, "which or ?", ("the first",))]
    assert list(talk.texts()) == ["what is it? a cat", "really? yes", "which or ? the first", "hello hi"]
    test = talk_of(folder, "test")
    assert test.questions() == []  # the first one does not come with all pictures
    assert [a.tolist() for a in test.images([0])[0]] == [photo(3).tolist(), photo(4).tolist()]


GOOD = entry("<image> q", "a", image="0.png")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (entry("<image> q", "a", image="9.png"), r"entry 2: there is no image '9\.png', neither in"),
        (entry("<image> q", "a", image="9.png", id="x7"), r"entry 2 \(id x7\): there is no image '9\.png'"),
        (
            entry("q", "a", image="0.png"),
            "entry 2: the number of <image> placeholders in the conversation is 0, .* is 1",
        ),
        (
            entry("<image> q", "a"),
            "entry 2: the number of <image> placeholders in the conversation is 1, .* is 0",
        ),
        (entry("<image> q", "", image="0.png"), r"entry 2: turn 2, the assistant's, is empty: .* word\.$"),
        (entry("<image> q", image="0.png"), "entry 2: there is nothing to learn"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "entry 2: the conversation starts with the assistant"),
        ({"conversations": [{"from": "bot", "value": "a"}]}, "entry 2: turn 1 has the unknown role 'bot'"),
        ({"conversations": [{"from": "human"}]}, "entry 2: a turn looks like"),
        ({"conversations": ["a"]}, "entry 2: a turn looks like"),
        ({"image": "0.png"}, 'entry 2: it has no list "conversations"'),
        ("a", 'entry 2: it has no list "conversations"'),
        (entry("<image> q", "a", image=[3]), 'entry 2: its "image" is no file name'),
        (entry("<image> q", "a", image="0.png", split="dev"), "entry 2: its split is 'dev'"),
    ],
)
def test_a_broken_entry_is_named(folder, broken, message):
    write_conversations(folder, GOOD, broken)
    with pytest.raises(UserError, match=r"conversations\.json, " + message):
        talk_of(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("[", "is not JSON"), ("{}", "no list of conversations"), ("[]", "no list")]
)
def test_a_file_that_is_no_list_of_conversations_is_an_error(folder, text, message):
    (folder / "conversations.json").write_text(text)
    with pytest.raises(UserError, match=r"conversations\.json " + message.replace("no list", "holds no list")):
        talk_of(folder)


def test_a_folder_without_pictures_is_fine(folder):
    write_conversations(folder, entry("hello", "hi"))
    talk = talk_of(folder)
    assert talk.images([0]) == [[]] and talk.key(0) == "entry 1" and talk.questions() == []


# ---------------------------------------------------------------------------------------------------- captions and splits


def test_captions_are_asked_for(folder):
    write_lines(folder, {"image": "0.png", "captions": ["a cat", "my cat"]}, name="captions.jsonl")
    talk = talk_of(folder)
    said = [talk.conversation(0, rng(seed)) for seed in range(20)]
    assert {turns[0] for turns in said} == {Turn("user", "<image>\ndescribe the picture.")}
    assert {turns[1].text for turns in said} == {"a cat", "my cat"} == set(talk.captions(0))
    assert talk.questions() == [] and list(talk.texts()) == ["describe the picture.", "a cat", "my cat"]


def test_a_mark_that_a_question_an_answer_or_a_caption_spells_is_a_word(folder):
    words = processor()
    write_lines(
        folder, {"image": "0.png", "split": "train", "question": "what does <image> mean?", "answer": "an <image>"}
    )
    samples = [encode_conversation(talk_of(folder).conversation(0, rng()), words, images=1)]
    write_lines(folder, {"image": "0.png", "split": "train", "caption": "see <image> here"}, name="captions.jsonl")
    (folder / "vqa.jsonl").unlink()
    samples.append(encode_conversation(talk_of(folder).conversation(0, rng()), words, images=1))
    assert [sample.tokens.count(words.image_token_id) for sample in samples] == [words.config.image_tokens] * 2
    assert "see <image> here" in words.decode([samples[1].tokens])[0]


def test_splits_are_drawn_by_the_name_of_the_image(folder):
    """Whatever is said about it, in whichever file: all of it lands in one split, the one that `open_pairs` draws."""
    names = [f"{i}.png" for i in range(60)]
    for i, name in enumerate(names):
        Image.fromarray(photo(i)[:8, :8]).save(folder / "images" / name)
    write_lines(folder, *({"image": name, "caption": name} for name in names), name="captions.jsonl")
    drawn = {split: [pairs.key(i) for i in range(len(pairs))] for split, pairs in pairs_of_all(folder).items()}
    assert all(len(keys) > 2 for keys in drawn.values())
    write_lines(folder, *({"image": n, "question": q, "answer": "a"} for q in ("q", "r") for n in names))
    for split, keys in drawn.items():
        talk = talk_of(folder, split)
        assert [talk.key(i) for i in range(len(talk))] == keys  # captions and questions of an image are one sample
        assert talk.captions(0) == [keys[0].removeprefix("images/")] and len(talk.asked(0, rng())) == 2
        assert talk.notes == [
            "No val and test split are given: a tenth of the images each, by a hash of the file name."
        ]
    write_conversations(folder, *(entry("<image> q", "a", image=name) for name in names + names))
    for split, keys in drawn.items():
        talk = talk_of(folder, split)
        assert [talk.key(i) for i in range(len(talk))] == keys + keys + keys  # and the questions
    with pytest.raises(UserError, match="no split 'dev'"):
        talk_of(folder, "dev")


def pairs_of_all(folder):
    return {split: open_pairs(folder, split, image_size=32) for split in ("train", "val", "test")}


# -------------------------------------------------------------------------------------------------------------- pictures


def test_training_pictures_are_cached_and_the_others_are_the_originals(folder):
    write_lines(folder, *QUESTIONS)
    ((small,),), ((original,),) = talk_of(folder).images([0]), talk_of(folder, "val").images([0])
    assert small.shape == (40, 56, 3)  # the shorter side is 1.25 · 32
    assert np.array_equal(original, photo(1)) and original.flags.writeable
    assert (folder / ".minivlm_cache").is_dir()


def test_where_no_picture_is_looked_at_none_is_decoded(folder):
    write_lines(folder, *QUESTIONS)
    (folder / "images" / "0.png").write_text("no image")
    assert len(list(talk_of(folder, "train", None).texts())) == 2
    assert len(talk_of(folder, "test", None)) == 2
    assert not (folder / ".minivlm_cache").exists()


def test_broken_pictures_are_skipped_in_training_with_all_that_is_said_about_them(folder):
    write_conversations(
        folder,
        entry("<image> q", "a", image="0.png", split="train"),
        entry("<image><image> q", "a", image=["1.png", "0.png"], split="train"),
        entry("<image> q", "a", image="2.png", split="train"),
        entry("q", "a", split="train", id="words"),
        entry("<image> q", "a", image="3.png", split="test"),
    )
    for i in (0, 3):
        (folder / "images" / f"{i}.png").write_text("no image")
    talk = talk_of(folder)
    assert [talk.key(i) for i in range(len(talk))] == ["images/2.png", "words"]
    assert list(talk.skipped) == ["images/0.png"]
    (note,) = (note for note in talk.notes if "skipped" in note)
    assert note.startswith("1 of 3 training images are skipped. ") and "images/0.png cannot be read" in note
    with pytest.raises(UserError, match=r"3\.png cannot be read as an image"):
        talk_of(folder, "test")


def test_nothing_that_can_be_read_is_an_error(folder):
    write_lines(folder, QUESTIONS[0])
    (folder / "images" / "0.png").write_text("no image")
    with pytest.raises(UserError, match=r"None of the 1 training images can be read; the first: .*0\.png"):
        talk_of(folder)


# ------------------------------------------------------------------------------------------- as images with captions, too


def test_questions_are_captions_for_open_pairs(folder):
    write_lines(folder, *QUESTIONS)
    train, test = (open_pairs(folder, split, image_size=32) for split in ("train", "test"))
    assert [train.all_captions(i) for i in range(len(train))] == [["what is it? a cat", "how many? 2"]]
    assert [test.all_captions(i) for i in range(len(test))] == [["held out? yes"], ["who? a, b"]]
    assert train.key(0) == "images/0.png" == test.key(0) and train.images([0])[0].shape == (40, 56, 3)


def test_answers_of_a_conversation_are_captions_for_open_pairs(folder):
    write_conversations(
        folder,
        entry("<image> q", "a cat", "and?", "a dog", image="0.png", split="train"),
        entry("<image> r", "a dog", "or?", "a cow", image="0.png", split="train"),
        entry("<image> <image>", "two", image=["1.png", "2.png"], split="train"),
        entry("hello", "hi", split="train"),
        entry("<image>", "a test", image="3.png", split="test"),
    )
    train = open_pairs(folder, "train", image_size=32)
    assert [train.all_captions(i) for i in range(len(train))] == [["a cat", "a dog", "a cow"]]
    write_conversations(folder, entry("hello", "hi"))
    with pytest.raises(UserError, match="no conversation about one image alone"):
        open_pairs(folder, "train", image_size=32)


def test_captions_go_first_for_open_pairs(folder):
    write_lines(folder, *QUESTIONS)
    write_lines(folder, {"image": "0.png", "caption": "a cat"}, name="captions.jsonl")
    assert open_pairs(folder, "train", image_size=32).all_captions(0) == ["a cat"]


def test_the_check_reads_such_a_folder_and_names_every_problem(folder, capsys):
    write_lines(folder, *QUESTIONS, {"image": "9.png", "question": "q", "answer": "a"}, {"image": "0.png"})
    with pytest.raises(SystemExit) as stop:
        check.main([str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 1 and "problems: 2" in lines
    assert any("line 6: there is no image '9.png'" in line for line in lines)
    assert any('line 7: it has no "question"' in line for line in lines)
    assert ["train", "1", "2", "-"] in [line.split() for line in lines]

    (folder / "vqa.jsonl").unlink()
    write_conversations(folder, GOOD, entry("<image> q", "a", image="9.png"))
    with pytest.raises(SystemExit) as stop:
        check.main([str(folder)])
    assert stop.value.code == 1 and "conversations.json, entry 2: there is no image '9.png'" in capsys.readouterr().out


def test_half_a_surrogate_pair_is_told_by_its_entry(folder):
    fine = entry("<image>\nwhat?", "a kite", image="0.png")
    write_conversations(folder, fine, entry("<image>\nwhat?", "a \ud83d kite", image="0.png"))
    with pytest.raises(UserError, match=r"conversations\.json, entry 2.*: “a \\ud83d kite” is no valid text"):
        talk_of(folder)
    problems = []
    assert len(read_entries(folder, problems)) == 1 and len(problems) == 1


@pytest.mark.parametrize("name", ["conversations.json", "vqa.jsonl"])
def test_a_pipe_is_told_and_not_waited_for(folder, name):
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=rf"{name} is no regular file but a named pipe"):
        talk_of(folder)
