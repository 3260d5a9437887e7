"""A model that judges what another one has generated: which of several captions fits an image best, and is there a circle?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minivlm.errors import UserError
from minivlm.evaluate.diagnose.objects import Objects, with_article
from minivlm.evaluate.generation import answers_questions
from minivlm.metrics.pope import means_yes
from minivlm.metrics.vqa import normalise
from minivlm.tasks.abilities import require
from minivlm.tasks.features import encode_images, encode_texts
from minivlm.tasks.generate import answer_all
from minivlm.tasks.match import match_each

LONG = 16  # tokens of an answer
AT_A_TIME = 64


class Judge(NamedTuple):
    """name: as it is told."""

    model: object
    processor: object
    name: str

    @property
    def how(self) -> str:
        return "matching" if "match" in self.model.abilities else "comparing"

    def fits(self, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
        """(N,) how well each text fits the image of its index: a probability, or a cosine of a model that compares only."""
        model, processor = self.model, self.processor
        if "match" in model.abilities:
            return np.array(match_each(images, texts, model, processor))
        distinct = list({id(image): image for image in images}.values())
        place = {id(image): i for i, image in enumerate(distinct)}
        known = list(dict.fromkeys(texts))
        x = encode_images(distinct, model, processor)[[place[id(image)] for image in images]]
        y = encode_texts(known, model, processor, cut=True)
        number = {text: i for i, text in enumerate(known)}
        y = y[[number[text] for text in texts]]
        return (x * y).sum(dim=-1).cpu().numpy()  # (N, D) each

    @property
    def confirms_objects(self) -> bool:
        return says_yes_and_no(self.model, self.processor) or "match" in self.model.abilities

    def confirms(self, images: Sequence[np.ndarray], names: Sequence[str], objects: Objects) -> list[bool]:
        """Whether each object is in the image of its index: asked, if the model answers, else matched."""
        if says_yes_and_no(self.model, self.processor):
            return yes_to([(image, objects.ask(name)) for image, name in zip(images, names, strict=True)], self)
        return (self.fits(images, [with_article(name) for name in names]) >= 0.5).tolist()


def check_matcher(model, processor, name: str) -> Judge:
    """UserError, before the work, for a model that cannot say how well a text fits an image."""
    try:
        require(model, processor, "match", "encode")
    except UserError as error:
        raise UserError(f"--matcher {name}: {error} A BLIP or a CLIP can.") from None
    return Judge(model, processor, name)


def says_yes_and_no(model, processor) -> bool:
    can_answer = model.takes_images and model.abilities & {"answer", "choose"}
    if not can_answer or not answers_questions(model, processor):
        return False
    return "choose" not in model.abilities or {"yes", "no"} <= {normalise(answer) for answer in model.config.answers}


def yes_to(asked: Sequence[tuple[np.ndarray, str]], judge: Judge) -> list[bool]:
    """Whether the answer to each question is yes, as POPE reads it."""
    texts = []
    for start in range(0, len(asked), AT_A_TIME):
        samples = [([image], question) for image, question in asked[start : start + AT_A_TIME]]
        texts += answer_all(samples, judge.model, judge.processor, max_new_tokens=LONG)
    return [means_yes(text) for text in texts]
