"""The regions of an image where its objects are, each shown alone."""

from __future__ import annotations

import numpy as np

from minivlm.datasets.conversations import Conversations
from minivlm.datasets.shapes.conversations import ShapesConversations

MARGIN = 0.03  # of the image's side, around a box

Corners = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the image's sides


def boxes_of(conversations: Conversations, index: int) -> list[Corners]:
    """Of a scene of the shapes world the boxes of its objects, in reading order; none where boxes are not known."""
    if not isinstance(conversations, ShapesConversations):
        return []
    return [thing.box for thing in conversations.scenes[index].objects]


def alone(image: np.ndarray, box: Corners) -> np.ndarray:
    """The image (H, W, 3) uint8 with everything outside the box in its median colour: the object keeps its place and size,
    which a crop would lose."""
    H, W = image.shape[:2]
    left, top, right, bottom = (
        round(side * min(1.0, max(0.0, x + sign * MARGIN)))
        for x, side, sign in zip(box, (W, H, W, H), (-1, -1, 1, 1), strict=True)
    )
    shown = np.empty_like(image)
    shown[:] = np.median(image.reshape(-1, 3), axis=0).astype(np.uint8)
    shown[top:bottom, left:right] = image[top:bottom, left:right]
    return shown
