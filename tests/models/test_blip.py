"""BLIP: one text transformer in three roles; its losses against their definitions, its words token by token."""

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import BLIP, BLIPConfig, ImageFeatures, checkpoint
from minivlm.layers import BERTConfig, VisionConfig
from minivlm.layers.resnet import ResNetConfig
from minivlm.models.momentum import MomentumConfig
from minivlm.testing import assert_gradient_reaches, assert_same

VISION = VisionConfig(width=24, depth=2, heads=2, image_size=16, patch_size=8)
TEXT = BERTConfig(width=24, depth=2, heads=2, vocab_size=40, context=14, token_types=0, cross_attention_every=1)
CONFIG = BLIPConfig(vision=VISION, text=TEXT, embed_width=16, decode_token=3, encode_token=4, end_token=2)
TOKENS = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 2, 0, 0], [1, 9, 10, 2, 0]])
MASK = TOKENS != 0
ASKED = torch.tensor([[1, 30, 31, 2], [1, 32, 2, 0], [1, 33, 2, 0]])
SAID = torch.tensor([[1, 20, 2], [1, 21, 22], [1, 23, 2]])


def blip(config=CONFIG, **changes):
    model = BLIP(replace(config, **changes)).eval()
    with torch.no_grad():
        for p in model.parameters():  # away from zero biases and from two sides that begin alike
            p.add_(0.1 * torch.randn_like(p))
    return model


def pictures(n=3):
    return torch.randn(n, 3, 16, 16)


def begun(tokens):
    return torch.cat([torch.full_like(tokens[:, :1], 3), tokens[:, 1:]], dim=1)


class TestRoles:
    def test_all_but_self_attention_is_shared(self):
        model = blip()
        mine, its = dict(model.decoder.named_parameters()), dict(model.encoder.named_parameters())
        apart = {name for name in mine if mine[name] is not its[name]}
        assert apart == {name for name in mine if ".attention." in name or ".attention_norm." in name} != set()
        assert model.head.weight is model.encoder.token_embedding.weight

    def test_the_encoder_alone_sees_both_ways_and_no_picture(self):
        model = blip()
        hidden = model.encoder(TOKENS, MASK).hidden
        expected = F.normalize(model.text_projection(hidden[:, 0]), dim=-1)
        assert_same(model.encode_text(TOKENS, MASK), expected)
        other = TOKENS.clone()
        other[0, 3] = 9
        assert ((model.encode_text(other, MASK) - expected)[0].abs() > 1e-4).any()

    def test_matching_reads_the_encode_token_in_front_of_the_picture(self):
        model, images = blip(), pictures()
        tokens = torch.cat([torch.full((3, 1), 4), TOKENS[:, 1:]], dim=1)
        hidden = model.encoder(tokens, MASK, context=model.image_features(images)).hidden
        assert_same(model.match(images, TOKENS, MASK), model.match_head(hidden[:, 0]))
        assert not torch.allclose(model.match(images.flip(0), TOKENS, MASK), model.match(images, TOKENS, MASK))

    def test_the_decoder_does_not_see_what_follows(self):
        model, images = blip(), pictures()
        logits = model(images, TOKENS).logits
        other = TOKENS.clone()
        other[:, 3] = 11
        changed = model(images, other).logits
        assert_same(changed[:, :3], logits[:, :3])
        assert ((changed - logits)[:, 3].abs().amax(dim=-1) > 1e-4).all()

    def test_features_may_stand_in_for_pictures(self):
        model, images = blip(), pictures()
        features = model.image_features(images)
        assert_same(features, model.vision.norm(model.vision.features(images)))
        for call in (model.match, model):
            out, other = call(images, TOKENS, MASK), call(ImageFeatures(features), TOKENS, MASK)
            assert_same(*(x if torch.is_tensor(x) else x.logits for x in (out, other)))

    def test_padding_is_not_seen(self):
        model, images = blip(), pictures()
        wide, mask = F.pad(TOKENS, (0, 3), value=7), F.pad(MASK, (0, 3))
        assert_same(model.match(images, wide, mask), model.match(images, TOKENS, MASK))
        assert_same(model.encode_text(wide, mask), model.encode_text(TOKENS, MASK))

    def test_pictures_of_a_resnet_are_given_places(self):
        vision = ResNetConfig(blocks=(1, 1, 1, 1), width=8, output_width=12, heads=4, image_size=64)
        places, width = vision.features_at(-2)
        config = replace(
            CONFIG,
            vision=vision,
            vision_layers=(-2,),
            vision_norm=False,
            class_token=False,
            text=replace(TEXT, context_width=width),
            positions=places,
        )
        assert config.answers is (width == 24)
        model, images = blip(config), torch.randn(2, 3, 64, 64)
        features = model.image_features(images)
        assert features.shape == (2, places, width)
        hidden = model.encoder(begun(TOKENS[:2]), MASK[:2], context=features + model.image_position_embedding).hidden
        model.config = replace(config, encode_token=3)
        assert_same(model.match(images, TOKENS[:2], MASK[:2]), model.match_head(hidden[:, 0]))
        assert_same(model.encode_image(images), F.normalize(model.vision_projection(features.mean(dim=1)), dim=-1))


class TestForward:
    def test_each_part_runs_once(self):
        model, calls = blip().train(), Counter()
        for name in ("vision.transformer", "encoder", "decoder"):
            model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
        out = model(pictures(), TOKENS, MASK)
        assert calls == {"vision.transformer": 1, "encoder": 2, "decoder": 1}  # the text alone, and with the image
        assert out.logits.shape == (3, 5, 40) and out.logits_per_image.shape == (3, 3)

    def test_losses_are_those_of_forward_and_in_eval_mode_the_same_every_time(self):
        model, images = blip(), pictures()
        asked = dict(question=ASKED, question_mask=ASKED != 0, answer=SAID, answer_mask=SAID != 0)
        first = model(images, TOKENS, MASK, **asked).losses
        assert set(first) == {"contrast", "matching", "generation", "answering"}
        for _ in range(5):
            again = model.losses(TOKENS, MASK, images, **asked)
            assert all(torch.equal(again[name], loss) for name, loss in first.items())

    def test_the_loss_of_labels_is_that_of_the_logits(self):
        model, images, labels = blip(), pictures(), TOKENS.masked_fill(~MASK, -100)
        out = model(images, TOKENS, MASK, labels)
        assert_same(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))


class TestLosses:
    @pytest.mark.parametrize("momentum", [None, MomentumConfig(queue=6)])
    def test_in_parts_random_layers_see_the_same_numbers_both_times(self, momentum, monkeypatch):
        """As if the activations of all parts had been kept; and the random state goes on as if there had been one pass."""
        text, images = replace(TEXT, dropout=0.3), pictures()
        model, batch = blip(text=text, momentum=momentum).train(), dict(tokens=TOKENS, mask=MASK, images=images)
        asked = dict(question=ASKED, question_mask=ASKED != 0, answer=SAID, answer_mask=SAID != 0)

        def parts():
            again = deepcopy(model)
            torch.manual_seed(3)
            losses = again.backward_in_parts(batch | asked, 2)
            return {**losses, **{n: p.grad for n, p in again.named_parameters() if p.grad is not None}}, torch.rand(1)

        made_again, after = parts()
        monkeypatch.setattr("minivlm.losses.parts.checkpoint", lambda function, *args, use_reentrant: function(*args))
        kept, after_one_pass = parts()
        assert torch.equal(after, after_one_pass) and made_again.keys() == kept.keys()
        for name, tensor in kept.items():
            assert_same(made_again[name], tensor, name)

    def test_a_scale_beyond_100_comes_back_in_training_and_still_learns(self):
        """Clamped in the forward pass, its gradient would be zero for ever."""
        model = blip()
        with torch.no_grad():
            model.logit_scale.fill_(math.log(300.0))
        assert model.scale().item() == pytest.approx(300)  # inference is as the file says
        model.train()
        model.losses(TOKENS, MASK, pictures())["contrast"].backward()
        assert model.logit_scale.item() == pytest.approx(math.log(100)) and model.logit_scale.grad.abs() > 0

    def test_contrast_is_the_symmetric_cross_entropy(self):
        model, images = blip(), pictures()
        out, own = model(images, TOKENS, MASK), torch.arange(3)
        cosines = model.encode_image(images) @ model.encode_text(TOKENS, MASK).T
        assert_same(out.logits_per_image, cosines * model.logit_scale.exp())
        expected = (F.cross_entropy(out.logits_per_image, own) + F.cross_entropy(out.logits_per_image.T, own)) / 2
        assert_same(out.losses["contrast"], expected)

    def test_matching_says_no_to_given_false_texts(self):
        model, images = blip(), pictures()
        model.logit_scale.data.fill_(math.log(1e-6))  # all look alike
        false = torch.tensor([[1, 15, 2], [1, 16, 2], [1, 17, 2]])
        losses = [model.losses(TOKENS, MASK, images, false=false, false_mask=false != 0)["matching"] for _ in range(40)]
        yes, no = model.match(images, TOKENS, MASK), model.match(images, false)
        right = F.cross_entropy(yes, torch.ones(3).long(), reduction="sum")
        right = right + F.cross_entropy(no, torch.zeros(3).long(), reduction="sum")
        wrong = torch.stack(
            [model.match(images.roll(k, 0), TOKENS, MASK).log_softmax(dim=1)[:, 0] for k in (1, 2)]
        )  # the two other pictures, drawn at random
        low, high = (right - wrong.amax(dim=0).sum()) / 9, (right - wrong.amin(dim=0).sum()) / 9
        assert all(low - 1e-5 <= loss <= high + 1e-5 for loss in losses)

    def test_generation_begins_with_its_token(self):
        model, images = blip(), pictures()
        labels = TOKENS.masked_fill(~MASK, -100)
        logits = model(images, begun(TOKENS), MASK).logits
        judged = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        smooth = F.cross_entropy(*judged, label_smoothing=0.1)  # for training alone: a text's surprise is plain
        assert_same(model.losses(TOKENS, MASK, images)["generation"], smooth)
        assert_same(model(images, begun(TOKENS), MASK, labels).loss, F.cross_entropy(*judged))
        plain = blip(label_smoothing=0.0)
        plain.load_state_dict(model.state_dict())
        assert_same(plain.losses(TOKENS, MASK, images)["generation"], F.cross_entropy(*judged))

    @pytest.mark.parametrize("share", [1.0, -0.1, math.nan])
    def test_smoothing_is_a_share(self, share):
        with pytest.raises(ValueError, match="must be at least 0 and below 1"):
            replace(CONFIG, label_smoothing=share)

    def test_answers_are_read_from_the_question_alone(self):
        model, images = blip(), pictures()
        mask = ASKED != 0
        losses = model.losses(
            TOKENS, MASK, images, question=ASKED, question_mask=mask, answer=SAID, answer_mask=SAID != 0
        )
        tokens = torch.cat([torch.full((3, 1), 4), ASKED[:, 1:]], dim=1)
        question = model.encoder(tokens, mask, context=model.image_features(images)).hidden
        hidden = model.decoder(begun(SAID), context=question, context_mask=mask).hidden
        logits = model.head(model.text_head(hidden))
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), SAID[:, 1:].flatten(), label_smoothing=0.1)
        assert_same(losses["answering"], expected)
        assert set(losses) == {"contrast", "matching", "generation", "answering"}

    def test_every_part_learns(self):
        model = blip()
        questions = dict(question=ASKED, question_mask=ASKED != 0, answer=SAID, answer_mask=SAID != 0)
        losses = model.losses(TOKENS, MASK, pictures(), **questions)
        learning = {n: p for n, p in model.named_parameters() if "k_proj.bias" not in n}
        assert_gradient_reaches(sum(losses.values()), learning)

    def test_chance_is_what_a_new_model_gets(self):
        chance = blip().chance_losses(8)
        assert chance["contrast"] == math.log(8) and chance["generation"] == chance["answering"] == math.log(40)
        soft = blip(momentum=MomentumConfig(queue=24)).chance_losses(8)
        assert soft["contrast"] == math.log(32)


class TestSpeaking:
    @pytest.mark.parametrize("questions", [False, True])
    def test_token_by_token_as_in_one_go(self, questions):
        model, images = blip(), pictures()
        tokens, mask = (ASKED, ASKED != 0) if questions else (begun(TOKENS), MASK)
        said = model.generate(images, tokens, mask, max_new_tokens=6, end_tokens=())
        for i in range(3):
            row = tokens[i][mask[i]]
            read = model.image_features(images[i : i + 1])
            if questions:
                read, row = model.encode_with_image(read, row[None]), torch.tensor([3])
            for token in said[i]:
                logits = model.head(model.decode(row[None], None, read))
                assert token == logits[0, -1].argmax()
                row = torch.cat([row, token[None]])

    def test_beams_are_a_search_for_the_likeliest(self):
        model, images = blip(), pictures()
        tokens = torch.full((3, 1), 3)
        wide = model.generate(images, tokens, max_new_tokens=2, num_beams=40, length_penalty=0.0, end_tokens=())
        first = model.head(model.decode(tokens, None, model.image_features(images)))[:, 0].log_softmax(dim=-1)
        pairs = torch.cartesian_prod(torch.tensor([3]), torch.arange(40))
        second = [
            model.head(model.decode(pairs, None, model.image_features(images[i : i + 1]).expand(40, -1, -1)))
            for i in range(3)
        ]
        for i in range(3):
            total = first[i][:, None] + second[i][:, 1].log_softmax(dim=-1)
            assert wide[i].tolist() == list(divmod(int(total.argmax()), 40))

    def test_a_beginning_may_be_padded_on_either_side(self):
        model, images = blip(), pictures()
        right = begun(TOKENS[:, :3])
        left = torch.stack([right[0], torch.tensor([0, 3, 8]), right[2]])
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]]).bool()
        other = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]]).bool()
        right[1, 2] = 0
        said = [model.generate(images, *text, max_new_tokens=5) for text in ((right, mask), (left, other))]
        assert torch.equal(*said)

    def test_published_answers_read_the_padding_of_questions(self):
        model, images = blip(roles="answer", temperature=None), pictures()
        mask = ASKED != 0
        reads = [model.prefill(images, ASKED, mask, room=1).context_mask]
        model.config = replace(model.config, attend_padding=True)
        reads.append(model.prefill(images, ASKED, mask, room=1).context_mask)
        assert torch.equal(reads[0], mask) and reads[1] is None

    def test_answers_are_ranked_by_their_likelihood(self):
        model, images = blip(), pictures()
        mask, answers = ASKED != 0, torch.tensor([[1, 20, 2, 0], [1, 21, 22, 2], [1, 23, 2, 0], [1, 24, 2, 0]])
        ranked = model.rank(images, ASKED, mask, answers, answers != 0)
        read = model.encode_with_image(model.image_features(images), ASKED, mask)
        firsts = []
        for j, answer in enumerate(answers):
            n = int((answer != 0).sum())
            said = begun(answer[None, :n].expand(3, -1))
            log_p = model.head(model.decode(said, None, read, mask)).log_softmax(dim=-1)
            expected = sum(log_p[:, t - 1, answer[t]] for t in range(1, n))
            assert_same(ranked[:, j], expected)
            firsts.append(log_p[:, 0, answer[1]])
        few = model.rank(images, ASKED, mask, answers, answers != 0, most=2)
        kept = torch.stack(firsts, dim=1).topk(2).indices
        assert_same(few.gather(1, kept), ranked.gather(1, kept))
        assert (few.isinf().sum(dim=1) == 2).all()


class TestMistakes:
    def test_questions_and_captions_are_asked_apart(self):
        tokens = torch.tensor([[3, 5], [1, 5]])
        with pytest.raises(ValueError, match="some texts start with the decode token, the others are questions"):
            blip().generate(pictures(2), tokens, max_new_tokens=2)

    def test_no_decoder_no_words(self):
        with pytest.raises(ValueError, match="has no decoder, so it can compare and match, but not generate text"):
            blip(roles="match").generate(pictures(), TOKENS, max_new_tokens=2)

    def test_the_context_has_an_end(self):
        with pytest.raises(ValueError, match="a text of 5 tokens and 10 new ones do not fit the context of 14"):
            blip().generate(pictures(), begun(TOKENS), max_new_tokens=10)

    def test_answers_are_wanted(self):
        with pytest.raises(ValueError, match="an answer is wanted: give labels"):
            blip(roles="answer")(pictures(), ASKED)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"text": replace(TEXT, causal=True)}, "it is not causal"),
            ({"text": replace(TEXT, cross_attention_every=0)}, "its cross_attention_every is at least 1"),
            ({"text": replace(TEXT, context_width=20)}, "features of width 24, but the text model reads .* 20"),
            ({"roles": "answer", "text": replace(TEXT, width=32, context_width=24)}, "the two must be the same"),
            ({"roles": "caption", "momentum": MomentumConfig()}, "momentum is for the contrast"),
        ],
        ids=lambda x: str(x)[:30],
    )
    def test_what_does_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            replace(CONFIG, **changes)

    def test_a_width_of_its_own_answers_no_questions(self):
        config = replace(CONFIG, text=replace(TEXT, width=32, context_width=24))
        assert not config.answers
        with pytest.raises(ValueError, match="this BLIP answers no questions"):
            blip(config).generate(pictures(), ASKED, max_new_tokens=2)


@pytest.mark.parametrize("roles", ["all", "match", "caption", "answer"])
def test_comes_back_from_a_directory(roles, tmp_path):
    model, images = blip(roles=roles), pictures()
    model.save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert back.config == model.config
    if roles == "all":
        assert back.decoder.transformer.blocks[0].mlp is not None
        assert (
            back.decoder.transformer.blocks[0].mlp.up_proj.weight
            is back.encoder.transformer.blocks[0].mlp.up_proj.weight
        )
    if roles != "match":
        said = [m.generate(images, ASKED, max_new_tokens=4) for m in (model, back)]
        assert torch.equal(*said)
    if roles in ("all", "match"):
        assert_same(back.match(images, TOKENS, MASK), model.match(images, TOKENS, MASK), tolerance=0)
