"""What a trained model can be asked for; sample.py is a command line over these."""

from minivlm.tasks.image_index import ImageIndex, build_image_index, index_path, open_image_index
from minivlm.tasks.search import search_images
from minivlm.tasks.zero_shot import TEMPLATE_SETS, class_features, zero_shot_classify

__all__ = [
    "TEMPLATE_SETS",
    "ImageIndex",
    "build_image_index",
    "class_features",
    "index_path",
    "open_image_index",
    "search_images",
    "zero_shot_classify",
]
