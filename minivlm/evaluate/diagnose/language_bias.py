"""Language bias: the answer follows from the question, and the image changes little.

    question ─┬─ own image ───────────→ right?  ─┐ what the image adds
              ├─ another sample's image → right? ─┘
              ├─ a grey image
              └─ none: what is usual in training (question_only.py)

Two figures tell bias from a lack of skill: how often a model is right where the answer is not the usual one (Kervadec et
al. 2021, "Roses are Red, Violets are Blue… but Should VQA Expect Them To?", §3), and balanced pairs (datasets/balanced.py).
The remedy that is tried divides the probability of an answer by what it has beside other images, p(a|v,q) / p(a|q), among
the answers that the model finds plausible (Leng et al. 2024, "Mitigating Object Hallucinations through Visual Contrastive
Decoding", §3.2 and 3.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from minivlm.datasets.balanced import balanced_pairs
from minivlm.datasets.conversations import Conversations, Question, has_conversations, open_conversations
from minivlm.evaluate.diagnose import pairs_sheet
from minivlm.evaluate.diagnose.exchange import Grey, exchanged, log_odds
from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.diagnose.question_only import question_only
from minivlm.evaluate.expectation import some_of
from minivlm.evaluate.generation import answers_questions, ask_about, check_questions
from minivlm.metrics import Samples, Score
from minivlm.metrics.vqa import agreement, normalise

MOST, PAIRS = 1000, 300  # questions, and balanced pairs beside them
KINDS, FEWEST = 12, 20  # kinds of questions in the table, and questions of a kind
OTHERS = 8  # other images beside which the usual probability of an answer is estimated
PLAUSIBLE = 0.1  # an answer is considered from this share of the likeliest one's probability
LITTLE = 0.1  # an image that adds less than this is hardly used; a gap wider than this is a bias
ALIKE = 1 / 3  # share of balanced pairs with one answer to both images, above which the question decides
GAIN, SAME = "what the image adds", "answers that another image leaves as they are"
USUAL, UNUSUAL = "accuracy where the usual answer is right", "accuracy where it is wrong"
GAP, FALLEN = "the former less the latter", "usual answers where they are wrong"
OWN_USUAL, OWN_UNUSUAL = "accuracy where its answer to other images is right", "accuracy where that is wrong"
OWN_GAP = "difference by its answer to other images"
BOTH, ONE = "balanced pairs: both right", "balanced pairs: one answer to both"
SYMPTOM = (
    "answers follow from the question, so that they are as good beside another image, and wrong wherever the usual answer "
    "is. The question alone is judged by what it says in {source}."
)
REMEDY = (
    "{tried}In training: balanced pairs, to each question the same one about an image with another answer (a folder of "
    "either kind: python data/shapes/usual.py --out DIR, and with --balanced; then python train.py vqa --data DIR)."
)
TRIED = (
    f"tried here: the probability of an answer is divided by its mean beside {OTHERS} other images, so that what is usual "
    "counts for nothing. "
)


def left_out(model, processor, data) -> str:
    name = type(model).__name__
    if not model.abilities & {"answer", "choose"} or not model.takes_images or not answers_questions(model, processor):
        return f"a {name} answers no questions about images."
    if not has_conversations(data):
        return f"{data} holds no questions: add vqa.jsonl, a line of image, question and answer each."
    conversations = open_conversations(data, "test", image_size=processor.image_size)
    questions = askable(conversations)
    if not questions:
        return (
            f"{data} holds no questions about single images: add vqa.jsonl, a line of image, question and answer each."
        )
    if conversations.free_answers:
        return f"the answers of {data} are whole sentences, none of which is usual: give questions with short answers."
    if len({normalise(answer) for question in questions for answer in question.answers}) == 1:
        only = questions[0].answers[0]
        return f"every question of {data} has the answer {only!r}, which needs no image: add questions with others."
    if len({question.index for question in questions}) < 2:
        return f"all questions of {data} are about one image, which cannot be exchanged for another: add images."
    return ""


def askable(conversations: Conversations) -> list[Question]:
    return [q for q in conversations.questions() if conversations.image_count(q.index) == 1]


def diagnose(model, processor, data) -> Pitfall:
    exam = Exam.of(model, processor, data)
    pairs = {name: exam.paired(exam.own, name) for name in (BOTH, ONE)} if exam.pairs else {}
    kinds = exam.kinds()
    figures = exam.figures(exam.rows) | pairs
    for kind, rows in kinds.items():
        figures |= {f"{kind}: {name}": score for name, score in exam.of_kind(rows).items()}
    effect = {}
    if "choose" in model.abilities:
        better = exam.contrasted()
        effect = {f"contrast: {name}": pair for name, pair in exam.effect(better).items()}
    return Pitfall(
        name="language-bias",
        symptom=SYMPTOM.format(source=exam.source),
        verdict=verdict(figures, {kind: exam.figures(rows) for kind, rows in kinds.items()}),
        figures=figures,
        remedy=REMEDY.format(tried=TRIED if effect else ""),
        effect=effect,
        image=pairs_sheet.draw(exam.conversations, exam.questions, exam.pairs, exam.own, exam.right(exam.own)),
    )


@dataclass(frozen=True, eq=False)
class Exam:
    """All that is asked. rows: a fair sample of the questions; the others belong to balanced pairs alone. own, other, grey: the
    answers beside the question's own image, another and a grey one. alone: those of the baselines. odds: of a model that
    chooses, log-probabilities (1 + OTHERS, N, A) beside the own image and others."""

    conversations: Conversations
    questions: Sequence[Question]
    rows: Sequence[int]
    pairs: Sequence[tuple[int, int]]
    own: Sequence[str]
    other: Sequence[str]
    grey: Sequence[str]
    alone: dict[str, list[str]]
    source: str
    odds: torch.Tensor | None
    answers: Sequence[str]

    @classmethod
    def of(cls, model, processor, data) -> Exam:
        conversations = open_conversations(data, "test", image_size=processor.image_size)
        check_questions(model, processor, conversations)
        known = askable(conversations)
        pairs, rows = balanced_pairs(known, most=PAIRS), some_of(len(known), MOST)
        kept = sorted({*rows, *(i for pair in pairs for i in pair)})
        place, questions = {i: k for k, i in enumerate(kept)}, [known[i] for i in kept]
        alone, source = question_only(data, conversations, questions)
        own = [q.index for q in questions]
        rounds = [own, *exchanged(own, OTHERS if "choose" in model.abilities else 1)]
        asked = [(index, q) for some in rounds for index, q in zip(some, questions, strict=True)]
        grey, unseen = Grey(conversations), [(own[0], question) for question in questions]  # one grey image for all
        odds, answers = None, ()
        if "choose" in model.abilities:
            odds = torch.cat([log_odds(model, processor, *which) for which in ((conversations, asked), (grey, unseen))])
            odds, answers = odds.view(len(rounds) + 1, len(questions), -1), model.config.answers
            given = [[answers[i] for i in row] for row in odds[[0, 1, -1]].argmax(dim=-1).tolist()]
            odds = odds[:-1]
        else:
            texts = ask_about(model, processor, conversations, asked)
            given = [texts[: len(questions)], texts[len(questions) :], ask_about(model, processor, grey, unseen)]
        pairs = [(place[a], place[b]) for a, b in pairs]
        return cls(conversations, questions, [place[i] for i in rows], pairs, *given, alone, source, odds, answers)

    def right(self, answers: Sequence[str]) -> np.ndarray:
        """(N,) how right each answer is, 0 to 1."""
        known = [[normalise(answer) for answer in q.answers] for q in self.questions]
        return np.array([agreement(normalise(said), some) for said, some in zip(answers, known, strict=True)])

    def score(self, values: np.ndarray, rows: Sequence[int], chance: float | None = None) -> Score:
        keys = [self.conversations.key(self.questions[i].index) for i in rows]
        return Score.of(Samples.mean(np.asarray(values, dtype=float)[list(rows)], keys), chance)

    def kinds(self) -> dict[str, list[int]]:
        """The rows of each kind; where the folder names none, kinds are the first two words. Rare ones are together."""
        names = [self.questions[i].kind for i in self.rows]
        if len(set(names)) == 1:
            names = [" ".join(normalise(self.questions[i].text).split()[:2]) for i in self.rows]
        counts = Counter(names)
        large = [name for name, n in counts.most_common(KINDS) if n >= FEWEST]
        kinds: dict[str, list[int]] = {name: [] for name in large}
        for i, name in zip(self.rows, names, strict=True):
            kinds.setdefault(name if name in large else "other", []).append(i)
        return kinds if len(kinds) > 1 else {}

    def of_kind(self, rows: Sequence[int]) -> dict[str, Score]:
        wanted = ("own image", "another image", "question alone, usual answer", USUAL, UNUSUAL, OWN_USUAL, OWN_UNUSUAL)
        found = self.figures(rows)
        return {name: found[name] for name in wanted if name in found}

    def figures(self, rows: Sequence[int]) -> dict[str, Score]:
        usual = self.right(self.alone["usual answer"])
        chance = float(usual[list(rows)].mean())
        own, other = self.right(self.own), self.right(self.other)
        unchanged = [normalise(a) == normalise(b) for a, b in zip(self.own, self.other, strict=True)]
        scores = {
            "own image": self.score(own, rows, chance),
            "another image": self.score(other, rows, chance),
            "grey image": self.score(self.right(self.grey), rows, chance),
            **{f"question alone, {name}": self.score(self.right(said), rows) for name, said in self.alone.items()},
            GAIN: self.score(own - other, rows),
            SAME: self.score(unchanged, rows),
        }
        scores |= self.by_usual(self.alone["usual answer"], rows, (USUAL, UNUSUAL, GAP))
        if tail := [i for i in rows if usual[i] < 0.5]:
            follows = [normalise(a) == b for a, b in zip(self.own, self.alone["usual answer"], strict=True)]
            scores[FALLEN] = self.score(follows, tail)
        if self.odds is not None:
            scores |= self.by_usual(self.own_usual, rows, (OWN_USUAL, OWN_UNUSUAL, OWN_GAP))
        return scores

    def by_usual(self, usual: Sequence[str], rows: Sequence[int], names: tuple[str, str, str]) -> dict[str, Score]:
        """Accuracy where the usual answer is right, where it is wrong, and the difference; nothing where one never occurs."""
        own, hits = self.right(self.own), self.right(usual) >= 0.5
        head, tail = ([i for i in rows if hits[i] == wanted] for wanted in (True, False))
        if not head or not tail:
            return {}
        return dict(zip(names, (self.score(own, head), self.score(own, tail), self.gap(own, head, tail)), strict=True))

    @property
    def own_usual(self) -> list[str]:
        """What a model that chooses finds likeliest on average over other images."""
        return [self.answers[i] for i in self.odds[1:].exp().mean(dim=0).argmax(dim=1).tolist()]

    def gap(self, values: np.ndarray, head: Sequence[int], tail: Sequence[int]) -> Score:
        """The mean over some rows less that over others; an image may have some of both."""
        rows = [*head, *tail]
        inside = np.isin(np.arange(len(rows)), np.arange(len(head)))[:, None]
        table = np.stack([values[rows], np.ones(len(rows))], axis=1)
        keys = [self.conversations.key(self.questions[i].index) for i in rows]
        return Score.of(
            Samples.summed("contrast", np.concatenate([table * inside, table * ~inside], axis=1), keys), None
        )

    def paired(self, answers: Sequence[str], name: str) -> Score:
        right = self.right(answers) >= 0.5
        both = [right[a] and right[b] for a, b in self.pairs]
        alike = [normalise(answers[a]) == normalise(answers[b]) for a, b in self.pairs]
        return Score.of(Samples.mean(both if name == BOTH else alike), 0.0 if name == BOTH else None)

    # ---- the remedy ------------------------------------------------------------------------------------------------

    def contrasted(self) -> list[str]:
        """The answers of a model that chooses by p(a|v,q) / p(a|q); the latter is the mean beside other images."""
        own, others = self.odds[0], self.odds[1:]
        usual = others.exp().mean(dim=0).log()
        plausible = own >= own.amax(dim=1, keepdim=True) + np.log(PLAUSIBLE)
        best = (own - usual).masked_fill(~plausible, -torch.inf).argmax(dim=1)
        return [self.answers[i] for i in best.tolist()]

    def effect(self, answers: Sequence[str]) -> dict[str, tuple[Score, Score]]:
        before, after = self.right(self.own), self.right(answers)
        tail = [i for i in self.rows if self.right(self.alone["usual answer"])[i] < 0.5]
        found = {"accuracy": tuple(self.score(values, self.rows) for values in (before, after))}
        if tail:
            found[UNUSUAL] = tuple(self.score(values, tail) for values in (before, after))
        if self.pairs:
            found |= {name: (self.paired(self.own, name), self.paired(answers, name)) for name in (BOTH, ONE)}
        return found


# ---- what was found --------------------------------------------------------------------------------------------------


def verdict(figures: dict[str, Score], kinds: dict[str, dict[str, Score]]) -> str:
    of_kinds = {kind: why for kind, some in kinds.items() if (why := reasons(some))}
    whole = reasons(figures)
    told = [f"of all questions, {' and '.join(whole)}"] if whole else []
    told += [f"of {kind}, {' and '.join(why)}" for kind, why in of_kinds.items()]
    if told:
        return f"found: {'; '.join(told)}."
    value, low, high = (f"{100 * x:.1f}" for x in (figures[GAIN].value, *figures[GAIN].interval))
    return f"not found: the image of a question adds {value} points ({low} to {high}) to what another image gives."


def reasons(figures: dict[str, Score]) -> list[str]:
    """What the figures show beyond their intervals."""
    found = []
    if figures[GAIN].interval[1] < LITTLE:
        found.append(f"an image adds only {100 * figures[GAIN].value:.1f} points")
    for gap, usual, unusual, answer in (
        (GAP, USUAL, UNUSUAL, "the usual answer"),
        (OWN_GAP, OWN_USUAL, OWN_UNUSUAL, "its answer to other images"),
    ):
        if gap in figures and figures[gap].interval[0] > LITTLE:
            values = (
                f"{figures[usual].value:.0%} are right where {answer} is, {figures[unusual].value:.0%} where it is not"
            )
            found.append(values)
    if ONE in figures and figures[ONE].interval[0] > ALIKE:
        found.append(f"{figures[ONE].value:.0%} of balanced pairs get one answer")
    return found
