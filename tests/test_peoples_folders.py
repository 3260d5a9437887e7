"""Five people's folders, each as it lies about: checked, trained on for a step or two, and asked about by sample.py.

The first table of docs/data.md says what each of them holds and which commands follow.
"""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

import sample
import train
from minivlm.datasets import check

N = 24
VISION = dict(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=16, stem="patch")
SMALL = dict(width=16, depth=1, heads=2)


def under(part, sizes):
    return {f"{part}.{name}": value for name, value in sizes.items()}


CLIP = under("model.vision", VISION) | under("model.text", SMALL)
CAPTIONER = under("model.vision", VISION) | under("model.language", SMALL)
LM = under("model", SMALL) | {"induction_heads": "false"}


def paint(path, i):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 24), (i * 10, 90, 240 - i * 10)).save(path)
    return path


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")


def photos_and_csv(folder):
    """A table out of a spreadsheet, with columns of its own and photographs in folders."""
    rows = [f"{paint(folder / 'sea' / f'{i}.jpg', i).relative_to(folder)};thing {i}, by the sea;Ann" for i in range(N)]
    write(folder / "my photos.csv", "\ufefffile;title;photographer\n" + "\n".join(rows))


def imagefolder(folder):
    for split, numbers in {"train": range(16), "validation": range(16, 20), "test": range(20, N)}.items():
        rows = [{"file_name": paint(folder / split / f"{i}.png", i).name, "text": f"thing {i}"} for i in numbers]
        write(folder / split / "metadata.jsonl", "\n".join(map(json.dumps, rows)))


def tars(folder):
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard:03}.tar", "w") as archive:
            for i in range(shard * N // 2, (shard + 1) * N // 2):
                pixels = io.BytesIO()
                Image.new("RGB", (20, 24), (i * 10, 90, 0)).save(pixels, "PNG")
                for name, data in ((f"{i:06}.png", pixels.getvalue()), (f"{i:06}.txt", f"thing {i}".encode())):
                    about = tarfile.TarInfo(name)
                    about.size = len(data)
                    archive.addfile(about, io.BytesIO(data))


def coco(folder):
    for split, numbers in {"train": range(20), "val": range(20, N)}.items():
        known = [{"id": i, "file_name": paint(folder / f"{split}2017" / f"{i:012}.jpg", i).name} for i in numbers]
        said = [{"image_id": i, "id": 2 * i + k, "caption": f"thing {i}, {k}"} for i in numbers for k in (0, 1)]
        write(folder / "annotations" / f"captions_{split}2017.json", {"images": known, "annotations": said})


def llava(folder):
    said = lambda i: [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": f"thing {i % 5}"}]
    entries = [{"id": i, "image": f"coco/{i}.jpg", "conversations": said(i)} for i in range(N)]
    for i in range(N):
        paint(folder / "coco" / f"{i}.jpg", i)
    write(folder / "llava_instruct_24.json", entries)


PEOPLE = {  # what the folder holds → how it is made, what the check says, what is trained, what is asked
    "photographs and a CSV": (
        photos_and_csv,
        "captions: CSV with semicolons (my photos.csv); image: file, caption: title",
        [("captioner", CAPTIONER)],
        ["caption", "captioner", "{folder}", "--save", "captions.jsonl"],
    ),
    "an imagefolder": (
        imagefolder,
        "captions: JSON lines (test/metadata.jsonl, train/metadata.jsonl, validation/metadata.jsonl); image: file_name, caption: text",
        [("clip", CLIP)],
        ["search", "clip", "{folder}", "thing 3"],
    ),
    "tar shards": (
        tars,
        "captions: WebDataset tar shards (shard-000.tar, shard-001.tar)",
        [("captioner", CAPTIONER)],
        ["caption", "captioner", "{folder}/shard-000.tar", "--save", "captions.jsonl"],
    ),
    "COCO's JSON": (
        coco,
        "captions: COCO's captions (annotations/captions_train2017.json, annotations/captions_val2017.json)",
        [("clip", CLIP)],
        ["embed", "clip", "{folder}", "--save", "embeddings"],
    ),
    "LLaVA's JSON": (
        llava,
        "conversations: JSON (llava_instruct_24.json); image: image, turns: conversations",
        [
            ("clip", CLIP),
            ("lm", LM),
            ("llava-stage1", {"vision_from": "out/clip", "language_from": "out/lm"}),
            ("llava", {"starts_from": "out/llava-stage1"}),
        ],
        ["answer", "llava", "{folder}/coco/0.jpg", "what is it?"],
    ),
}


@pytest.mark.parametrize("who", PEOPLE)
def test_a_folder_is_checked_trained_on_and_asked_about(who, tmp_path, monkeypatch, capsys):
    make, seen, recipes, asked = PEOPLE[who]
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my data"
    make(folder)
    with pytest.raises(SystemExit) as stop:
        check.main([str(folder), "--samples", "1"])
    said = capsys.readouterr().out
    assert stop.value.code == 0, said
    assert f"\nread as {seen}" in said, said
    for name, sizes in recipes:
        options = {"data": folder, "out": f"out/{name}", "steps": 1, "batch_size": 4, "save_every": 1, "device": "cpu"}
        given = options | {"precision": "fp32", "bucket_steps": 1} | sizes
        train.main([name, *(str(word) for option, value in given.items() for word in (f"--{option}", value))])
    task, model, *words = (word.replace("{folder}", str(folder)) for word in asked)
    sample.main([task, f"out/{model}", *words, "--device", "cpu"])
    if "--save" in asked:
        assert Path(asked[-1]).exists()


def test_the_documentation_shows_these_folders():
    table = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    for who, (_, seen, _, asked) in PEOPLE.items():
        row = next(line for line in table.splitlines() if line.startswith(f"| {who} |"))
        assert seen.split(" (")[0].split(": ", 1)[1] in row and f"sample.py {asked[0]}" in row
