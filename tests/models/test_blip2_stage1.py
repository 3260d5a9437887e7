"""Stage 1: three losses, and what one can ask of it. With two processes (this file, run twice) it is one whole batch."""

import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from minivlm import BLIP2Stage1, BLIP2Stage1Config, ImageFeatures, checkpoint
from minivlm.errors import UserError
from minivlm.layers import QFormerConfig, VisionConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.models.image_text_matching import contrast, gather_texts, hard_negatives, matching, same_texts
from minivlm.models.vision_features import measure
from minivlm.testing import assert_gradient_reaches, assert_same

VISION = VisionConfig(width=20, depth=2, heads=2, image_size=16, patch_size=8)
QFORMER = QFormerConfig(width=24, depth=2, heads=2, queries=3, vocab_size=40, context=12, context_width=20)
CONFIG = BLIP2Stage1Config(
    vision=VISION, qformer=QFORMER, embed_width=16, start_token=1, decode_token=3, end_token=2, pad_token=0
)
TOKENS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0], [1, 9, 10, 2, 0]])
MASK = TOKENS != 0
ROOT = Path(__file__).parent.parent.parent
WORLD, B = 2, 4


def stage1(config=CONFIG):
    model = BLIP2Stage1(config)
    model.freeze("vision")
    return model.eval()


def pictures(n=3):
    return torch.randn(n, 3, 16, 16)


def batch():
    """Four pairs, the first two of them with shorter texts, so that two processes pad them differently."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(5, 40, (B, 6), generator=generator)
    tokens[:, 0] = 1
    tokens[:2, 4:] = 0
    return torch.randn(B, 5, 20, generator=generator), tokens


def test_vectors_are_of_unit_length_and_the_best_query_counts():
    model, images = stage1(), pictures()
    seen, said = model.encode_image(images), model.encode_text(TOKENS[:2], MASK[:2])
    assert seen.shape == (3, 3, 16) and said.shape == (2, 16)
    assert_same(seen.norm(dim=-1), torch.ones(3, 3))
    assert_same(said.norm(dim=-1), torch.ones(2))
    cosines = torch.stack([torch.stack([(query @ text) for query in image]).max() for image in seen for text in said])
    assert_same(model.similarity(seen, said), cosines.view(3, 2))
    assert_same(model(images, TOKENS[:2], MASK[:2]).logits_per_image, cosines.view(3, 2) / 0.07)


def test_features_may_stand_in_for_pictures():
    model, images = stage1(), pictures()
    features = model.image_features(images)
    assert_same(features, model.vision.norm(model.vision.features(images)))
    assert_same(model.encode_image(ImageFeatures(features)), model.encode_image(images))
    assert_same(model.match(ImageFeatures(features), TOKENS, MASK), model.match(images, TOKENS, MASK))


def test_matching_is_what_the_queries_say_on_average():
    model, images = stage1(), pictures()
    queries = model.qformer(model.image_features(images), TOKENS, MASK).queries
    expected = torch.stack([model.match_head(queries[:, i]) for i in range(3)]).mean(dim=0)
    assert_same(model.match(images, TOKENS, MASK), expected)


def test_forward_runs_each_part_once_and_gives_the_losses_of_training():
    model, images, calls = stage1(), pictures(), Counter()
    model.vision.transformer.register_forward_hook(lambda *_: calls.update(["tower"]))
    model.vision_projection.register_forward_hook(lambda *_: calls.update(["images"]))
    model.text_projection.register_forward_hook(lambda *_: calls.update(["texts"]))
    out = model(images, TOKENS, MASK)
    assert calls == {"tower": 1, "images": 1, "texts": 1}
    for _ in range(5):  # in eval mode nothing is drawn
        again = model.losses(TOKENS, MASK, images)
        assert all(torch.equal(again[name], loss) for name, loss in out.losses.items())


class TestLosses:
    def test_contrast_is_the_symmetric_cross_entropy(self):
        model, images = stage1(), pictures()
        out = model(images, TOKENS, MASK)
        own = torch.arange(3)
        both = (out.logits_per_image, out.logits_per_image.T)
        expected = sum(F.cross_entropy(logits, own, label_smoothing=0.1) for logits in both) / 2
        assert_same(out.losses["contrast"], expected)

    def test_generation_begins_with_its_token_and_sees_the_picture(self):
        model, images = stage1(), pictures()
        asked = TOKENS.masked_fill(TOKENS == 1, 3)
        text = model.qformer(model.image_features(images), asked, MASK, attention="causal").text
        logits = model.text_head(text) @ model.qformer.token_embedding.weight.T
        labels = TOKENS.masked_fill(~MASK, -100)[:, 1:]
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing=0.1)
        assert_same(model.losses(TOKENS, MASK, images)["generation"], expected)

    def test_matching_with_two_pairs_is_all_four_of_their_combinations(self):
        """With two, the hard negative is the other one."""
        model, features = stage1(), stage1().image_features(pictures(2))
        rows, columns = torch.tensor([0, 1, 0, 1, 1, 0]), torch.tensor([0, 1, 1, 0, 0, 1])
        logits = model.match(ImageFeatures(features[rows]), TOKENS[columns], MASK[columns])
        expected = F.cross_entropy(logits, (rows == columns).long())
        assert_same(model.losses(TOKENS[:2], MASK[:2], ImageFeatures(features))["matching"], expected)

    def test_nearly_right_texts_take_the_place_of_those_found_in_the_batch(self):
        """Row 0 has one (longer than all others), row 1 has none; a single pair has no other text at all."""
        model, images = stage1(), pictures(2)
        false = torch.tensor([[1, 30, 31, 32, 33, 2], [1, 2, 0, 0, 0, 0]])
        false_mask = torch.tensor([[True] * 6, [False] * 6])
        loss = model.losses(TOKENS[:2], MASK[:2], images, false=false, false_mask=false_mask)["matching"]
        pairs = [(0, TOKENS[0], 1), (1, TOKENS[1], 1), (0, false[0], 0), (1, TOKENS[0], 0)]  # picture, text, right?
        pairs += [(1, TOKENS[0], 0), (0, TOKENS[1], 0)]  # each text with the other picture
        logits = torch.cat([model.match(images[i : i + 1], t[None], (t != 0)[None]) for i, t, _ in pairs])
        assert_same(loss, F.cross_entropy(logits, torch.tensor([right for _, _, right in pairs])))

        alone = model.losses(TOKENS[:1], MASK[:1], images[:1], false=false[:1], false_mask=false_mask[:1])["matching"]
        assert_same(alone, F.cross_entropy(logits[[0, 2]], torch.tensor([1, 0])))

    def test_one_pair_has_no_negatives(self):
        model, images = stage1(), pictures(1)
        losses = model.losses(TOKENS[:1], MASK[:1], images)
        yes = F.cross_entropy(model.match(images, TOKENS[:1], MASK[:1]), torch.tensor([1]))
        assert_same(losses["matching"], yes)
        assert losses["contrast"] == 0 and all(loss.isfinite() for loss in losses.values())

    def test_equal_texts_are_not_each_others_negatives(self):
        model, images = stage1(), pictures(2)
        losses = model.losses(TOKENS[[0, 0]], MASK[[0, 0]], images)
        yes = F.cross_entropy(model.match(images, TOKENS[[0, 0]], MASK[[0, 0]]), torch.tensor([1, 1]))
        assert_same(losses["matching"], yes)

    def test_gradients_reach_all_but_the_frozen_tower(self):
        model = stage1()
        losses = model.losses(TOKENS, MASK, pictures())
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad and "k_proj.bias" not in n}
        assert not any(name.startswith("vision.") for name in learning)
        assert_gradient_reaches(sum(losses.values()), learning)

    def test_without_pairs_there_is_nothing_to_judge(self):
        assert stage1()(pictures(2), TOKENS, MASK).losses == {}

    def test_chance(self):
        guess = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
        assert stage1().chance_losses(8) == pytest.approx(
            {"contrast": math.log(8), "matching": guess, "generation": math.log(40)}
        )


class TestHardNegatives:
    def test_are_drawn_as_often_as_they_are_alike_and_never_the_positive(self):
        logits = torch.tensor([9.0, 0.0, math.log(3.0), 20.0]).repeat(4000, 1)
        same = torch.tensor([True, False, False, True]).repeat(4000, 1)
        drawn, found = hard_negatives(logits, same)
        assert found.all() and set(drawn.tolist()) == {1, 2}
        assert abs((drawn == 2).float().mean() - 0.75) < 0.03

    def test_are_found_where_there_are_any(self):
        same = torch.tensor([[True, True], [False, True]])
        drawn, found = hard_negatives(torch.tensor([[5.0, 1.0], [-200.0, 100.0]]), same)
        assert found.tolist() == [False, True] and drawn[1] == 0

    def test_texts_are_the_same_whatever_their_padding(self):
        longer = F.pad(TOKENS[[1, 0, 1]], (0, 2), value=7)
        same = same_texts(TOKENS, MASK, longer, F.pad(MASK[[1, 0, 1]], (0, 2)))
        assert same.tolist() == [[False, True, False], [True, False, True], [False] * 3]


class TestSpeaking:
    def test_is_the_likeliest_word_again_and_again(self):
        model, images = stage1(), pictures()
        tokens, features = TOKENS[:, :2], model.image_features(images)
        said = model.generate(images, tokens, max_new_tokens=6, end_tokens=())
        for t in range(6):
            text = model.qformer(features, tokens.masked_fill(tokens == 1, 3), attention="causal").text
            best = (model.text_head(text[:, -1]) @ model.qformer.token_embedding.weight.T).argmax(dim=-1)
            assert torch.equal(said[:, t], best)
            tokens = torch.cat([tokens, best[:, None]], dim=1)

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
    def test_a_batch_is_its_rows_alone_whatever_their_lengths(self, options):
        model, images = stage1(), pictures()
        said = model.generate(images, TOKENS, MASK, max_new_tokens=7, **options)
        for i, n in enumerate(MASK.sum(dim=1).tolist()):
            alone = model.generate(images[i : i + 1], TOKENS[i : i + 1, :n], max_new_tokens=7, **options)[0]
            assert torch.equal(said[i, : len(alone)], alone) and not said[i, len(alone) :].any()

    def test_the_context_has_an_end(self):
        with pytest.raises(
            ValueError,
            match=r"a prompt of 5 tokens and 8 new ones do not fit the context of 12",
        ):
            stage1().generate(pictures(), TOKENS, max_new_tokens=8)

    def test_published_weights_cannot(self):
        model = stage1(replace(CONFIG, text_head=False, temperature=None))
        assert set(model.losses(TOKENS, MASK, pictures())) == {"contrast", "matching"}
        with pytest.raises(ValueError, match="has no text_head, so it can compare and match, but not generate text"):
            model.generate(pictures(), TOKENS, max_new_tokens=2)


class TestConfig:
    def test_the_tower_must_fit_the_q_former(self):
        with pytest.raises(ValueError, match="features of width 32, but the Q-Former reads features of width 20"):
            replace(CONFIG, vision=replace(VISION, width=32))

    def test_stage_1_reads_texts(self):
        with pytest.raises(ValueError, match="the Q-Former needs a vocab_size"):
            replace(CONFIG, qformer=replace(QFORMER, vocab_size=None))

    def test_a_resnet_has_no_last_norm(self):
        vision = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
        width = vision.features_at(-1)[1]
        qformer = replace(QFORMER, context_width=width)
        with pytest.raises(ValueError, match="vision_norm needs a ViT"):
            replace(CONFIG, vision=vision, qformer=qformer)
        model = stage1(replace(CONFIG, vision=vision, qformer=qformer, vision_norm=False))
        assert model.encode_image(torch.randn(2, 3, 64, 64)).shape == (2, 3, 16)

    def test_comes_back_from_a_directory(self, tmp_path):
        model, images = stage1(), pictures()
        model.save_pretrained(tmp_path)
        back, _ = checkpoint.load(tmp_path)
        assert back.config == CONFIG
        assert_same(back.match(images, TOKENS, MASK), model.match(images, TOKENS, MASK), tolerance=0)


class TestStandardised:
    """What the tower gives, shifted and scaled by channel."""

    CONFIG = replace(CONFIG, standardise=True)

    def test_measured_features_have_mean_0_and_deviation_1(self):
        model, images = stage1(self.CONFIG), pictures(50)
        assert not model.standardise.measured
        assert_same(model.image_features(images), stage1().image_features(images), tolerance=0)
        for _ in range(2):  # to measure again changes nothing
            measure(model, images)
            features = model.image_features(images).flatten(0, -2)
            assert_same(features.mean(dim=0), torch.zeros(20), tolerance=1e-5)
            assert_same(features.std(dim=0, correction=0), torch.ones(20), tolerance=1e-5)
        assert model.standardise.measured

    def test_a_channel_that_never_moves_keeps_its_scale(self):
        model = stage1(self.CONFIG)
        with torch.no_grad():
            model.vision.norm.weight[3] = 0.0
        measure(model, pictures(8))
        assert (model.image_features(pictures(8))[..., 3] == 0).all()

    def test_measures_are_saved_and_are_handed_on(self, tmp_path):
        model, images = stage1(self.CONFIG), pictures()
        measure(model, pictures(50))
        model.save_pretrained(tmp_path)
        other = stage1(self.CONFIG)
        other.vision.load_state_dict(model.vision.state_dict())
        other.standardise.load_state_dict(model.standardise.state_dict())
        for same in (checkpoint.load(tmp_path)[0], other):
            assert_same(same.image_features(images), model.image_features(images), tolerance=0)

    def test_the_published_layout_has_no_word_for_it(self, tmp_path):
        with pytest.raises(UserError, match=r"cannot express .*standardise = True"):
            stage1(self.CONFIG).save_pretrained(tmp_path, layout="hf")


# ---- two processes -----------------------------------------------------------------------------------------------------


def losses_of(rank, world):
    """The losses of this process's rows and their gradients; matching with the negatives that are nearest."""
    features, tokens = (x.chunk(world)[rank] for x in batch())
    tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
    model = stage1()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100.0))
    vectors = model.encode_image(ImageFeatures(features)), model.encode_text(tokens, tokens != 0)
    loss, to_texts, to_images = contrast(*vectors, model.scale)
    # ten thousand times as steep, a draw is certain
    alike = to_texts * 1e4, to_images * 1e4
    matched = matching(model.match, features, tokens, tokens != 0, *alike, draw=True)
    (loss + matched).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"contrast": loss.detach(), "matching": matched.detach(), **grads}


def test_two_processes_are_one_whole_batch(tmp_path):
    """Values and gradients; the hard negatives of each are found among the rows of both."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    running = [subprocess.Popen([*command, str(r)], env=environment, stderr=subprocess.PIPE) for r in range(WORLD)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for name, expected in losses_of(0, 1).items():
        if "k_proj.bias" not in name:
            assert_same(torch.stack([one[name] for one in found]).mean(dim=0), expected, name, tolerance=1e-4)
    assert found[0]["matching"] != found[1]["matching"]
    texts = found[0]["texts"]
    assert torch.equal(texts, batch()[1]) and torch.equal(found[1]["texts"], texts)


if __name__ == "__main__":
    directory, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=WORLD)
    result = losses_of(rank, WORLD)
    mine = batch()[1].chunk(WORLD)[rank]
    mine = mine[:, : int((mine != 0).sum(dim=1).max())]
    result["texts"] = gather_texts(mine, mine != 0)[0]
    torch.save(result, directory / f"{rank}.pt")
    dist.destroy_process_group()
