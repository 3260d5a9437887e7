"""CLIP from what is there, through train.py's real entry point: a whole published model, or a tower of one."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

import minivlm
import train
from minivlm import evaluate
from minivlm.__main__ import main as program
from minivlm.datasets.folder import open_pairs
from minivlm.errors import UserError
from minivlm.evaluate import command as evaluate_command
from minivlm.layers import BERT, BERTConfig, EfficientNetConfig, TextConfig, VisionConfig
from minivlm.layers.tower import ImageFeatures
from minivlm.layers.vit import VisionTransformer
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.processor import Processor
from minivlm.recipes import plan
from minivlm.run import Run, read_record

TINY = {"width": 16, "depth": 2, "heads": 2}
VISION = VisionConfig(image_size=32, patch_size=16, **TINY)
WORDS = [f"thing {i} is red, blue or a photo of a rose" for i in range(24)]


def published(place):
    """A CLIP, a DINOv2-like tower and a BERT as a hub has them."""
    processor = Processor.train(WORDS, vocab_size=300, image_size=32, context=40, mean=(0.5, 0.5, 0.5))
    ids = dict(vocab_size=processor.vocab_size, end_token=processor.end_token)
    clip = CLIP(CLIPConfig(vision=VISION, text=TextConfig(context=40, **TINY, **ids), embed_width=8))
    clip.save_pretrained(place / "hub/clip", processor=processor, layout="hf")
    tower = VisionConfig(image_size=32, patch_size=16, embedding_norm=False, patch_bias=True, layer_scale=0.5, **TINY)
    VisionTransformer(tower).save_pretrained(place / "hub/dinov2", processor=processor, layout="hf")
    text = BERTConfig(vocab_size=processor.vocab_size, context=40, **TINY)
    BERT(text).save_pretrained(place / "hub/bert", processor=processor)


def photos(folder):
    folder.mkdir()
    rows = []
    for i, words in enumerate(WORDS):
        Image.new("RGB", (40, 48), (i * 10, 90, 240 - i * 10)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": words, "label": ["rose", "oak", "fir"][i % 3]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    place = tmp_path_factory.mktemp("desk")
    published(place)
    photos(place / "photos")
    return place


@pytest.fixture(autouse=True)
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)


def clip(*words, **options):
    given = {"data": "photos", "steps": 4, "save_every": 2, "device": "cpu", "precision": "fp32"} | options
    train.main(["clip", *words, *(str(x) for name, value in given.items() for x in (f"--{name}", value))])


def test_a_published_clip_is_fine_tuned_and_judged_before_and_after(desk, capsys):
    clip("--starts_from", "hub/clip", out="tuned", stop_at=2)
    out = capsys.readouterr().out
    assert "hub/clip, fine-tuned on photos" in out and "before the first step on" in out
    before = read_record(Run("tuned").latest())["before"]
    (start, processor), test = minivlm.load("hub/clip"), "photos"
    want = evaluate.contrast(start, processor, test)
    assert {name: score["value"] for name, score in before.items()} == {n: s.value for n, s in want.items()}
    train.main(["clip", "--out", "tuned", "--resume", "--device", "cpu", "--precision", "fp32"])
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if line.split()[:1] == ["before"])
    assert head.split() == ["before", "after", "chance", "n"] and "before the first step" not in out
    assert "zero-shot, top-1" in out and read_record(Run("tuned").latest())["before"] == before
    tuned, own = minivlm.load("tuned")
    assert own.config == processor.config and own.text(WORDS)[0].equal(processor.text(WORDS)[0])
    moved = [(a - b).abs().max() for a, b in zip(tuned.parameters(), start.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-3  # a few steps of at most 1e-5

    evaluate_command.main(["tuned", "--data", "photos", "--device", "cpu", "--wise", "0", "0.5", "--save", "wise.json"])
    columns = json.loads((desk / "wise.json").read_text())
    assert {name: score["value"] for name, score in columns["0 (start)"].items()} == {
        n: s.value for n, s in want.items()
    }
    program(["convert", "tuned", "tuned-hf"])
    again, _ = minivlm.load("tuned-hf")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tuned.parameters(), strict=True))


def test_fine_tuning_takes_a_few_epochs_at_a_low_rate_with_what_the_user_gives_on_top():
    recipe = plan.command_line(["clip", "--starts_from", "hub/clip", "--data", "photos"])[1]
    images = recipe.batch_size
    assert images < 24 and recipe.steps == 50 and recipe.optimiser.learning_rate == 1e-5 and recipe.data.augment
    words = ["clip", "--starts_from", "hub/clip", "--data", "photos", "--steps", "9", "--batch_size", "2"]
    recipe = plan.command_line(words)[1]
    assert (recipe.steps, recipe.batch_size) == (9, 2)
    assert plan.command_line(["clip", "--data", "photos"])[1].optimiser.learning_rate > 1e-4  # from scratch


def test_a_clip_takes_a_tower_that_stands_alone_frozen_and_looks_at_each_image_once(capsys, monkeypatch):
    looks = []
    forward = VisionTransformer.features
    monkeypatch.setattr(
        VisionTransformer, "features", lambda self, x, **k: looks.append(len(x)) or forward(self, x, **k)
    )
    monkeypatch.setattr(train, "finish", lambda run, job: None)
    size = {"model.text.width": 16, "model.text.depth": 1, "model.text.heads": 2, "batch_size": 8}
    clip("--vision_from", "hub/dinov2", out="on-tower", **size)
    out = capsys.readouterr().out
    assert "runs once an image" in out and "are not augmented" in out
    model, processor = minivlm.load(Run("on-tower").latest())
    tower, _ = minivlm.load("hub/dinov2")
    assert model.config.patch_mean and model.image_projection.in_features == 2 * 16
    assert all(torch.equal(a, b) for a, b in zip(model.vision.parameters(), tower.parameters(), strict=True))
    assert processor.config.mean == (0.5, 0.5, 0.5) and processor.vocab_size > 300 - 1
    trained = len(open_pairs("photos", "train", image_size=32))
    assert sum(looks) <= 1 + trained + 3 * 8  # one to measure the room, and the validation of four steps


def test_the_vector_of_an_image_is_the_class_token_beside_the_mean_of_the_patches():
    tower, processor = minivlm.load("hub/dinov2")
    text = TextConfig(vocab_size=300, end_token=3, **TINY)
    model = CLIP(CLIPConfig(vision=tower.config, text=text, embed_width=8, patch_mean=True)).eval()
    images = processor.images(["photos/1.png", "photos/2.png"])
    tokens = model.vision.norm(model.vision.features(images))
    features = model.image_features(images)
    torch.testing.assert_close(features[:, 0], torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1))
    kept = ImageFeatures(features)
    assert torch.equal(model.encode_image(kept), model.encode_image(images))


def test_both_towers_may_be_there_and_nothing_but_the_frozen_one_stays(monkeypatch):
    monkeypatch.setattr(train, "finish", lambda run, job: None)
    clip("--vision_from", "hub/clip", "--text_from", "hub/bert", out="both", batch_size=8)
    model, processor = minivlm.load(Run("both").latest())
    assert isinstance(model.text, BERT) and processor.config.image_size == 32
    clip_there, bert = minivlm.load("hub/clip")[0], minivlm.load("hub/bert")[0]
    same = lambda a, b: all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert same(model.vision, clip_there.vision) and not same(model.text, bert)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--starts_from", "hub/bert"], "holds a BERT, but a CLIP is wanted"),
        (["--starts_from", "hub/clip", "--vision_from", "hub/dinov2"], "names a whole model, and --vision_from a part"),
        (
            ["--vision_from", "hub/dinov2", "--model.vision.depth", "3"],
            "--model.vision.depth: the tower of --vision_from",
        ),
        (["--vision_from", "hub/bert"], "holds a BERT, which has no vision tower"),
        (["--text_from", "hub/dinov2"], "--text_from hub/dinov2 holds a VisionTransformer, but a BERT or a CLIP"),
        (["--starts_from", "hub/clip", "--model.embed_width", "99"], "99"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(words, why, desk):
    with pytest.raises(UserError, match=why):
        clip(*words, out="refused")
    assert not (desk / "refused").exists()


def test_adapters_on_a_published_clip_are_merged_and_go_back_into_its_layout(capsys):
    clip("--starts_from", "hub/clip", out="adapted", steps=2, freeze="vision", **{"lora.rank": 2, "lora.parts": "text"})
    program(["convert", "adapted", "adapted-hf"])
    (start, _), (again, processor) = minivlm.load("hub/clip"), minivlm.load("adapted-hf")
    assert all(torch.equal(a, b) for a, b in zip(again.vision.parameters(), start.vision.parameters(), strict=True))
    changed = {name for name, tensor in again.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])}
    assert changed and all(".attention." in name for name in changed if name.startswith("text."))
    left, _ = minivlm.load("adapted")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), left.parameters(), strict=True))
    assert processor.config.mean == (0.5, 0.5, 0.5)


def siglip(text):
    tower = VisionConfig(
        image_size=32, patch_size=16, pool="attention", embedding_norm=False, patch_bias=True, **EXACT, **TINY
    )
    text = TextConfig(context=40, causal=False, use_mask=False, pool="last", **EXACT, **TINY, **text)
    return CLIPConfig(
        vision=tower, text=text, embed_width=16, image_projection=False, text_projection_bias=True, loss="sigmoid"
    )


def align(text):
    tower = EfficientNetConfig(
        width_scale=0.5,
        image_size=33,
        channels=(16, 24),
        blocks=(1, 1),
        kernels=(3, 3),
        strides=(1, 2),
        expansions=(1, 2),
    )
    text = BERTConfig(context=40, vocab_size=text["vocab_size"], **TINY)
    return CLIPConfig(vision=tower, text=text, embed_width=16, image_projection=False, text_projection_bias=True)


EXACT = {"activation": "gelu_tanh", "norm_eps": 1e-6}
OURS = VisionConfig(image_size=32, patch_size=16, stem="convolutions", **TINY)
KINDS = {
    "SigLIP": (siglip, "hf"),
    "ALIGN": (align, "hf"),
    "a run of ours": (lambda text: CLIPConfig(vision=OURS, text=TextConfig(context=40, **TINY, **text)), "minivlm"),
}


@pytest.mark.parametrize(("config", "layout"), KINDS.values(), ids=KINDS)
def test_every_kind_of_clip_learns_on_images_as_its_processor_has_them(config, layout, tmp_path):
    processor = Processor.train(WORDS, vocab_size=300, image_size=32, context=40)
    config = config(dict(vocab_size=processor.vocab_size, end_token=processor.end_token))
    how = dict(image_size=config.vision.image_size, resize="squash", crop="none", rescale=1 / 127.5, mean=(1.0,) * 3)
    processor = Processor(processor.tokenizer, replace(processor.config, **how if layout == "hf" else {}))
    CLIP(config).save_pretrained(tmp_path / "there", processor=processor, layout=layout)
    words = ["clip", "--data", "photos", "--starts_from", str(tmp_path / "there")]
    for augment in ("true", "false"):
        job = plan.command_line([*words, "--data.augment", augment])[1].start(quiet=True)
        batch = job.batch(0)
        sum(job.model.train().losses(**batch).values()).backward()
        assert batch["images"].abs().max() < 10 and job.model.loss.logit_scale.grad is not None
    pixels = job.samples.pairs.images([index for index, _ in job.order.share(0)])
    if layout == "hf":
        assert torch.equal(batch["images"], job.processor.images(pixels))
