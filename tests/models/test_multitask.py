import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minivlm import checkpoint
from minivlm.errors import UserError
from minivlm.layers import BERTConfig, ImageFeatures, VisionConfig
from minivlm.models.multitask import MultitaskConfig, MultitaskVLM
from minivlm.models.uniter import UNITERConfig
from minivlm.models.visualbert import VisualBERTConfig
from minivlm.processor import Processor
from minivlm.testing import assert_can_overfit, assert_same

COMMON = dict(
    text=BERTConfig(vocab_size=40, context=12, width=24, depth=2, heads=2),
    vision=VisionConfig(image_size=16, patch_size=8, width=12, depth=2, heads=2),
    region_width=12,
    answers=("yes", "no", "two"),
)
CONFIG = MultitaskConfig(
    encoder=VisualBERTConfig(**COMMON, region_positions=True, answer_at="first"), embed_width=8, end_token=2
)
TOKENS = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 9, 3, 2, 0, 0]])
MASK = TOKENS != 0


@pytest.fixture(params=[CONFIG, replace(CONFIG, encoder=UNITERConfig(**COMMON))], ids=["VisualBERT", "UNITER"])
def model(request):
    return MultitaskVLM(request.param).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 16)


def test_a_caption_is_told_from_the_picture_and_what_came_before(model, images):
    tokens = TOKENS[:1]
    tell = lambda tokens: model(images[:1], tokens, task="caption")
    for t in range(1, 6):
        other = tokens.clone()
        other[0, t] = 11
        change = (tell(other) - tell(tokens)).abs().amax(dim=-1)[0]
        assert (change[:t] < 1e-6).all() and (change[t:] > 1e-6).all()
    assert not torch.allclose(model(images[1:], tokens, task="caption"), tell(tokens))


def test_features_stand_in_for_images_in_every_task(model, images):
    features = ImageFeatures(model.image_features(images))
    assert model.image_features(features) is features.tensor
    for task in ("caption", "answer", "search"):
        assert_same(model(features, TOKENS, MASK, task=task), model(images, TOKENS, MASK, task=task), tolerance=0)
    generated = [model.generate(given, TOKENS[:, :1], max_new_tokens=4) for given in (images, features)]
    assert generated[0].equal(generated[1])


def test_a_picture_and_a_text_are_compared_without_having_met(model, images):
    logits = model(images, TOKENS, MASK, task="search")
    assert_same(logits, model.loss.logits(model.encode_image(images), model.encode_text(TOKENS, MASK)))
    assert_same(model.encode_image(images).norm(dim=-1), torch.ones(2))
    assert_same(model.encode_text(TOKENS[1:, :4]), model.encode_text(TOKENS, MASK)[1:])


def test_answers_are_the_encoders(model, images):
    assert_same(model(images, TOKENS, MASK, task="answer"), model.encoder.answer(images, TOKENS, MASK))


def test_speaking_step_by_step_equals_reading_it_all(model, images):
    """Greedy captions, whose beginnings differ in length."""
    tokens, mask = torch.tensor([[1, 5, 6], [1, 0, 0]]), torch.tensor([[True] * 3, [True, False, False]])
    said = model.generate(images, tokens, mask, max_new_tokens=6, end_tokens=())
    for i, start in enumerate(([1, 5, 6], [1])):
        row = list(start)
        for token in said[i].tolist():
            logits = model(images[i : i + 1], torch.tensor([row]), task="caption")[0, -1]
            assert token == logits.argmax().item()
            row.append(token)


def test_every_row_is_told_as_if_it_were_alone(model, images):
    decoding = model.prefill(images, TOKENS[:, :1], room=3)
    for row in range(2):
        alone = model.prefill(images[row : row + 1], TOKENS[:1, :1], room=3)
        assert_same(decoding.logits[row], alone.logits[0])
    decoding.step(torch.tensor([5, 6]))
    decoding.reorder(torch.tensor([1, 1]))
    assert_same(decoding.logits[0], decoding.logits[1])
    assert_same(decoding.logits[0], model(images[1:], torch.tensor([[1, 6]]), task="caption")[0, -1])


def test_beyond_its_context_it_does_not_speak(model, images):
    with pytest.raises(ValueError, match=r"a prompt of 6 tokens and 7 new ones do not fit the context of 12"):
        model.prefill(images, TOKENS, MASK, room=7)
    decoding = model.prefill(images, TOKENS, MASK, room=0)
    with pytest.raises(ValueError, match="no room"):
        decoding.step(torch.tensor([1, 1]))


def batch(images):
    captions = dict(tokens=TOKENS, mask=MASK)
    return dict(images=images, **captions, question=TOKENS, question_mask=MASK, answers=torch.eye(3)[[2, 0]])


def test_each_loss_is_a_share_of_what_knowing_nothing_costs(model, images):
    losses = model.losses(**batch(images))
    chosen, right = model(images, TOKENS, MASK, task="answer"), torch.eye(3)[[2, 0]]
    if model.config.encoder.answer_loss == "softmax":
        answer, chance = -chosen.log_softmax(dim=-1)[right == 1].mean(), math.log(3)
    else:
        answer = F.binary_cross_entropy_with_logits(chosen, right, reduction="sum") / 2
        chance = math.log(3) + 2 * math.log(3 / 2)
    assert_same(losses["answer"], answer / chance)
    logits = model(images, TOKENS, MASK, task="caption").log_softmax(dim=-1)
    told = [-logits[i, t, TOKENS[i, t + 1]] for i in range(2) for t in range(5) if MASK[i, t + 1]]
    assert_same(losses["caption"], torch.stack(told).mean() / math.log(40))
    search = model.loss(model.encode_image(images), model.encode_text(TOKENS, MASK))
    assert_same(losses["search"], search / math.log(2))


def test_a_caption_counts_as_often_as_it_is_told(model, images):
    even = model.losses(**batch(images))
    heavy = MultitaskVLM(replace(model.config, caption_weight=4.0)).eval()
    heavy.load_state_dict(model.state_dict())
    losses = heavy.losses(**batch(images))
    assert_same(losses.pop("caption"), 4 * even.pop("caption"))
    for name, loss in losses.items():
        assert_same(loss, even[name])


def test_all_tasks_can_be_learnt_at_once(model, images):
    model.freeze("encoder.vision")
    assert_can_overfit(
        model, batch(images), lambda model, batch: sum(model.losses(**batch).values()), learning_rate=3e-3, target=0.1
    )


def test_a_task_has_the_fields_names_as_well_and_may_stand_last(model, images):
    for name, task in (("vqa", "answer"), ("retrieval", "search"), ("caption", "caption")):
        assert model(images, TOKENS, MASK, name).equal(model(images, TOKENS, MASK, task=task))
    with pytest.raises(
        UserError, match=r"None is no task of this MultitaskVLM\. There are: answer, caption, retrieval"
    ):
        model(images, TOKENS, MASK)
    with pytest.raises(UserError, match=r"Did you mean caption\? There are: caption, answer, search, vqa, retrieval"):
        model(images, TOKENS, MASK, "captions")


def test_an_unknown_task_is_refused_by_name(model, images):
    with pytest.raises(UserError, match=r"'captoin' is no task of this MultitaskVLM. Did you mean caption\?"):
        model(images, TOKENS, MASK, task="captoin")
    alone = MultitaskVLM(replace(model.config, tasks=("caption",)))
    with pytest.raises(UserError, match="'search' is no task of this MultitaskVLM"):
        alone(images, TOKENS, MASK, task="search")
    assert alone.losses(images, tokens=TOKENS, mask=MASK).keys() == {"caption"}
    assert alone.config.answers == () and alone.abilities == {"caption"}


def test_without_a_config_it_is_a_small_one_that_knows_the_ids_of_a_tokeniser_of_ours():
    processor = Processor.train(["a red circle", "is it red?"], vocab_size=300, image_size=64, context=16)
    model, images = MultitaskVLM().eval(), torch.randn(2, 3, 64, 64)
    assert (model.config.end_token, model.config.pad_token) == (processor.end_token, processor.pad_token)
    tokens, mask = processor.text(["a red circle", "is it red?"])
    shapes = {task: tuple(model(images, tokens, mask, task).shape) for task in ("caption", "vqa", "retrieval")}
    assert shapes == {"caption": (2, tokens.shape[1], 4096), "vqa": (2, 2), "retrieval": (2, 2)}


def test_an_encoder_that_cannot_do_the_tasks_is_refused():
    with pytest.raises(ValueError, match="needs a vision tower"):
        replace(CONFIG, encoder=replace(CONFIG.encoder, vision=None))
    with pytest.raises(ValueError, match="no answers to choose from"):
        replace(CONFIG, encoder=replace(CONFIG.encoder, answers=()))


def test_comes_back_from_a_directory(model, images, tmp_path):
    model.save_pretrained(tmp_path)
    back, _ = checkpoint.load(tmp_path)
    assert back.config == model.config
    for task in ("caption", "answer", "search"):
        assert_same(back(images, TOKENS, MASK, task=task), model(images, TOKENS, MASK, task=task), tolerance=0)
