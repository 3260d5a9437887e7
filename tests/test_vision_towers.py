"""Vision towers that stand alone (DINOv2, a plain ViT) are what models with texts are built on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf_files import byte_pair_words, metadata_of, their_tensors, tiny_model, write_gguf
from small_recipes import small_job, small_recipe, small_world

import minivlm
import sample
from minivlm import VisionConfig, VisionTransformer
from minivlm.errors import UserError
from minivlm.info import info
from minivlm.layers.tower import tower_features
from minivlm.processor import Processor, ProcessorConfig
from minivlm.recipes.parts import load_vision_tower

DINO = VisionConfig(
    width=16, depth=2, heads=2, image_size=48, patch_size=8, embedding_norm=False, patch_bias=True, layer_scale=0.5,
    registers=2,
)  # fmt: skip
SHOWN = 32  # pixels a side of the images, which are fewer than those of the position table
TAKE_A_TOWER = (
    "vqa",
    "visualbert",
    "uniter",
    "vilbert",
    "multitask",
    "llava-stage1",
    "flamingo",
    "blip",
    "blip2-stage1",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A world, and in "dino" a tower alone."""
    directory = small_world(tmp_path_factory.mktemp("towers"), train=60)
    torch.manual_seed(0)
    processor = Processor(None, ProcessorConfig(image_size=SHOWN))
    minivlm.save(directory / "dino", VisionTransformer(DINO), processor)
    return directory


@pytest.mark.parametrize("name", TAKE_A_TOWER)
def test_every_recipe_with_a_tower_learns_on_one_that_stands_alone(built, name):
    job = small_job(name, built, vision_from=built / "dino", batch_size=4)
    batch = job.batch(0)
    loss = sum(job.model.losses(**batch).values())
    loss.backward()
    assert loss.isfinite()
    tower = job.model.get_submodule("encoder.vision" if name == "multitask" else "vision")
    assert torch.equal(tower.register_tokens, minivlm.load(built / "dino")[0].register_tokens)
    assert tower.config == replace(DINO, image_size=SHOWN) and job.processor.image_size == SHOWN


def test_a_tower_is_fitted_to_the_images_that_it_will_be_shown(built):
    whole, processor = minivlm.load(built / "dino")
    tower, of_images = load_vision_tower(str(built / "dino"))
    image = processor.images([np.full((40, 50, 3), 90, np.uint8)])
    assert tower.config.patches == 16 and of_images.source is None
    assert torch.equal(tower(image), whole(image))
    assert torch.equal(tower.features(image, layer=-2), whole.features(image, layer=-2))


def test_features_of_patches_come_without_class_token_and_registers(built):
    tower, _ = minivlm.load(built / "dino")
    image = torch.randn(2, 3, 32, 32)
    everything = tower.features(image, layer=1)
    assert everything.shape == (2, 1 + 2 + 16, 16)
    assert torch.equal(tower_features(tower, image, (1,)), everything[:, 3:])
    kept = tower_features(tower, image, (1,), class_token=True)
    assert torch.equal(kept, torch.cat([everything[:, :1], everything[:, 3:]], dim=1))
    assert torch.allclose(tower(image), tower.norm(tower.features(image))[:, 0], atol=1e-6)


def test_the_tower_of_a_whole_model_is_taken_without_its_texts(built):
    job = small_recipe("llava-stage1", built, vision_from=built / "dino").start(quiet=True)
    minivlm.save(built / "llava", job.model, job.processor)
    tower, processor = load_vision_tower(str(built / "llava"))
    assert tower.config.image_size == SHOWN and processor.source is None and processor.config.image_tokens == 0


def test_a_model_without_a_tower_is_refused_in_a_sentence(built):
    small_recipe("llava-stage1", built)
    with pytest.raises(UserError, match=r"holds a LanguageModel, which has no vision tower: a CLIP, .* is wanted"):
        load_vision_tower(str(built / "lm"))
    with pytest.raises(UserError, match=r"--language_from \S+ holds a VisionTransformer, no language model"):
        small_recipe("llava-stage1", built, language_from=built / "dino").start(quiet=True)


def test_images_are_searched_with_an_image_by_a_tower_alone(built, tmp_path, capsys):
    folder = built / "world" / "test"
    first, *_ = sorted(folder.glob("*.png"))
    sample.main(["search", str(built / "dino"), str(folder), str(first), "--top", "2"])
    best = capsys.readouterr().out.splitlines()[0]
    assert best.split()[:2] == ["1", "1.000"] and best.endswith(first.name)
    with pytest.raises(
        UserError, match=r"VisionTransformer takes images alone, and no text: give the path of an image"
    ):
        sample.main(["search", str(built / "dino"), str(folder), "a red circle"])
    sample.main(["embed", str(built / "dino"), str(first), "--save", str(tmp_path / "vectors")])
    vector = np.load(tmp_path / "vectors/img_emb/img_emb_0.npy")
    assert vector.shape == (1, 16) and abs(np.linalg.norm(vector) - 1) < 1e-5
    with pytest.raises(UserError, match=r"VisionTransformer cannot describe images; it can compare images with images"):
        sample.main(["caption", str(built / "dino"), str(first)])


def test_what_a_tower_alone_holds_is_told(built):
    told = info(built / "dino")
    assert "VisionTransformer, saved by minivlm" in told and "images          32 × 32 pixels" in told
    assert "can             compare" in told and "context" not in told


def test_a_flamingo_names_the_tower_that_it_needs_and_takes_no_other(built, tmp_path):
    job = small_recipe("flamingo", built, vision_from=built / "dino").start(quiet=True)
    base = {"vision": str(built / "dino"), "language_model": str(built / "lm")}
    job.model.save_pretrained(tmp_path / "flamingo", processor=job.processor, base=base)
    again, _ = minivlm.load(tmp_path / "flamingo")
    expected = job.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    wide = VisionTransformer(replace(DINO, width=24))
    minivlm.save(tmp_path / "wide", wide, Processor(None, ProcessorConfig(image_size=SHOWN)))
    with pytest.raises(UserError, match=r"what is there now has width = 24 instead of 16, .*: put back what it was"):
        minivlm.load(tmp_path / "flamingo", base={"vision": str(tmp_path / "wide")})


def test_a_tower_alone_and_a_gguf_file_make_a_llava(built, tmp_path):
    words = byte_pair_words()
    language = tiny_model(len(words["tokens"]), context=800)
    write_gguf(tmp_path / "lm.gguf", metadata_of(language, words), their_tensors(language))
    given = {"vision_from": built / "dino", "language_from": tmp_path / "lm.gguf", "chat": "chatml"}
    job = small_recipe("llava-stage1", built, **given).start(quiet=True)
    assert sum(job.model.losses(**job.batch(0)).values()).isfinite()
    expected = language.state_dict()
    kept = job.model.language_model.state_dict()
    assert all(torch.equal(kept[name][: len(tensor)], tensor) for name, tensor in expected.items())
