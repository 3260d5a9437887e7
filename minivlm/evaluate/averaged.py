"""WiSE-FT: a model between what was fine-tuned and what came of it, by an average of their weights.

    weights(α) = (1 − α) · start + α · fine-tuned         Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", §3

Fine-tuning is better on its folder and worse on all else; in between (α = 0.5, say) most of the one is had and little of the
other lost, at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from minivlm.errors import UserError
from minivlm.metrics import Score
from minivlm.precision import forget_packings
from minivlm.run import Run, read_record


def start_of(directory: str | Path) -> str:
    """What a run of ours was fine-tuned from, as its checkpoints record it. UserError where that is not known."""
    found = Run(directory).all() if Path(directory).is_dir() else []
    start = read_record(found[-1])["recipe"].get("starts_from") if found else None
    if not start:
        raise UserError(
            f"{directory} has no checkpoint that says what it was fine-tuned from (train.py … --starts_from): name that by "
            "--start."
        )
    return start


class Averaged:
    """`model`, with weights between those of `start` and its own: averaged.at(0) is the start, at(1) the model as it came."""

    def __init__(self, model: nn.Module, start: nn.Module, *, names: tuple[str, str]):
        """names: of the two, for messages. UserError where their tensors do not fit each other."""
        self.model, self.own = model, {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.start = start.state_dict()
        shapes, wanted = ({name: tuple(t.shape) for name, t in s.items()} for s in (self.start, self.own))
        if type(model) is not type(start) or shapes != wanted:
            differs = [
                f"{name} is {shapes.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
                for name in (*wanted, *(name for name in shapes if name not in wanted))
                if shapes.get(name) != wanted.get(name)
            ]
            why = differs[0] if type(model) is type(start) else f"that is a {type(start).__name__}"
            raise UserError(
                f"there is no average of {names[1]} and {names[0]}, which was made of another model ({why})."
            )

    @torch.no_grad()
    def at(self, share: float) -> nn.Module:
        """The model with this share of its own weights, and the rest of the start's; sums are taken in fp32."""
        for name, tensor in self.model.state_dict().items():
            own, start = self.own[name], self.start[name]
            if tensor.is_floating_point():
                own = torch.lerp(start.to(own.device, torch.float32), own.float(), share)
            tensor.copy_(own)
        forget_packings(self.model)
        return self.model


def averaged_scores(
    averaged: Averaged, shares: Sequence[float], evaluate: Callable[[nn.Module], dict[str, Score]]
) -> dict[str, dict[str, Score]]:
    """Scores by the share of the fine-tuned weights, as the columns of a table are called."""
    called = {0.0: "0 (start)", 1.0: "1 (tuned)"}
    return {called.get(share, f"{share:g}"): evaluate(averaged.at(share)) for share in shares}
