"""How well a model expects held-out texts about images: perplexity, beside its own image and beside another's.

perplexity of answers    exp of the mean surprise (nats) per token that the model should generate, over all tokens of a split
in place of chance       the same beside the image of another sample: a model that sees has the first clearly below it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minivlm.conversation import IGNORED
from minivlm.datasets.batches import CaptionsToGenerate
from minivlm.datasets.conversations import Conversations
from minivlm.datasets.judge import conversation_problem
from minivlm.datasets.sequence_batches import ConversationTurns, QuestionsToEncoder
from minivlm.errors import UserError
from minivlm.layers.tower import ImageFeatures
from minivlm.metrics import Samples, Score
from minivlm.processes import each
from minivlm.tasks.abilities import can_answer
from minivlm.tasks.features import inference

AT_A_TIME = 16  # samples
MOST = 1000  # samples whose texts are expected


def text_perplexity(model, processor, conversations: Conversations, *, captions: bool, most: int = MOST) -> Score:
    """Of `most` samples, always the same ones; with `captions` of one caption each. Those that the context has no room for are
    not counted.  UserError where that leaves none."""
    answers = can_answer(model, processor)
    problem = conversation_problem(processor, alone=not model.continues_prompt) if answers else lambda turns: None

    def images_of(indices: Sequence[int]) -> dict[str, ImageFeatures]:
        flat = [image for images in conversations.images(indices) for image in images]
        if not flat:
            return {}
        return {"images": ImageFeatures(model.image_features(processor.images(flat).to(model.device, model.dtype)))}

    turns = ConversationTurns(conversations, processor, images_of, "", captions=captions)
    if not answers:
        samples = CaptionsToGenerate(conversations, processor, images_of, "")
    else:
        samples = turns if model.continues_prompt else QuestionsToEncoder(turns, all_at_once=0.0)
    known = [i for i in range(len(conversations)) if conversations.captions(i) or not captions]
    known = [known[i] for i in some_of(len(known), most)]
    known = [i for i in known if not problem(turns.turns(i, np.random.default_rng(i)))]

    def surprise(start: int) -> tuple[float, float, int]:
        some = known[start : start + AT_A_TIME]
        batch = samples.batch(some, [np.random.default_rng(i) for i in some], 0)
        batch = {name: value.to(model.device) for name, value in batch.items()}
        moved = batch | another_image(batch, sum(map(conversations.image_count, some)))
        n = int((batch["labels"] != IGNORED).sum())
        own, others = (n * sum(model.losses(**one).values()).item() for one in (batch, moved))
        return own, others, n

    with inference(model):
        found = each(surprise, range(0, len(known), AT_A_TIME))
    sums = np.array(found, dtype=float).reshape(-1, 3)
    if not sums[:, 2].any():
        raise UserError(f"none of the {conversations.split} texts fits the context of {processor.context} tokens.")
    own, others = (Samples("perplexity", sums[:, [column, 2]]) for column in (0, 1))  # a row: AT_A_TIME texts
    return Score.of(own, others.value, share=False)


def another_image(batch: dict, images: int) -> dict[str, ImageFeatures]:
    """The features of a batch of so many images, moved on by half of them."""
    if not images:
        return {}
    features = batch["images"].tensor.unflatten(0, (images, -1))  # (M, views, N, C)
    return {"images": ImageFeatures(features.roll(images // 2, dims=0).flatten(0, 1))}


def some_of(n: int, most: int) -> Sequence[int]:
    """`most` of n indices, always the same ones, in order; all of them, if there are no more."""
    return range(n) if n <= most else sorted(np.random.default_rng(0).permutation(n)[:most].tolist())
