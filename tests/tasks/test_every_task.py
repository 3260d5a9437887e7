"""Every task of sample.py with a model of every recipe: an answer, or one sentence that names what the model is."""

import importlib
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import minivlm
import sample
from minivlm.errors import UserError
from minivlm.recipes import plan
from tests.test_recipes_folders import arguments, bases, folders, parts  # noqa: F401

few_shot = importlib.import_module("minivlm.tasks.few_shot")  # of whose name there is a function as well
FAMILIES = sorted({"clip", "clip-resnet", "align", "lm", "t5", "llava", "blip", "blip2-stage1", "blip2", "flamingo"})
FAMILIES += ["visualbert", "uniter", "vilbert", "vqa", "multitask", "captioner", "blip2-t5"]
SHORT = ["--max_new_tokens", "2"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pictures")
    for i, size in enumerate(((30, 40), (61, 30), (1, 1))):
        pixels = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    return directory


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, folders, bases, tmp_path_factory):  # noqa: F811
    """A model of the family as it is before the first step."""
    name, out = request.param, tmp_path_factory.mktemp("model")
    more = parts(name, bases)
    if name == "blip2-t5":
        t5 = plan.command_line(arguments("t5", data=folders / "mixed"))[1].start(quiet=True)
        t5.model.save_pretrained(bases / "t5", processor=t5.processor)
        name, more = "blip2", {"lm": "t5", "starts_from": bases / "blip2-stage1", "language_from": bases / "t5"}
    work = plan.command_line(arguments(name, data=folders / "mixed", **more))[1].start(quiet=True)
    work.model.save_pretrained(out, processor=work.processor)
    return out


def asked(a, b, folder, out):
    """The arguments of every task, those behind the model."""
    examples = ["--examples", a, "this is a dax", b, "this is a wug", "--query", a, "this is a"]
    return [
        ["zero-shot", a, b, "--labels", "red", "blue"],
        ["search", folder, "a red cat"],
        ["search", folder, a],
        ["search", folder, "red", "--rerank", "2"],
        ["match", a, "a red cat"],
        ["caption", a, b, *SHORT],
        ["caption", a, "--prompt", "a picture of", *SHORT],
        ["answer", a, "what is it?", *SHORT],
        ["answer", a, b, "which?", *SHORT],
        ["answer", a, "what?", "--candidates", "red", "blue"],
        ["attend", a, b, "--save", f"{out}/m.png"],
        ["attend", a, "--prompt", "what is it?", "--save", f"{out}/m.png"],
        ["few-shot", *examples, *SHORT],
        ["few-shot", *examples, "--candidates", "dax", "wug"],
        ["complete", "the red", *SHORT],
        ["chat", a, *SHORT],
        ["chat", *SHORT],
        ["chat", a, b, *SHORT],
    ]


def test_each_task_is_answered_or_refused_in_a_sentence(model, pictures, tmp_path, monkeypatch, capsys):
    answered = 0
    for task, *rest in asked(f"{pictures}/0.png", f"{pictures}/1.png", str(pictures), tmp_path):
        monkeypatch.setattr("sys.stdin", io.StringIO("what is it?\nand now?\n/quit\n"))
        try:
            sample.main([task, str(model), *rest])
            answered += 1
        except UserError as refused:
            assert "\n" not in str(refused) and str(refused).endswith((".", ")"))
    assert answered


def test_a_file_has_for_each_row_what_it_has_alone(model, pictures, tmp_path, monkeypatch):
    """Whatever is beside it in a batch: images of other sizes, and questions of other lengths about the same image."""
    monkeypatch.chdir(tmp_path)
    questions = [
        (f"{pictures}/{i}.png", text) for i in (2, 0, 0, 1) for text in ("what is it?", "is the cat red or blue?")
    ]
    lines = [
        json.dumps({"image": image, "question": text, "question_id": i}) for i, (image, text) in enumerate(questions)
    ]
    (tmp_path / "q.jsonl").write_text("\n".join(lines), encoding="utf-8")
    asked = [
        ["caption", pictures, *SHORT],
        ["answer", "q.jsonl", *SHORT],
        ["match", "q.jsonl", "a red cat"],
        ["match", "q.jsonl"],
        ["zero-shot", pictures, "--labels", "red", "blue"],
    ]
    written = 0
    for i, (task, *rest) in enumerate(asked):
        for batch in (8, 1):
            try:
                sample.main([task, str(model), *map(str, rest), "--save", f"{i}-{batch}.jsonl", "--batch", str(batch)])
            except UserError as refused:
                assert "\n" not in str(refused)
                break
        else:
            together, alone = (
                [json.loads(line) for line in (tmp_path / f"{i}-{n}.jsonl").read_text().splitlines()] for n in (8, 1)
            )
            assert len(together) == len(alone) >= 3 and not any("error" in row for row in together)
            for a, b in zip(together, alone, strict=True):
                numbers = {name: a.pop(name) for name in ("probability", "labels") if name in a}
                assert a == {name: value for name, value in b.items() if name not in numbers}
                if numbers:
                    assert numbers["probability"] == pytest.approx(b["probability"], abs=1e-5)
            written += 1
    loaded, _ = minivlm.load(model)
    assert bool(written) == bool(
        loaded.takes_images and loaded.abilities & {"encode", "match", "caption", "answer", "choose"}
    )


def test_an_encoder_scores_candidates_as_its_decoder_would_say_them(folders, bases, pictures):  # noqa: F811
    """The log-likelihood of a candidate is that of its tokens, one after the other, by a loop over the plain model."""
    t5 = plan.command_line(arguments("t5", data=folders / "mixed"))[1].start(quiet=True)
    t5.model.save_pretrained(bases / "t5", processor=t5.processor)
    more = {"lm": "t5", "starts_from": bases / "blip2-stage1", "language_from": bases / "t5"}
    work = plan.command_line(arguments("blip2", data=folders / "mixed", **more))[1].start(quiet=True)
    model, p = work.model.eval(), work.processor
    query = few_shot.Example(f"{pictures}/1.png", "this is a")
    prompt = few_shot.few_shot_prompt([few_shot.Example(f"{pictures}/0.png", "this is a dax")], query, p)
    [scores] = few_shot.score(model, p, [prompt], [["dax", "a wug"]])
    tokens = torch.tensor([few_shot.prompt_tokens(prompt.text, model, p)])
    for text, got in zip(("dax.", "a wug."), scores, strict=True):
        labels = torch.tensor([p.encode([text])[0][1:]])
        with torch.no_grad():
            logits = model(p.images(prompt.images)[None], tokens, labels=labels).logits
        assert got == pytest.approx(logits.log_softmax(dim=-1)[0].gather(1, labels[0, :, None]).sum().item(), rel=1e-4)
