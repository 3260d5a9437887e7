"""What a model says that it can do is what it has methods for."""

from dataclasses import replace

import pytest

from minivlm.layers import VisionTransformer
from minivlm.model import Model
from minivlm.models.clip import CLIP
from minivlm.models.multitask import MultitaskVLM
from minivlm.models.uniter import UNITER
from minivlm.models.vqa import VQAModel
from tests import speakers
from tests.models.test_blip import blip
from tests.models.test_blip2 import MODELS as BLIP2S
from tests.models.test_blip2 import blip2
from tests.models.test_blip2_stage1 import CONFIG as STAGE1
from tests.models.test_blip2_stage1 import stage1
from tests.models.test_clip import CONFIGS as CLIPS
from tests.models.test_joint_encoder import CLASSES, CONFIGS
from tests.models.test_multitask import CONFIG as MULTITASK
from tests.models.test_vqa import CONFIG as VQA

WORDS = {"encode", "compare", "match", "caption", "answer", "choose", "rank", "chat", "complete", "attend", "few-shot"}
METHODS = {
    "encode": ("encode_image", "encode_text", "probabilities"),
    "compare": ("encode_image",),
    "match": ("match",),
    "choose": ("answer",),
    "rank": ("rank",),
    **dict.fromkeys(("caption", "answer", "chat", "complete"), ("generate", "stream", "prefill")),
    "few-shot": ("image_features", "generate"),
}
METHODS_OF_TEXT = {"caption", "answer", "chat", "complete"}
MODELS = {
    "captioner": (speakers.captioner, {"caption", "attend"}),
    "llava": (speakers.llava, {"caption", "answer", "chat", "complete", "attend", "few-shot"}),
    "flamingo": (speakers.flamingo, {"caption", "answer", "chat", "complete", "few-shot"}),
    "language model": (speakers.language_model, {"answer", "chat", "complete"}),
    **{
        CLASSES[type(config)].__name__: (
            lambda config=config: CLASSES[type(config)](config),
            {"match", "choose", "attend"},
        )
        for config in CONFIGS
    },
    "uniter of a detector": (lambda: UNITER(replace(CONFIGS[1], vision=None, heads=())), {"choose"}),
    "uniter without answers": (lambda: UNITER(replace(CONFIGS[1], answers=())), {"match"}),
    "vision tower": (lambda: VisionTransformer(CLIPS["vit"].vision), {"compare"}),
    "vqa": (lambda: VQAModel(VQA), {"choose", "attend"}),
    "multitask": (lambda: MultitaskVLM(MULTITASK), {"caption", "choose", "attend", "encode"}),
    "multitask, search": (lambda: MultitaskVLM(replace(MULTITASK, tasks=("search",))), {"encode"}),
    "clip": (lambda: CLIP(CLIPS["vit"]), {"encode", "attend"}),
    "blip": (blip, {"encode", "match", "caption", "answer", "chat", "rank", "attend"}),
    "blip not trained on questions": (
        lambda: blip(trained_on_questions=False),
        {"encode", "match", "caption", "attend"},
    ),
    "blip that matches": (lambda: blip(roles="match"), {"encode", "match", "attend"}),
    "blip that describes": (lambda: blip(roles="caption"), {"caption", "attend"}),
    "blip that answers": (lambda: blip(roles="answer"), {"caption", "answer", "chat", "rank", "attend"}),
    "stage 1": (stage1, {"encode", "match", "caption", "attend"}),
    "stage 1 without words": (lambda: stage1(replace(STAGE1, text_head=False)), {"encode", "match", "attend"}),
    **{
        f"blip2, {name}": (
            lambda config=config: blip2(config),
            {"caption", "answer", "chat", "complete", "attend"} | ({"few-shot"} if "front" not in name else set()),
        )
        for name, config in BLIP2S.items()
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_names_what_it_can_do_and_has_the_methods_for_it(name):
    build, expected = MODELS[name]
    model = build()
    assert model.abilities == expected
    assert model.image_attention if "attend" in model.abilities else True
    assert model.image_placeholders if "few-shot" in model.abilities else True
    assert {"context", "vocab_size"} <= {*dir(model.language_config)} if METHODS_OF_TEXT & model.abilities else True
    assert all(hasattr(model, method) for word in model.abilities for method in METHODS.get(word, ()))


def test_a_model_that_names_nothing_can_do_nothing():
    assert Model(None).abilities == frozenset()


def test_the_table_of_words_is_complete():
    rows = [line.split("|")[1].strip() for line in Model.abilities.fget.__doc__.splitlines() if line.count("|") == 3]
    assert set(rows) - {"word", "----------"} == WORDS
