"""What nothing can be learnt from is left out, counted and named; what cannot be judged by is told before the first step."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from minivlm.conversation import Turn
from minivlm.datasets import check, judge, open_conversations
from minivlm.datasets.contents import contents
from minivlm.datasets.interleaved import Interleaved
from minivlm.datasets.judge import conversation_problem
from minivlm.errors import UserError
from minivlm.processor import Processor
from minivlm.recipes import plan

LONG = "why " * 150


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 0, 0)).save(tmp_path / f"{i}.png")
    return tmp_path


def processor(context=96):
    """Of a model in whose texts a picture takes one place."""
    made = Processor.train(["what is it? a cat", "why"], vocab_size=300, image_size=16, context=context)
    return Processor(made.tokenizer, replace(made.config, image_tokens=1))


def conversations(folder, *asked, **more):
    said = lambda q: [{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": "a cat"}]
    entries = [
        {"id": f"x{i}", "image": f"{i}.png", "conversations": said(q), "split": "train"} for i, q in enumerate(asked)
    ]
    for split in ("val", "test"):
        entries.append({"image": "3.png", "conversations": said(more.get(split, "what is it?")), "split": split})
    (folder / "conversations.json").write_text(json.dumps(entries), encoding="utf-8")


def test_a_link_to_nowhere_beside_the_data_is_no_obstacle(folder):
    conversations(folder, "what is it?")
    (folder / "old.json").symlink_to("nowhere.json")
    assert contents(folder)["train"]["conversations"] == 1


def checked(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        check.main([str(a) for a in argv])
    return stop.value.code, capsys.readouterr().out


def test_a_conversation_too_long_to_be_learnt_from_is_left_out_counted_and_named(folder):
    conversations(folder, "what is it?", LONG)
    talk = open_conversations(folder, "train", image_size=16)
    talk.leave_out(conversation_problem(processor()))
    assert [talk.key(i) for i in range(len(talk))] == ["0.png"]
    [note] = talk.notes
    assert note.startswith("1 of 2 training samples are left out. entry 2 (id x1): the conversation has")
    conversations(folder, LONG, LONG)
    talk = open_conversations(folder, "train", image_size=16)
    with pytest.raises(
        UserError, match=r"none of the 2 training samples can be learned from; the first: entry 1 \(id x0\)"
    ):
        talk.leave_out(conversation_problem(processor()))


def test_of_several_questions_about_a_picture_the_long_one_is_left_out(folder):
    lines = [{"image": "0.png", "question": q, "answer": "a"} for q in ("what?", LONG)]
    (folder / "vqa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    talk = open_conversations(folder, "train", image_size=16)
    talk.leave_out(conversation_problem(processor()))
    rng = np.random.default_rng(0)
    assert (
        talk.conversation(0, rng) == [Turn("user", "<image>\nwhat?"), Turn("assistant", "a")] and len(talk.notes) == 2
    )


def test_a_document_of_which_no_word_fits_is_left_out(folder):
    documents = [
        [{"image": "0.png"}, {"text": "a cat"}],
        [{"image": f"{i % 4}.png"} for i in range(100)] + [{"text": "a"}],
    ]
    (folder / "interleaved.jsonl").write_text("\n".join(map(json.dumps, documents)))
    train = Interleaved(folder, "train", image_size=16)
    train.leave_out(processor())
    assert len(train) == 1 and "1 of 2 training samples are left out" in train.notes[-1]


def test_the_check_goes_by_the_judgement_of_training(folder, capsys):
    conversations(folder, "what is it?", LONG)
    code, said = checked(capsys, folder, "--context", 96)
    assert code == 1 and "judged for a model as `train.py llava` makes: a context of 96 tokens" in said
    assert (
        "problems: 1\n" in said and "entry 2 (id x1): the conversation has" in said and "Training leaves it out" in said
    )
    assert checked(capsys, folder, "--context", 2000)[0] == 0


def test_the_check_reads_texts_without_pictures_and_documents(folder, capsys):
    said = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    (folder / "conversations.json").write_text(json.dumps([{"id": "1", "conversations": said}]))
    assert checked(capsys, folder)[0] == 0
    (folder / "conversations.json").unlink()
    (folder / "interleaved.jsonl").write_text('[{"image": "0.png"}, {"text": "a cat"}]')
    code, printed = checked(capsys, folder)
    assert code == 0 and "1 documents with images" in printed


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_held_out_question_without_room_for_an_answer_is_an_error_before_the_first_step(
    folder, split, capsys, tmp_path
):
    conversations(folder, "what is it?", "what?", **{split: LONG})
    assert f"({split}): the question has" in checked(capsys, folder, "--context", 96)[1]
    with pytest.raises(UserError, match=rf"a {split} question, about 3\.png: the question has .* Shorten it"):
        start(folder, "llava-stage1")


@pytest.mark.parametrize("name", ["clip", "llava-stage1"])
def test_a_held_out_picture_that_cannot_be_decoded_is_an_error_before_the_first_step(folder, name):
    conversations(folder, "what is it?", "what?")
    whole = (folder / "3.png").read_bytes()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "3.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:6000])  # its header is good
    with pytest.raises(UserError, match=r"1 of the val images cannot be read.*3\.png"):
        start(folder, name)
    (folder / "3.png").write_bytes(whole)
    start(folder, name)


def start(folder, name):
    small = {"width": 16, "depth": 1, "heads": 2}
    sizes = {f"model.{part}.{k}": v for part in ("vision", "text") for k, v in small.items()} | {
        "model.vision.image_size": 16
    }
    lm = {f"model.{k}": v for k, v in small.items()} | {"model.context": 96, "induction_heads": "false"}
    parts = {"vision_from": folder / "clip", "language_from": folder / "lm"}
    for base, options in (("clip", sizes), ("lm", lm), (name, sizes if name == "clip" else parts)):
        data = {"data": folder} if base == name else {"data": folder.parent / "plain"}
        if base != name:
            make_plain(folder.parent / "plain")
        given = {"batch_size": 2} | options | data
        _, recipe, _ = plan.command_line([base, *(str(x) for k, v in given.items() for x in (f"--{k}", v))])
        work = recipe.start(quiet=True)
        if base != name:
            work.model.save_pretrained(folder / base, processor=work.processor)


def make_plain(folder):
    folder.mkdir(exist_ok=True)
    rows = [{"image": f"{i}.png", "caption": f"it is {i}", "split": "train" if i < 3 else "val"} for i in range(4)]
    for i in range(4):
        Image.new("RGB", (20, 20)).save(folder / f"{i}.png")
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vqa.jsonl", '{"image": "0.png", "question": "a \\ud83d?", "answer": "b"}'),
        ("vqa.jsonl", '{"image": "0.png", "question": "a?", "answer": "b \\ud83d"}'),
        ("interleaved.jsonl", '[{"image": "0.png"}, {"text": "a \\ud83d cat"}]'),
        (
            "conversations.json",
            '[{"image": "0.png", "conversations": [{"from": "human", "value": "<image> \\ud83d"}, '
            '{"from": "gpt", "value": "a"}]}]',
        ),
    ],
)
def test_half_a_surrogate_pair_is_one_sentence_wherever_it_stands(folder, name, text):
    (folder / name).write_text(text)
    read = Interleaved if name == "interleaved.jsonl" else open_conversations
    with pytest.raises(UserError, match="is no valid text: it holds half a surrogate pair"):
        read(folder, "train", image_size=16)


def test_held_out_images_are_decoded_once_and_again_when_one_changes(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(3)]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    judge.check_images(tmp_path, names, "val")
    reads = []
    read = judge.read_image
    monkeypatch.setattr(judge, "read_image", lambda path, *rest: reads.append(path.name) or read(path, *rest))
    monkeypatch.setattr(judge, "check_header", None)  # nothing to call
    judge.check_images(tmp_path, names, "val")
    judge.check_headers(tmp_path, names, "val")
    assert reads == []
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(UserError, match=r"1 of the val images cannot be read, and a score is of all of them: .*1\.png"):
        judge.check_images(tmp_path, names, "val")
    assert sorted(reads) == names
    (tmp_path / "2.png").unlink()
    with pytest.raises(UserError, match=r"2\.png is missing"):
        judge.check_images(tmp_path, ["2.png"], "val")
