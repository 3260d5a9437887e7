"""How good a model is, each number beside what guessing gets."""

from minivlm.metrics.retrieval import retrieval, zero_shot_accuracy
from minivlm.metrics.score import Score

__all__ = ["Score", "retrieval", "zero_shot_accuracy"]
