"""How much of what an image shows can be had from its vector? Two classifiers on frozen features.

    nearest neighbours   the K closest training vectors vote, the closer    Wu et al. 2018, §3.4; Caron et al. 2021 (DINO), §4.1
                         the louder
    linear probe         multinomial logistic regression, regularised as    Radford et al. 2021 (CLIP), §A.3
                         strongly as suits a validation part

features (N, C), labels (N,) → a score of every class for every vector, (M, classes).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minivlm.errors import UserError

TEMPERATURE = 0.07
BLOCK = 2**24  # similarities held at a time
DECADES = (-6, 6)  # of the L2 strength
STEPS = (2.0, 1.0, 0.5, 0.25, 0.125)  # decades between the strengths that are tried: eight a decade in the end
MOST_STEPS = 1000  # of L-BFGS
ROUGH = 1e-4  # tolerance while strengths are tried, scikit-learn's; what is judged is fitted to a tenth of it


def check_features(*features: Tensor) -> None:
    if not all(part.isfinite().all() for part in features):
        raise UserError(
            "the image features hold NaN or infinity, and nothing can be fitted to them: the model has diverged."
        )


def nearest_neighbours(
    features: Tensor, labels: Tensor, queries: Tensor, *, k: int, classes: int, temperature: float = TEMPERATURE
) -> Tensor:
    """The votes for each class (M, classes) of the k training vectors with the largest cosine, each exp(cosine / temperature).

    UserError where there are fewer than k."""
    if k > len(features):
        raise UserError(f"{k} neighbours are asked for, but there are {len(features)} training images: ask for fewer.")
    check_features(features, queries)
    known, queries = F.normalize(features.float(), dim=1), F.normalize(queries.float(), dim=1)
    votes = []
    for part in queries.split(max(1, BLOCK // len(known))):
        cosines, places = (part @ known.T).topk(k, dim=1)
        empty = cosines.new_zeros(len(part), classes)
        votes.append(empty.scatter_add_(1, labels.to(places.device)[places], (cosines / temperature).exp()))
    return torch.cat(votes)


@dataclass(frozen=True)
class LinearProbe:
    """features → logits (M, classes). They are standardised first: each channel has mean 0 and deviation 1 in training."""

    weight: Tensor  # (classes, C), of standardised features
    bias: Tensor
    mean: Tensor
    deviation: Tensor
    strength: float
    loss: float  # the objective per sample, at the end

    def __call__(self, features: Tensor) -> Tensor:
        return F.linear((features.to(self.mean) - self.mean) / self.deviation, self.weight, self.bias)


def fit_linear_probe(
    features: Tensor,
    labels: Tensor,
    *,
    classes: int,
    strength: float,
    start: LinearProbe | None = None,
    tolerance: float = 1e-5,
) -> LinearProbe:
    """The W, b with the least Σ cross-entropy + strength / 2 · ‖W‖², by L-BFGS; scikit-learn calls 1 / strength C.

    start: another probe of the same features, from which it is not far. tolerance: of the largest gradient, per sample.
    """
    check_features(features)
    x = features.to(torch.float32 if features.device.type == "mps" else torch.float64)
    labels = labels.to(x.device)
    deviation, mean = torch.std_mean(x, dim=0, correction=0)
    deviation = torch.where(deviation > 1e-12 * x.abs().amax(), deviation, 1.0)  # a channel that never changes
    x = (x - mean) / deviation
    weight = x.new_zeros(classes, x.shape[1]) if start is None else start.weight.clone()
    bias = x.new_zeros(classes) if start is None else start.bias.clone()
    fitted = [weight.requires_grad_(), bias.requires_grad_()]
    solver = torch.optim.LBFGS(
        fitted,
        max_iter=MOST_STEPS,
        max_eval=2 * MOST_STEPS,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + strength / 2 / len(x) * weight.square().sum()
        loss.backward()
        return loss.detach()

    with torch.enable_grad():
        solver.step(objective)
        loss = objective().item()
    return LinearProbe(weight.detach(), bias.detach(), mean, deviation, strength, loss)


def choose_strength(features: Tensor, labels: Tensor, val: Tensor, val_labels: Tensor, *, classes: int) -> float:
    """The L2 strength from 1e-6 to 1e6 whose probe is most often right on the validation part; of equals the one with the least
    cross-entropy there. As in CLIP's §A.3 every second decade is tried, then what lies around the best, in halved steps."""
    check_features(val)
    found: dict[float, tuple[float, float]] = {}  # log10 of the strength → how good
    probes: dict[float, LinearProbe] = {}
    for step in STEPS:
        best = max(found, key=found.get) if found else None
        low, high = DECADES
        tried = (
            [low + step * i for i in range(round((high - low) / step) + 1)]
            if best is None
            else [best - step, best + step]
        )
        for log in sorted((one for one in tried if low <= one <= high), reverse=True):
            near = min(probes, key=lambda other: abs(other - log), default=None)
            start = None if near is None else probes[near]
            probe = fit_linear_probe(features, labels, classes=classes, strength=10**log, start=start, tolerance=ROUGH)
            probes[log], logits = probe, probe(val)
            right = (logits.argmax(dim=1) == val_labels.to(logits.device)).double().mean().item()
            found[log] = right, -F.cross_entropy(logits, val_labels.to(logits.device)).item()
    return 10 ** max(found, key=found.get)


def hold_out(labels: Sequence[int], share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """(the rest, a share of each class by a seed), as sorted rows. A class with two samples or more has at least one on either
    side; the only sample of a class belongs to the rest."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[int, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(int(label), []).append(row)
    kept, held = [], []
    for label in sorted(rows):
        of = [rows[label][i] for i in torch.randperm(len(rows[label]), generator=generator).tolist()]
        n = 0 if len(of) < 2 else min(len(of) - 1, max(1, math.floor(share * len(of) + 0.5)))
        held += of[:n]
        kept += of[n:]
    return sorted(kept), sorted(held)
