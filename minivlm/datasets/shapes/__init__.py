"""The shapes world: scenes, how they are drawn, and every kind of text about them, all from one description of a scene."""

from minivlm.datasets.shapes.world import SPLITS, ShapesWorld, is_world, make_shapes, split_scenes

__all__ = ["SPLITS", "ShapesWorld", "is_world", "make_shapes", "split_scenes"]
