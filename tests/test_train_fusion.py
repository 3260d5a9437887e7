"""The fuse pattern through train.py: tiny runs of every recipe, and what each leaves behind."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import train
from minivlm import tasks, training_log
from minivlm.conversation import IGNORED
from minivlm.datasets.shapes import make_shapes
from minivlm.errors import UserError
from minivlm.recipes import plan
from minivlm.recipes.fuse import FUSE_RECIPES, MASK
from minivlm.recipes.multitask import MULTITASK_RECIPES
from tests.test_train import TINY

SHORT = {"steps": 4, "batch_size": 8, "save_every": 4, "seed": 3, "device": "cpu", "precision": "fp32"}
SMALL = {"width": 16, "depth": 2, "heads": 2}
TEXT = {f"model.text.{name}": value for name, value in SMALL.items()}
SIZES = {
    "visualbert": TEXT,
    "uniter": TEXT,
    "vilbert": TEXT | {f"model.regions.{name}": value for name, value in SMALL.items()} | {"model.joint_width": 16},
    "vqa": {f"model.{part}.{name}": value for part in ("text", "fusion") for name, value in SMALL.items()},
    "multitask": {f"model.encoder.text.{name}": value for name, value in SMALL.items()},
}
HEADS = {
    "visualbert": {"words", "matching"},
    "uniter": {"words", "regions", "matching", "alignment"},
    "vilbert": {"words", "regions", "matching"},
}


def arguments(recipe, **options):
    return [recipe, *(str(x) for name, value in options.items() for x in (f"--{name}", value))]


@pytest.fixture(scope="module")
def built(tmp_path_factory, little_to_judge_by):
    """A world, and a CLIP of it."""
    out = tmp_path_factory.mktemp("fusion")
    make_shapes(out / "world", train=64, image_size=32, progress=False)
    train.main(arguments("clip", **TINY | {"data": out / "world", "out": out / "clip", "steps": 2}))
    return out


def options(built, name, **more):
    return SHORT | SIZES[name] | {"data": built / "world", "vision_from": built / "clip"} | more


def start(built, name, **more):
    _, recipe, _ = plan.command_line(arguments(name, **options(built, name, **more)))
    return recipe.start(quiet=True)


@pytest.mark.parametrize("name", FUSE_RECIPES | MULTITASK_RECIPES)
def test_a_run_leaves_a_model_that_answers(built, name, capsys):
    train.main(arguments(name, **options(built, name, out=built / name)))
    printed = capsys.readouterr().out
    assert "answers to choose from; 0 of" in printed
    assert ("python sample.py match" in printed) == (name in HEADS)
    metrics = json.loads((built / name / "metrics.json").read_text())
    assert {"accuracy", "accuracy, count", "accuracy, blind", "never-seen pairs, accuracy"} <= metrics.keys()
    more = {"captions, exact scene match", "text→image R@1"}
    assert (more & metrics.keys()) == (more if name == "multitask" else set())
    told_apart = {"matching", "matching, colour", "never-seen pairs, matching, place"}
    assert (told_apart & metrics.keys()) == (told_apart if name in HEADS else set())
    assert (built / name / "picture.png").stat().st_size > 5000
    model, processor = minivlm.load(built / name)
    said = minivlm.answer(built / "world/test/000.png", "is there a red circle?", model, processor)
    assert said in model.config.answers
    check_what_else_it_can(name, built / "world/test/000.png", model, processor)
    eyes, clip = "encoder.vision." if name == "multitask" else "vision.", load_file(built / "clip/model.safetensors")
    kept = {n: t for n, t in load_file(built / name / "model.safetensors").items() if n.startswith(eyes)}
    assert kept and all(torch.equal(t, clip[n.removeprefix("encoder.")]) for n, t in kept.items())


def check_what_else_it_can(name, picture, model, processor):
    """Match or not, and hold no conversation; what it cannot is said as it is."""
    if name in HEADS:
        assert 0 < tasks.match_all([picture], ["a red circle"], model, processor) < 1
    else:
        with pytest.raises(UserError, match="cannot match texts with images"):
            tasks.match_all([picture], ["a red circle"], model, processor)
    cannot = "cannot chat; it can .*choose an answer from its list"
    with pytest.raises(UserError, match=cannot):
        minivlm.chat(model, processor, picture)


def test_a_run_resumes_to_the_bit(built, tmp_path):
    for out, more in (("whole", {}), ("parts", {"stop_at": 2})):
        train.main(
            arguments("uniter", **options(built, "uniter", out=tmp_path / out, **more, **{"data.captions_every": 2}))
        )
    train.main(["uniter", "--resume", "--out", str(tmp_path / "parts"), "--device", "cpu", "--precision", "fp32"])
    logs = [
        [line["loss"] for line in training_log.read_log(tmp_path / out / "log.jsonl")] for out in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.parametrize("name", HEADS)
def test_captions_come_every_few_steps_with_what_the_model_is_to_tell(built, name):
    work = start(built, name, batch_size=32, **{"data.captions_every": 3})
    work.prepare(torch.device("cpu"), torch.float32)
    assert work.batch(0).keys() == {"tokens", "mask", "answers", "images"}
    batch = work.batch(2)
    losses = work.model.losses(**batch)
    assert losses.keys() == HEADS[name]
    hidden, matches = batch["labels"] != IGNORED, batch["matches"]
    assert 5 < matches.sum() < 27
    assert not hidden[~matches].any() and not hidden[~batch["mask"]].any()
    masked = batch["tokens"] == work.processor.tokenizer.token_to_id(MASK)
    assert masked[matches].any() and hidden[masked & matches[:, None]].all()
    words = hidden.any(dim=1)[matches]
    assert 0 < words.sum() < len(words)
    if name == "visualbert":
        assert "hidden" not in batch
    else:
        regions = batch["hidden"].any(dim=1)[matches]
        assert not (regions & words).any() and regions.any() if name == "uniter" else torch.equal(regions, words)


@pytest.mark.parametrize("name", HEADS)
def test_what_is_hidden_does_not_tell_whether_a_caption_is_true(built, name):
    """Else a model learns to look for masks, and calls whatever is shown whole false."""
    work = start(built, name, batch_size=64, **{"data.captions_every": 1})
    work.prepare(torch.device("cpu"), torch.float32)
    hides, matches = [], []
    for step in range(8):
        batch = work.batch(step)
        some = (batch["tokens"] == work.processor.tokenizer.token_to_id(MASK)).any(dim=1)
        hides.append(some | batch["hidden"].any(dim=1) if "hidden" in batch else some)
        matches.append(batch["matches"])
    hides, matches = torch.cat(hides).float(), torch.cat(matches)
    assert len(matches) == 512 and abs(hides[matches].mean() - hides[~matches].mean()) < 0.15
    assert 0.3 < hides[~matches].mean() < 0.7


@pytest.mark.parametrize(("share", "least", "most"), [(0.5, 10, 60), (1.0, 40, 128)])
def test_in_pairs_every_image_has_a_true_caption_and_a_false_one_and_so_many_differ_in_one_word(
    built, share, least, most
):
    options = {"data.captions_every": 1, "data.paired": True, "data.false_captions": share}
    work = start(built, "visualbert", batch_size=64, **options)
    work.prepare(torch.device("cpu"), torch.float32)
    one_word = 0
    for step in range(4):
        batch = work.batch(step)
        images, tokens = batch["images"].tensor, batch["tokens"]
        assert torch.equal(batch["matches"], torch.arange(64) < 32) and torch.equal(images[:32], images[32:])
        seen = tokens != work.processor.tokenizer.token_to_id(MASK)
        one_word += ((tokens[:32] != tokens[32:]) & seen[:32] & seen[32:]).sum(dim=1).eq(1).sum().item()
    assert least <= one_word <= most  # of 128 false ones; some have the word hidden, or objects in another order


@pytest.mark.parametrize("name", HEADS)
def test_the_regions_of_a_new_model_are_standardised_where_that_is_asked_for(built, name):
    work = start(built, name, **{"model.standardise": True})
    work.prepare(torch.device("cpu"), torch.float32)
    features = work.batch(0)["images"].tensor
    assert work.model.standardise.measured and features.mean().abs() < 0.3 and 0.7 < features.std() < 1.3


def test_processes_share_a_batch(built):
    work = start(built, "visualbert", **{"data.captions_every": 0})
    whole, parts = work.batch(1), [work.batch(1, rank, 2) for rank in (0, 1)]
    for rank in (0, 1):
        assert torch.equal(whole["answers"][rank::2], parts[rank]["answers"])
    assert torch.equal(whole["answers"].sum(dim=1), torch.ones(8))


def test_one_task_alone_can_be_learnt(built):
    work = start(built, "multitask", **{"model.tasks": '["search"]'})
    assert work.model.losses(**work.batch(0)).keys() == {"search"}
    assert work.scores.name == "text→image Recall@1" and 0 <= work.validate() <= 1


def test_an_unknown_task_is_one_sentence(built):
    with pytest.raises(UserError, match=r"--model.tasks.* is 'serach', but must be one of caption, answer, search"):
        start(built, "multitask", **{"model.tasks": '["serach"]'})


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, each with a question; the answers differ in how often they are right."""
    lines = []
    for i in range(12):
        Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(tmp_path / f"{i}.png")
        answer = ["red", "red", "dark", f"shade {i}"][i % 4]
        split = ["train", "val", "test"][max(0, i - 9)]
        lines.append(json.dumps({"image": f"{i}.png", "question": "what?", "answer": answer, "split": split}))
    (tmp_path / "vqa.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_answers_outside_the_list_are_counted_and_told(built, folder):
    work = start(built, "vqa", data=folder, batch_size=4, **{"data.most_answers": 2})
    assert work.model.config.answers == ("red", "dark")
    assert "2 answers to choose from; 2 of 10 questions that were looked at have none of them" in work.notes()[1]
    assert all(batch["answers"].sum() == 4 for batch in map(work.batch, range(4)))
    assert {*map(work.samples.key, range(len(work.samples)))}.isdisjoint({"3.png", "7.png"})


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("vqa", {"data.most_answers": 2, "batch_size": 9}, "the 8 training samples with an answer on the list"),
        (
            "multitask",
            {"batch_size": 4},
            "holds questions about images .10. .* learns from captions and questions about the same",
        ),
        ("visualbert", {"model.vision_layer": 99, "batch_size": 4}, "layer 99|cannot be built"),
    ],
)
def test_what_does_not_fit_is_one_sentence(built, folder, name, more, message):
    with pytest.raises(UserError, match=message):
        start(built, name, data=folder, **more)


def test_a_folder_without_captions_teaches_by_questions_alone(built, folder):
    work = start(built, "visualbert", data=folder, batch_size=4, **{"data.captions_every": 2})
    assert any("has no captions: questions alone are learnt from" in note for note in work.notes())
    assert "answers" in work.batch(1)
    assert work.model.match_head is None and work.model.config.heads == ()  # nobody is to ask what was not learnt


def test_a_folder_of_captions_has_nothing_to_ask(built, tmp_path):
    for i in range(8):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({"image": f"{i}.png", "caption": "dark", "split": "train"}) for i in range(8)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"holds images with captions .* learns from questions .* add vqa\.jsonl"):
        start(built, "vqa", data=tmp_path, batch_size=4)
