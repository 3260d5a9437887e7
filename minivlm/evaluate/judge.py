"""Judges predictions beside references, without a model: `python -m minivlm.evaluate --predictions FILE --references FILE`.

Captions get COCO's scores (on the shapes world, whose captions parse exactly, how many scenes are described right), answers
VQA's accuracy, yes and no POPE's.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minivlm.atomic_writing import write_atomically
from minivlm.datasets.conversations import Question
from minivlm.datasets.source import source_of
from minivlm.errors import UserError
from minivlm.evaluate.generation import FREE_ANSWERS, caption_values, captions_of_world, word_overlap
from minivlm.evaluate.judge_objects import object_scores
from minivlm.evaluate.pairing import Pair, answered, captioned, said_yes_or_no
from minivlm.evaluate.predictions import Prediction, read_predictions
from minivlm.evaluate.references import Asked, References, joined, read_references
from minivlm.evaluate.table import side_by_side, table
from minivlm.metrics import Score, vqa_accuracy
from minivlm.metrics.caption_scores import caption_scores
from minivlm.metrics.pope import means_yes, pope_scores
from minivlm.metrics.vqa import rightness

SHOWN = 5  # names in a message
KEYS = ("image_key", "caption_key", "class_names")
RENAMED = {"split": "judged_split"}
Scores = dict[str, Score]


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        nargs="+",
        help="captions or answers: with MODEL a file that is written, or judged where it is there; without, what is judged",
    )
    parser.add_argument(
        "--references",
        metavar="FILE_OR_DIR",
        nargs="+",
        help="without MODEL: COCO's captions, VQA's annotations, POPE's questions, or a folder that training takes",
    )
    parser.add_argument(
        "--partial", action="store_true", help="--references: judge what both have, and leave out the rest"
    )


def needs_no_model(options: Namespace) -> bool:
    """Are there predictions that are to be judged? Else the model generates them."""
    return bool(options.predictions) and (options.model is None or Path(options.predictions[0]).exists())


def check(options: Namespace, refuse: Callable[[str], Any]) -> None:
    """Complain, before anything is read, of options that do not go together, and of a place that cannot be written."""
    check_kept(options, refuse)
    if options.model is None:
        names = ("shots", "wise", "diagnose", "split", "neighbours", *KEYS)
        others = [name for name in names if getattr(options, RENAMED.get(name, name)) is not None]
        if others:
            refuse(f"--{others[0]} needs a MODEL")
        if not (options.predictions and options.references):
            refuse("name a MODEL, or what is to be judged: --predictions FILE --references FILE_OR_DIR")
        if options.against in options.predictions:
            refuse(f"--against {options.against} is what --predictions names: name another file")
        if options.against and len(options.predictions) > 1:
            refuse("--against compares two files, and --predictions names several: compare them one by one")
        return
    if options.references and not options.predictions:
        refuse("--references belongs to --predictions: a MODEL is judged on --data DIR")
    if not options.predictions:
        return
    if len(options.predictions) > 1:
        refuse(f"a MODEL writes one file of predictions, and --predictions names {len(options.predictions)}")
    [file] = options.predictions
    if needs_no_model(options):
        options.references = options.references or [source_of(options.data, options)]
        print(f"{file} is there: its predictions are judged, and {options.model} generates none.", file=sys.stderr)
    elif Path(file).suffix not in (".json", ".jsonl"):
        refuse(f"--predictions {file}: the name has to end in .jsonl or .json")
    elif not Path(file).absolute().parent.is_dir():
        refuse(f"--predictions {file}: the folder {Path(file).parent} does not exist; make it first")


def check_kept(options: Namespace, refuse: Callable[[str], Any]) -> None:
    """Complain where the scores would be written over what they are made of."""
    for name in ("predictions", "references", "against", "objects"):
        given = getattr(options, name) or ()
        for place in [given] if isinstance(given, str) else given:
            if options.save and Path(options.save).resolve() == Path(str(place)).resolve():
                refuse(f"--save {options.save} would be written over --{name}: choose another place")


def require_texts(model) -> None:
    """UserError for a model whose evaluation generates nothing."""
    if not model.takes_images or not model.abilities & {"caption", "answer", "choose"}:
        raise UserError(f"--predictions: a {type(model).__name__} generates no captions and no answers.")


def run(options: Namespace) -> tuple[Scores, list[Prediction]]:
    """Print the scores, of two files side by side with --against; with --save write plain numbers, of two by their names."""
    files, against = options.predictions, options.against
    scores, judged, notes = judge_files(files, options.references, partial=options.partial, objects=options.objects)
    columns = {"": scores}
    if against:
        other, _, more = judge_files([against], options.references, partial=options.partial, objects=options.objects)
        notes, columns = notes + more, {against: other, files[0]: scores}
    for note in dict.fromkeys(notes):
        print(note, file=sys.stderr)
    print(side_by_side(columns) if against else table(scores))
    if options.save:
        values = {of: {name: score.value for name, score in column.items()} for of, column in columns.items()}
        text = json.dumps(values.get("", values), indent=1, ensure_ascii=False)
        write_atomically(options.save, lambda file: file.write_text(f"{text}\n", encoding="utf-8"))
    return scores, judged


def judge_files(files: Sequence[Any], places: Sequence[Any], **how: Any) -> tuple[Scores, list[Prediction], list[str]]:
    """The i-th file beside the i-th place, or one file beside all of them together."""
    if len(files) not in (1, len(places)):
        raise UserError(
            f"--predictions names {len(files)} files and --references {len(places)}: give as many of each, or one file of "
            "predictions."
        )
    if len(files) == 1:
        predictions = read_predictions(files[0])
        references = joined([one for place in places for one in references_for(predictions, place)])
        return judge(predictions, references, of=f"{files[0]}", beside=names(places), **how)
    scores, judged, notes = {}, [], []
    for file, place in zip(files, places, strict=True):
        predictions = read_predictions(file)
        references = references_for(predictions, place)
        found = judge(predictions, references, of=f"{file}", beside=f"{place}", **how)
        scores |= {f"{Path(place).name.split('.')[0]}, {name}": score for name, score in found[0].items()}
        judged, notes = judged + found[1], notes + found[2]
    return scores, judged, notes


def references_for(predictions: Sequence[Prediction], place: Any) -> list[References]:
    return read_references(place, questions=not all(p.is_caption for p in predictions))


def names(places: Sequence[Any]) -> str:
    return " and ".join(f"{place}" for place in places)


def judge(
    predictions: Sequence[Prediction],
    references: Sequence[References],
    *,
    of: str,
    beside: str,
    partial: bool = False,
    objects: str | None = None,
) -> tuple[Scores, list[Prediction], list[str]]:
    """Scores, the predictions with their values, and notes for the user.

    objects: a file with the names that count as objects, for CHAIR. UserError where a prediction has no reference or a question
    no answer, unless `partial` leaves them out, and where the two have nothing in common. Captions may be of some of the images
    alone, as in COCO's evaluation: a note tells so.
    """
    if any(one.texts for one in references) and not any(one.questions for one in references):
        raise UserError(f"{beside} holds questions without their answers: name VQA's annotations beside it.")
    left, scores, judged, notes, missing = list(predictions), {}, [], [], []
    for one in references:
        for pairs_of, scores_of, wanted in (
            (captioned, caption_scores_of, len(one.captions)),
            (answered, answer_scores_of, len(one.questions)),
            (said_yes_or_no, pope_scores_of, len(one.pope)),
        ):
            pairs = pairs_of(left, one) if wanted else []
            if not pairs:
                continue
            there = {id(p) for p, _ in pairs}
            left = [p for p in left if id(p) not in there]
            found, values = scores_of(pairs, one, notes)
            scores |= {f"{one.prefix}{name}": score for name, score in found.items()}
            judged += [
                replace(p, value=value, **about(p, known)) for (p, known), value in zip(pairs, values, strict=True)
            ]
            if wanted > len(pairs) and (pairs_of is captioned or one.free):  # of sentences, too, some are generated
                what, text = ("images", "caption") if pairs_of is captioned else ("questions", "answer")
                notes.append(
                    f"{wanted - len(pairs)} of {wanted} {what} of {beside} have no {text} in {of}: not judged."
                )
            elif wanted > len(pairs):
                missing.append(f"{wanted - len(pairs)} of {wanted} questions of {beside} have no answer in {of}")
    if objects and not any(p.is_caption for p in predictions):
        raise UserError(f"--objects {objects}: {of} holds answers, and objects are counted in captions; leave it out.")
    found, named = objects_judged([p for p in predictions if p.is_caption], references, objects)
    scores, known = scores | found, {id(p) for p in named}
    judged += [p for p in left if id(p) in known]
    left = [p for p in left if id(p) not in known]
    if not judged:
        raise UserError(
            f"none of the {len(predictions)} predictions of {of} (first: {predictions[0].name}) is of what {beside} holds: are "
            "the two of one data set?"
        )
    if left:
        missing.append(f"{len(left)} of {len(predictions)} predictions of {of} have no reference in {beside}")
        missing[-1] += f" ({', '.join(p.name for p in left[:SHOWN])}{', …' * (len(left) > SHOWN)})"
    if missing and not partial:
        raise UserError(f"{'; '.join(missing)}. Give all, or judge what both have with --partial.")
    notes += [f"{why}: left out." for why in missing]
    if empty := sum(not p.text.strip() for p in judged):
        notes.append(f"{empty} of {len(judged)} predictions of {of} are empty, and are judged as they are.")
    if blank := sum(not text.strip() for one in references for known in one.captions.values() for text in known):
        notes.append(f"{blank} captions of {beside} are empty, and count as references without a word.")
    return scores, judged, notes


def objects_judged(
    captions: Sequence[Prediction], references: Sequence[References], file: str | None
) -> tuple[Scores, list[Prediction]]:
    """CHAIR, where objects are named or COCO's instances are among the references."""
    if not file and not any(one.objects for one in references):
        return {}, []
    known = {image: some for one in references for image, some in one.captions.items()}
    there = {image: some for one in references for image, some in one.objects.items()}
    categories = [name for one in references for name in one.categories]
    further = {k: v for one in references for k, v in one.names.items()}
    return object_scores(captions, known, there, further, file, categories)


def about(p: Prediction, known: Any) -> dict[str, Any]:
    """What a reference adds to a prediction."""
    if not isinstance(known, Asked):
        return {"references": tuple(known)}
    kind = p.kind or (known.kinds[0] if known.kinds else "")
    return {
        "references": known.answers,
        "question": p.question or known.text,
        "image": p.image or known.image,
        "kind": kind,
    }


# ---- scores, and how right each prediction is ----------------------------------------------------------------------------


def caption_scores_of(pairs: Sequence[Pair], references: References, notes: list[str]) -> tuple[Scores, list[float]]:
    texts, known = [p.text for p, _ in pairs], [captions for _, captions in pairs]
    values = caption_values(texts, known, world=references.world)
    if references.world:
        return captions_of_world(texts, known), values
    return caption_scores(texts, known, ids=[p.image for p, _ in pairs], notes=notes), values


def answer_scores_of(pairs: Sequence[Pair], references: References, notes: list[str]) -> tuple[Scores, list[float]]:
    texts, asked = [p.text for p, _ in pairs], [question for _, question in pairs]
    if references.free:
        known = [question.answers for question in asked]
        return {FREE_ANSWERS: word_overlap(texts, known)}, caption_values(texts, known, world=False)
    number = {image: i for i, image in enumerate(dict.fromkeys(question.image for question in asked))}
    scores: Scores = {}
    for place in range(
        max(1, *(len(question.kinds) for question in asked))
    ):  # VQA v2: of the answer, and of the question
        kinds = [question.kinds[place] if place < len(question.kinds) else "all" for question in asked]
        questions = [Question(number[q.image], q.text, q.answers, kind) for q, kind in zip(asked, kinds, strict=True)]
        scores = vqa_accuracy(questions, texts) | scores
    return dict(sorted(scores.items(), key=lambda item: item[0] != "accuracy")), [
        rightness(text, question.answers) for text, question in zip(texts, asked, strict=True)
    ]


def pope_scores_of(pairs: Sequence[Pair], references: References, notes: list[str]) -> tuple[Scores, list[float]]:
    split: Callable[[Asked], str] = lambda question: question.kinds[0] if question.kinds else ""
    answers = [(p.text, question.answers[0] == "yes") for p, question in pairs]
    scores: Scores = {}
    for kind in dict.fromkeys(split(question) for _, question in pairs):
        rows = [i for i, (_, question) in enumerate(pairs) if split(question) == kind]
        found = pope_scores([answers[i] for i in rows], [pairs[i][1].image for i in rows])
        scores |= {f"POPE, {kind}, {name}" if kind else f"POPE, {name}": score for name, score in found.items()}
    return scores, [float(means_yes(text) == label) for text, label in answers]
