"""What a trained model can be asked for; sample.py is a command line over these.

The names below are imported when they are first used, so that a task loads no other task.
"""

import importlib

_HOME = {
    "TEMPLATE_SETS": "templates",
    "Chat": "chat",
    "ImageIndex": "index_files",
    "answer": "generate",
    "answer_all": "generate",
    "attention_maps": "attend",
    "attention_sheet": "attend",
    "build_image_index": "image_index",
    "caption": "generate",
    "caption_all": "generate",
    "class_features": "zero_shot",
    "complete": "generate",
    "complete_all": "generate",
    "index_path": "image_index",
    "match_all": "match",
    "match_each": "match",
    "open_image_index": "index_files",
    "rank_answers": "choose",
    "rerank": "match",
    "search_images": "search",
    "zero_shot_classify": "zero_shot",
}  # `few_shot` is a module here; its function is `minivlm.few_shot`

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minivlm.tasks' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minivlm.tasks.{_HOME[name]}"), name)
