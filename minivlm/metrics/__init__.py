"""How good a model is, each number beside what guessing gets."""

from minivlm.metrics.captions import scene_match
from minivlm.metrics.retrieval import retrieval, zero_shot_accuracy
from minivlm.metrics.samples import Samples
from minivlm.metrics.score import Score
from minivlm.metrics.vqa import vqa_accuracy

__all__ = ["Samples", "Score", "retrieval", "scene_match", "vqa_accuracy", "zero_shot_accuracy"]
