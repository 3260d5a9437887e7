"""Scores of a model that answers questions about images, or describes them, on held-out images.

Beside each accuracy stand that of the question alone (chance) and that of the same model when it is given the image of
another question (blind): an answer that is right even then does not come from the image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from minivlm.datasets.conversations import Conversations, Question, open_conversations
from minivlm.datasets.judge import ANSWER, question_problem
from minivlm.datasets.shapes import is_world
from minivlm.datasets.shapes.text import parse
from minivlm.errors import UserError
from minivlm.evaluate.expectation import text_perplexity
from minivlm.evaluate.predictions import Prediction
from minivlm.metrics import Samples, Score, scene_match, vqa_accuracy
from minivlm.metrics.caption_scores import caption_scores
from minivlm.metrics.vqa import agreement, normalise, rightness
from minivlm.pictures import Row, sheet, wrap
from minivlm.processes import each
from minivlm.tasks.abilities import can_answer
from minivlm.tasks.generate import answer_all, caption_all, question_tokens

TILE = 176  # pixels of an image on the sheet
CAPTIONS = 500  # at most, to be described; and as many answers in whole sentences
SHORT, LONG = ANSWER, 64  # tokens of an answer, and of a caption or a sentence
FREE_ANSWERS = "answers, words in common"
AT_A_TIME = 64  # samples whose images are in memory
SHAPES_SPLITS = {"test": "", "unseen": "never-seen pairs, "}


def answers_and_captions(
    model, processor, directory: str | Path, *, ask_questions: bool = True, kept: list[Prediction] | None = None
) -> dict[str, Score]:
    """All scores on the held-out part of a dataset, by name, in the order of the table. kept: gets the predictions."""
    ask_questions = ask_questions and answers_questions(model, processor)
    describes, world = "caption" in model.abilities, is_world(directory)
    scores = {}
    for split, name in SHAPES_SPLITS.items() if world else [("test", "")]:
        conversations = open_conversations(directory, split, image_size=processor.image_size)
        found = {}
        if ask_questions and (questions := conversations.questions()):
            found |= answers(model, processor, conversations, questions, kept)
            if conversations.free_answers and model.predicts_text:
                found["perplexity of answers"] = text_perplexity(model, processor, conversations, captions=False)
        if describes and captioned(conversations):
            found |= captions(model, processor, conversations, directory, kept=kept)
            if not world and model.predicts_text:
                found["perplexity of captions"] = text_perplexity(model, processor, conversations, captions=True)
        scores |= {f"{name}{key}": score for key, score in found.items()}
    return scores


def captioned(conversations: Conversations) -> list[int]:
    """The samples that have captions."""
    return [i for i in range(len(conversations)) if conversations.captions(i)]


def answers_questions(model, processor) -> bool:
    """In words of its own, or in those of a list."""
    return "choose" in model.abilities or can_answer(model, processor)


def answers(
    model,
    processor,
    conversations: Conversations,
    questions: Sequence[Question],
    kept: list[Prediction] | None = None,
) -> dict[str, Score]:
    """Accuracy in all, by kind of question, and blind; of conversations, also how many words are right."""
    check_questions(model, processor, conversations)
    if conversations.free_answers:
        questions = questions[:CAPTIONS]
    others = [questions[(i + len(questions) // 2) % len(questions)].index for i in range(len(questions))]
    asked = [(question.index, question) for question in questions]
    blind = list(zip(others, questions, strict=True))
    given = ask_about(model, processor, conversations, asked + blind)
    texts, unseen = given[: len(questions)], given[len(questions) :]
    if kept is not None:
        value_of = word_f1 if conversations.free_answers else rightness
        values = [value_of(text, question.answers) for text, question in zip(texts, questions, strict=True)]
        kept += [
            Prediction(text, conversations.key(q.index), q.text, kind=q.kind, references=q.answers, value=value)
            for text, q, value in zip(texts, questions, values, strict=True)
        ]
    if conversations.free_answers:
        return {FREE_ANSWERS: words_right(questions, texts), f"{FREE_ANSWERS}, blind": words_right(questions, unseen)}
    return {**vqa_accuracy(questions, texts), "accuracy, blind": vqa_accuracy(questions, unseen)["accuracy"]}


def words_right(questions: Sequence[Question], texts: Sequence[str]) -> Score:
    """Of questions whose answers are sentences: the words that the model's answers have in common with them."""
    return word_overlap(texts, [question.answers for question in questions])


def ask(model, processor, conversations: Conversations, questions: Sequence[Question]) -> list[str]:
    """The model's answers."""
    return ask_about(model, processor, conversations, [(question.index, question) for question in questions])


def ask_about(model, processor, conversations: Conversations, asked: Sequence[tuple[int, Question]]) -> list[str]:
    """The answers to questions about the images of these samples: each image is decoded and encoded once, however often it is
    asked about."""
    longest, questions = SHORT, [question for _, question in asked]
    if conversations.free_answers and "choose" not in model.abilities:
        longest_prompt = max(
            len(question_tokens(q.text, conversations.image_count(q.index), processor)) for q in questions
        )
        longest = max(SHORT, min(LONG, model.language_config.context - longest_prompt))

    def answers_to(part: list[int]) -> list[str]:
        indices = list(dict.fromkeys(asked[i][0] for i in part))
        images = dict(zip(indices, conversations.images(indices), strict=True))
        samples = [(images[asked[i][0]], asked[i][1].text) for i in part]
        return answer_all(samples, model, processor, max_new_tokens=longest, batch_size=len(part))

    texts, parts = [""] * len(asked), [*by_image([index for index, _ in asked])]
    for part, found in zip(parts, each(answers_to, parts), strict=True):
        for i, text in zip(part, found, strict=True):
            texts[i] = text
    return texts


def by_image(indices: Sequence[int]) -> Iterator[list[int]]:
    """Places in `indices`, those of one image together, at most twice AT_A_TIME at once; and no more of one image than that."""
    part: list[int] = []
    for i in sorted(range(len(indices)), key=lambda i: indices[i]):
        full = len(part) >= 2 * AT_A_TIME
        if full or (len(part) >= AT_A_TIME and indices[i] != indices[part[-1]]):
            yield part
            part = []
        part.append(i)
    if part:
        yield part


def check_questions(
    model, processor, conversations: Conversations, questions: Sequence[Question] | None = None
) -> None:
    """UserError for a question, of these or of all, that the model cannot be asked, before any is."""
    for index, text, *_ in conversations.questions() if questions is None else questions:
        context = None if "choose" in model.abilities else model.language_config.context
        if why := question_problem(text, conversations.image_count(index), processor, context=context):
            raise UserError(
                f"a {conversations.split} question, about {conversations.key(index)}: {why} Shorten it, or leave it out."
            )


def describe_all(model, processor, conversations: Conversations, indices: Sequence[int]) -> list[str]:
    """The model's captions of these samples."""

    def describe(start: int) -> list[str]:
        images = conversations.images(indices[start : start + AT_A_TIME])
        return caption_all(images, model, processor, max_new_tokens=LONG)

    return [*chain.from_iterable(each(describe, range(0, len(indices), AT_A_TIME)))]


def captions(
    model,
    processor,
    conversations: Conversations,
    directory: str | Path,
    *,
    most: int = CAPTIONS,
    kept: list[Prediction] | None = None,
) -> dict[str, Score]:
    """Of the shapes world: does a caption name all that is there? Of photographs: how many of its words are right, and COCO's
    scores."""
    indices = captioned(conversations)[:most]
    texts = describe_all(model, processor, conversations, indices)
    if kept is not None:
        known = [tuple(conversations.captions(i)) for i in indices]
        values = caption_values(texts, known, world=is_world(directory))
        kept += [
            Prediction(text, conversations.key(i), references=some, value=value)
            for text, i, some, value in zip(texts, indices, known, values, strict=True)
        ]
    known = [conversations.captions(i) for i in indices]
    if is_world(directory):
        return captions_of_world(texts, known)
    scores = caption_scores(texts, known, names=("BLEU-4", "ROUGE-L", "CIDEr"))
    scores = {"words in common": word_overlap(texts, known), **scores}
    return {f"captions, {name}": score for name, score in scores.items()}


def captions_of_world(texts: Sequence[str], known: Sequence[Sequence[str]]) -> dict[str, Score]:
    """Captions of the shapes world beside the canonical ones: how many scenes are described right, and SPICE."""
    scores = scene_match(texts, [captions[0] for captions in known])
    scores |= caption_scores(texts, known, names=("SPICE",), world=True)
    return {f"captions, {name}": score for name, score in scores.items()}


def caption_values(texts: Sequence[str], known: Sequence[Sequence[str]], *, world: bool) -> list[float]:
    """How right each caption is: of the shapes world 1 if it names all that is there and nothing else, else its words."""
    if world:
        return [float(Counter(parse(text)) == Counter(parse(some[0]))) for text, some in zip(texts, known, strict=True)]
    return [word_f1(text, some) for text, some in zip(texts, known, strict=True)]


def word_overlap(texts: Sequence[str], known: Sequence[Sequence[str]]) -> Score:
    """Mean F1 of the distinct words of a caption and its best reference; chance: with the next image's references."""
    if not len(texts):
        raise UserError("there are no captions or answers to measure with.")
    right, chance = (
        [word_f1(text, some) for text, some in zip(texts, others, strict=True)]
        for others in (known, [*known[1:], known[0]])
    )
    return Score.of(Samples.mean(right), sum(chance) / len(chance))


def word_f1(text: str, references: Sequence[str]) -> float:
    a = set(normalise(text).split())
    sets = [set(normalise(r).split()) for r in references]
    return max(2 * len(a & b) / max(1, len(a) + len(b)) for b in sets)


def answers_sheet(model, processor, directory: str | Path, path: Path, *, ask_questions: bool = True) -> None:
    """Draw held-out images with a question and the model's answer; without questions, with its captions."""
    conversations = open_conversations(directory, "test", image_size=processor.image_size)
    questions = conversations.questions() if ask_questions and answers_questions(model, processor) else []
    rows = (
        question_rows(model, processor, conversations, questions)
        if questions
        else caption_rows(model, processor, conversations)
    )
    sheet(rows, title="Answers or captions of the model for held-out images", tile=TILE, columns=4).save(path)


def question_rows(
    model, processor, conversations: Conversations, questions: Sequence[Question], *, columns: int = 4
) -> list[Row]:
    """A row for each kind of question."""
    rows = []
    for kind in list(dict.fromkeys(q.kind for q in questions))[:6]:
        chosen = [q for q in questions if q.kind == kind]
        chosen = chosen[:: max(1, len(chosen) // columns)][:columns]
        texts = ask(model, processor, conversations, chosen)
        right = [
            agreement(normalise(s), [normalise(a) for a in q.answers]) >= 0.5
            for s, q in zip(texts, chosen, strict=True)
        ]
        notes = [
            "\n".join([*wrap(q.text, 13, TILE), f"answer: {s}" + ("" if ok else f", not {q.answers[0]}")])
            for q, s, ok in zip(chosen, texts, right, strict=True)
        ]
        rows.append(Row(kind, [conversations.images([q.index])[0][0] for q in chosen], right, notes))
    return rows


def caption_rows(model, processor, conversations: Conversations, *, columns: int = 4, n: int = 12) -> list[Row]:
    known = captioned(conversations) or range(len(conversations))
    indices = known[:: max(1, len(known) // n)][:n]
    texts = describe_all(model, processor, conversations, indices)
    right = [
        normalise(s) in [normalise(c) for c in conversations.captions(i)] for s, i in zip(texts, indices, strict=True)
    ]
    images = [conversations.images([i])[0][0] for i in indices]
    notes = ["\n".join(wrap(text, 13, TILE)) for text in texts]
    starts = range(0, len(images), columns)
    return [Row("", images[s : s + columns], right[s : s + columns], notes[s : s + columns]) for s in starts]
