"""What a trained model can be asked for; sample.py is a command line over these."""

from minivlm.tasks.attend import attention_maps, attention_sheet
from minivlm.tasks.chat import Chat
from minivlm.tasks.choose import rank_answers
from minivlm.tasks.few_shot import few_shot, pair_up, shot_prompt
from minivlm.tasks.generate import answer, answer_all, caption, caption_all, complete
from minivlm.tasks.image_index import ImageIndex, build_image_index, index_path, open_image_index
from minivlm.tasks.match import match_all, rerank
from minivlm.tasks.search import search_images
from minivlm.tasks.zero_shot import TEMPLATE_SETS, class_features, zero_shot_classify

__all__ = [
    "TEMPLATE_SETS",
    "Chat",
    "ImageIndex",
    "answer",
    "answer_all",
    "attention_maps",
    "attention_sheet",
    "build_image_index",
    "caption",
    "caption_all",
    "class_features",
    "complete",
    "few_shot",
    "index_path",
    "match_all",
    "open_image_index",
    "pair_up",
    "rank_answers",
    "rerank",
    "search_images",
    "shot_prompt",
    "zero_shot_classify",
]
