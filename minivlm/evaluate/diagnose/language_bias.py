"""Not measured yet."""

from __future__ import annotations

from minivlm.evaluate.diagnose.pitfall import Pitfall


def left_out(model, processor, data) -> str:
    return "it is not measured yet."


def diagnose(model, processor, data) -> Pitfall:
    raise NotImplementedError
