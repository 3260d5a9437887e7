"""Runs of every recipe that minivlm 0.6.0 saved, at f2db4b2: each loads, computes the recorded numbers, and resumes.

tests/fixtures/saved/RECIPE is the directory of a tiny run that was stopped after two of its four steps. Its checkpoint is a
model directory as well. expected.json holds what f2db4b2 itself computed: outputs of the loaded model, and the resumed run.
The runs recorded relative paths: their data are in "data", which `make_data` writes, and their base models in "saved/".
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import minivlm
import train
from minivlm import tasks
from minivlm.training_log import read_log

SAVED = Path(__file__).parent / "fixtures" / "saved"
EXPECTED = json.loads((SAVED / "expected.json").read_text(encoding="utf-8"))
CHECKPOINT = "checkpoints/step-000002"
SIDE, N = 16, 40
SHOWN = 6  # numbers of a tensor, beside its norm


def picture(i: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), (i * 6, 90, 240 - i * 6))
    image.paste((i * 5, i * 3, 20), (i % 8, i % 5, i % 8 + 6, i % 5 + 8))
    return image


def make_data(folder: Path) -> None:
    """Write captions and questions about bitmaps. The runs recorded checksums, and a bitmap has the same bytes everywhere."""
    folder.mkdir()
    split = lambda i: {0: "val", 5: "test"}.get(i % 10, "train")
    for i in range(N):
        picture(i).save(folder / f"{i}.bmp")
    captions = [{"image": f"{i}.bmp", "caption": f"thing {i}", "split": split(i)} for i in range(30)]
    questions = [
        {"image": f"{i}.bmp", "question": "which?", "answer": f"thing {i % 5}", "split": split(i)} for i in range(10, N)
    ]
    for name, rows in (("captions", captions), ("vqa", questions)):
        (folder / f"{name}.jsonl").write_bytes("".join(json.dumps(row) + "\n" for row in rows).encode())


def some_of(tensor: torch.Tensor) -> list[float]:
    """The first numbers of a tensor, and its norm; infinite logits count as 0."""
    values = tensor.float().flatten()
    values = values.masked_fill(values.isinf(), 0)
    return [*values[:SHOWN].tolist(), values.norm().item()]


def outputs(model, processor) -> dict[str, list[float] | str]:
    """Outputs of the public calls of the model's family, for two images and two texts."""
    images, kind = processor.images([picture(3), picture(7)]), type(model).__name__
    tokens, mask = processor.text(["thing 3", "which? thing 17"])
    few, given = {"min_new_tokens": 3, "max_new_tokens": 6}, {}
    if kind in ("CLIP", "BLIP", "BLIP2Stage1"):
        given |= {"image": model.encode_image(images), "text": model.encode_text(tokens, mask)}
    if kind == "CLIP":
        given["logits"] = model(images, tokens, mask).logits_per_image
    if kind in ("BLIP", "BLIP2Stage1"):
        given["match"] = model.match(images, tokens, mask)
    if kind in ("BLIP", "ImageCaptioningModel"):
        given["logits"] = model(images, tokens, mask).logits
    if kind == "LanguageModel":
        given["logits"] = model(tokens, mask).logits
    if kind == "T5":
        given["logits"] = model(tokens, mask, labels=tokens).logits
    if kind in ("LLaVA", "BLIP2", "Flamingo"):
        tokens, mask = processor.text(["<image> thing 3", "<image> which? thing 17"], expand=True)
        given["logits"] = model(images[:, None] if kind == "Flamingo" else images, tokens, mask).logits
    if kind in ("VisualBERT", "UNITER", "ViLBERT", "VQAModel"):
        logits = model(images, tokens, mask)
        given |= {"answers": logits} if isinstance(logits, torch.Tensor) else logits.logits
    if kind == "MultitaskVLM":
        given |= {task: model(images, tokens, mask, task=task) for task in model.config.tasks}
    found = {name: some_of(tensor) for name, tensor in given.items()}
    if kind in ("BLIP", "BLIP2Stage1", "ImageCaptioningModel", "LLaVA", "BLIP2", "Flamingo", "MultitaskVLM"):
        found["caption"] = tasks.caption(picture(3), model, processor, **few)
    if kind in ("LLaVA", "BLIP2", "Flamingo"):
        found["answer"] = tasks.answer(picture(3), "which?", model, processor, num_beams=2, **few)
    if kind in ("VisualBERT", "UNITER", "ViLBERT", "VQAModel", "MultitaskVLM"):
        found["answer"] = tasks.answer(picture(3), "which?", model, processor)
    if kind in ("LanguageModel", "T5"):
        found["text"] = tasks.complete("which", model, processor, **few)
    return found


def resume(name: str) -> dict[str, list[float]]:
    """Resume a run in saved/. Returns the losses of its last two steps, and the norm of all its weights."""
    train.main([name, "--out", f"saved/{name}", "--resume", "--device", "cpu", "--precision", "fp32"])
    lines = read_log(Path(f"saved/{name}/log.jsonl"))
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    weights = load_file(f"saved/{name}/checkpoints/step-000004/model.safetensors")
    norm = sum(tensor.double().square().sum() for tensor in weights.values()).sqrt().item()
    return {"losses": [line["loss"] for line in lines[2:]], "weights": [norm]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("saved before")
    make_data(place / "data")
    shutil.copytree(SAVED, place / "saved")
    return place


@pytest.fixture(autouse=True)
def here(place, monkeypatch):
    monkeypatch.chdir(place)


def hold(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = value if isinstance(value, str) else pytest.approx(value, rel=1e-4, abs=1e-5)
        assert found[name] == same, name


def test_every_recipe_has_a_saved_run():
    assert {path.name for path in SAVED.iterdir() if path.is_dir()} == EXPECTED.keys()
    assert minivlm.recipes.RECIPES.keys() >= EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_a_saved_model_loads_and_computes_the_recorded_numbers(name):
    model, processor = minivlm.load(f"saved/{name}/{CHECKPOINT}")
    hold(outputs(model.eval(), processor), EXPECTED[name]["outputs"])


@pytest.mark.parametrize("name", EXPECTED)
def test_a_saved_run_resumes_to_its_end(name):
    hold(resume(name), EXPECTED[name]["resumed"])
    model, _ = minivlm.load(f"saved/{name}")
    assert type(model).__name__ == EXPECTED[name]["class"]
    scores = json.loads(Path(f"saved/{name}/metrics.json").read_text(encoding="utf-8"))
    assert scores and Path(f"saved/{name}/picture.png").exists()
