"""What train.py offers: every recipe by name, the command line over them, and how a recipe is planned and finished.

clip.py language.py captioner.py llava.py blip.py …   a family each: its recipes, values, and how they are started
recipe.py, job.py                                     what every recipe has; a recipe that was started
scores.py, text_scores.py, vision_cache.py, parts.py  what jobs are put together from (what a step is fed: datasets/batches.py)
trained_parts.py, rates.py                            what of a model learns, and how fast
options.py, folders.py, plan.py, resuming.py          the command line, --data, what is trained first, --resume
"""

from __future__ import annotations

from minivlm.recipes.blip import BLIP_RECIPES
from minivlm.recipes.blip2 import BLIP2_RECIPES
from minivlm.recipes.capfilt import CAPFILT_RECIPES
from minivlm.recipes.captioner import CAPTIONER_RECIPES
from minivlm.recipes.clip import CLIP_RECIPES
from minivlm.recipes.coca import COCA_RECIPES
from minivlm.recipes.flamingo import FLAMINGO_RECIPES
from minivlm.recipes.fuse import FUSE_RECIPES
from minivlm.recipes.language import LANGUAGE_RECIPES
from minivlm.recipes.llava import LLAVA_RECIPES
from minivlm.recipes.multitask import MULTITASK_RECIPES

RECIPES = (
    CLIP_RECIPES
    | COCA_RECIPES
    | LANGUAGE_RECIPES
    | LLAVA_RECIPES
    | BLIP_RECIPES
    | CAPFILT_RECIPES
    | BLIP2_RECIPES
    | FLAMINGO_RECIPES
    | FUSE_RECIPES
    | MULTITASK_RECIPES
    | CAPTIONER_RECIPES
)
