"""Images with texts: the shapes world, and one's own folders. Each part is imported on first use."""

import importlib

_HOME = {
    "Pairs": "pairs",
    "FolderPairs": "folder",
    "open_pairs": "folder",
    "TEMPLATES": "folder_files",
    "Conversations": "conversation_base",
    "Question": "conversation_base",
    "open_conversations": "conversations",
    "FolderConversations": "folder_conversations",
    "TrainTransform": "transforms",
    "read_image": "images",
    "ShapesWorld": "shapes",
    "make_shapes": "shapes",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"minivlm.datasets has no {name!r}")
    return getattr(importlib.import_module(f"minivlm.datasets.{_HOME[name]}"), name)
