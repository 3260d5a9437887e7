"""What a score is made of, and how sure it is: the bootstrap over samples (Efron & Tibshirani 1993, §13.3 and §16.4).

    statistics (n, K), a row a sample ──choose n rows with replacement, 1,000 times──→ sums (1,000, K) ──→ 1,000 scores

Samples that depend on each other, such as the questions about one image, are one row: their numbers are added up first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from minivlm.atomic_writing import write_atomically
from minivlm.errors import UserError
from minivlm.metrics.bleu import bleu_value
from minivlm.metrics.meteor import meteor_value

DRAWS, LEVEL = 1000, 0.95
AT_A_TIME = 2**22  # counts held in float64


def ratio(sums: np.ndarray) -> np.ndarray:
    """(…, 2): a total over a count; 0 where nothing was counted."""
    return divided(sums[..., 0], sums[..., 1])


def perplexity(sums: np.ndarray) -> np.ndarray:
    """(…, 2): nats and tokens."""
    return np.exp(ratio(sums))


def macro(sums: np.ndarray) -> np.ndarray:
    """(…, 2C): C totals, then C counts: the mean over the classes that occur."""
    totals, counts = np.split(sums, 2, axis=-1)
    return divided(divided(totals, counts).sum(axis=-1), (counts > 0).sum(axis=-1))


def f1(sums: np.ndarray) -> np.ndarray:
    """(…, 3): true positives, false positives, false negatives."""
    true, false, missed = np.moveaxis(sums, -1, 0)
    return divided(2 * true, 2 * true + false + missed)


def contrast(sums: np.ndarray) -> np.ndarray:
    """(…, 4): total and count of one group, then of another: the difference of their means."""
    return ratio(sums[..., :2]) - ratio(sums[..., 2:])


def explained(sums: np.ndarray) -> np.ndarray:
    """(…, 3): differences along one direction, their count, and the squared lengths of the differences: the share of the mean
    square that the mean difference makes up."""
    along, count, squares = np.moveaxis(sums, -1, 0)
    return divided(along**2, count * squares)


def rsum(sums: np.ndarray) -> np.ndarray:
    """(…, 4): right queries over three K and all queries, of images, then of texts → 100 · the sum of both ratios."""
    return 100 * (ratio(sums[..., :2]) + ratio(sums[..., 2:]))


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.zeros(np.broadcast(a, b).shape), where=b != 0)


# From the sums of rows (…, K) to scores (…).
VALUES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mean": ratio,
    "ratio": ratio,
    "perplexity": perplexity,
    "macro": macro,
    "f1": f1,
    "rsum": rsum,
    "contrast": contrast,
    "explained": explained,
    "bleu": bleu_value,
    "meteor": meteor_value,
}


@dataclass(frozen=True)
class Difference:
    """Of two models on the same samples: value, 95 % interval, and p, two-sided: how often the bootstrap turns the sign."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True, eq=False)
class Samples:
    """kind: a name in VALUES. statistics: (n, K). ids: of the samples, so that two models are compared on the same ones."""

    kind: str
    statistics: np.ndarray
    ids: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.kind not in VALUES:
            raise ValueError(f"kind is {self.kind!r}, but must be one of {', '.join(VALUES)}")
        object.__setattr__(self, "statistics", np.asarray(self.statistics, dtype=np.float64))
        if self.statistics.ndim != 2 or (self.ids is not None and len(self.ids) != len(self.statistics)):
            raise ValueError(f"statistics {self.statistics.shape} must be (n, K), with an id for each row or none")

    @classmethod
    def mean(cls, values: Sequence[float], groups: Sequence[Hashable] | None = None) -> Samples:
        """The mean of values, each of a sample of its own, or of the one that `groups` names."""
        values = np.asarray(values, dtype=np.float64)
        return cls.summed("mean", np.stack([values, np.ones_like(values)], axis=1), groups)

    @classmethod
    def macro(cls, values: Sequence[float], classes: Sequence[int], n: int) -> Samples:
        """The mean over n classes of their mean values; classes that do not occur are not counted."""
        of = np.eye(n)[np.asarray(classes, dtype=int)]  # (len(values), n)
        return cls("macro", np.concatenate([of * np.asarray(values, dtype=np.float64)[:, None], of], axis=1))

    @classmethod
    def summed(cls, kind: str, statistics: np.ndarray, groups: Sequence[Hashable] | None = None) -> Samples:
        """Rows of one group are added up; groups stand in the order of their first row, and their names are the ids."""
        if groups is None:
            return cls(kind, statistics)
        number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(number), np.shape(statistics)[1]))
        np.add.at(sums, [number[name] for name in groups], statistics)
        return cls(kind, sums, tuple(map(str, number)))

    @property
    def n(self) -> int:
        """What was counted: questions, where a row is an image with its questions; tokens of a perplexity; else rows."""
        if self.kind not in ("mean", "ratio", "perplexity"):
            return len(self.statistics)
        counts = self.statistics[:, 1]
        return int(counts.sum()) if (counts == counts.round()).all() else len(counts)  # weights are no counts

    @property
    def value(self) -> float:
        return float(VALUES[self.kind](self.statistics.sum(axis=0)))

    def interval(self) -> tuple[float, float]:
        """Percentiles of the bootstrap. Where every sample is right, or none, there is nothing to draw from: then the exact
        bound of a share (Clopper & Pearson 1934), with the samples as the trials."""
        tail, rows = (1 - LEVEL) / 2, self.statistics
        if self.kind == "mean" and len(rows):
            if (rows[:, 0] == rows[:, 1]).all():
                return tail ** (1 / len(rows)), 1.0
            if not rows[:, 0].any():
                return 0.0, 1 - tail ** (1 / len(rows))
        low, high = np.quantile(VALUES[self.kind](resampled(rows)), [tail, 1 - tail])
        return float(low), float(high)

    def comparable(self, other: Samples) -> bool:
        """Whether `paired` has something to compare."""
        alike = self.kind == other.kind and self.statistics.shape[1] == other.statistics.shape[1]
        if self.ids is None or other.ids is None:
            return alike and len(self.statistics) == len(other.statistics)
        return alike and not set(self.ids).isdisjoint(other.ids)

    def paired(self, other: Samples) -> Difference:
        """This one's score less the other's: both bootstraps draw the same samples. UserError where the two have none in
        common."""
        mine, theirs = in_common(self, other)
        value = VALUES[self.kind]
        differences = value(resampled(mine)) - value(resampled(theirs))
        low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        turned = min((differences <= 0).sum(), (differences >= 0).sum())
        difference = float(value(mine.sum(axis=0)) - value(theirs.sum(axis=0)))
        return Difference(difference, float(low), float(high), min(1.0, 2 * (int(turned) + 1) / (DRAWS + 1)))


def in_common(one: Samples, other: Samples) -> tuple[np.ndarray, np.ndarray]:
    """The statistics of the samples that both have, in one order."""
    if not one.comparable(other):
        raise UserError(
            "the two scores have no samples in common: were they measured in the same way on the same data?"
        )
    if one.ids is None or other.ids is None:
        return one.statistics, other.statistics
    place = {name: i for i, name in enumerate(other.ids)}
    pairs = [(i, place[name]) for i, name in enumerate(one.ids) if name in place]
    mine, theirs = zip(*pairs, strict=True)
    return one.statistics[list(mine)], other.statistics[list(theirs)]


def resampled(statistics: np.ndarray) -> np.ndarray:
    """(n, K) → (DRAWS, K): sums over n rows that are drawn with replacement, always the same ones for one n."""
    counts, step = drawn(len(statistics)), max(1, AT_A_TIME // max(1, len(statistics)))
    blocks = [counts[i : i + step].astype(np.float64) @ statistics for i in range(0, DRAWS, step)]
    return np.concatenate(blocks)


@lru_cache(maxsize=2)
def drawn(n: int) -> np.ndarray:
    """(DRAWS, n): how often each row is drawn."""
    rng = np.random.default_rng(0)
    return np.stack([np.bincount(rng.integers(0, n, n), minlength=n).astype(np.uint8) for _ in range(DRAWS)])


def write_samples(path: Path, samples: Mapping[str, Samples]) -> None:
    """By the name of the score. Ids that several scores share are stored once."""
    arrays, index, stored = {}, {}, {}
    for i, (name, some) in enumerate(samples.items()):
        if some.ids is not None and some.ids not in stored:
            stored[some.ids] = f"ids{len(stored)}"
            arrays[stored[some.ids]] = np.array(some.ids, dtype=np.str_)
        arrays[f"statistics{i}"] = some.statistics
        index[name] = {"kind": some.kind, "statistics": f"statistics{i}", "ids": stored.get(some.ids)}
    arrays["index"] = np.array(json.dumps(index))

    def write(target: Path) -> None:
        with target.open("wb") as file:
            np.savez_compressed(file, **arrays)

    write_atomically(path, write)


def read_samples(path: Path) -> dict[str, Samples]:
    """What `write_samples` wrote. UserError for any other file."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = json.loads(str(arrays["index"]))
            ids = {name: tuple(arrays[name].tolist()) for name in arrays.files if name.startswith("ids")}
            return {
                name: Samples(row["kind"], arrays[row["statistics"]], ids.get(row["ids"]))
                for name, row in index.items()
            }
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{path} does not hold the samples of scores: {error}.") from None
