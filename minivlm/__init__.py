"""minivlm: every way a language model has been taught to see, small enough to read.

The names below are imported when they are first touched, so that `import minivlm` costs little more than torch.
"""

from __future__ import annotations

import importlib

__version__ = "0.9.0"

_HOME = {
    "BERT": "layers",
    "BERTConfig": "layers",
    "BLIP": "models.blip",
    "BLIP2": "models.blip2",
    "BLIP2Config": "models.blip2",
    "BLIP2Stage1": "models.blip2",
    "BLIP2Stage1Config": "models.blip2",
    "BLIPConfig": "models.blip",
    "CLIP": "models.clip",
    "CLIPConfig": "models.clip",
    "CLIPLoss": "losses",
    "CoCa": "models.coca",
    "CoCaConfig": "models.coca",
    "CrossAttention": "layers",
    "Flamingo": "models.flamingo",
    "FlamingoConfig": "models.flamingo",
    "GatedCrossAttention": "layers",
    "ImageCaptioningConfig": "models.captioner",
    "ImageCaptioningModel": "models.captioner",
    "ImageFeatures": "layers",
    "LLaVA": "models.llava",
    "LLaVAConfig": "models.llava",
    "LoRAConfig": "layers",
    "LanguageModel": "layers",
    "LanguageModelConfig": "layers",
    "MultitaskConfig": "models.multitask",
    "MultitaskVLM": "models.multitask",
    "Processor": "processor",
    "T5": "layers",
    "T5Config": "layers",
    "UNITER": "models.uniter",
    "UNITERConfig": "models.uniter",
    "UserError": "errors",
    "VQAConfig": "models.vqa",
    "VQAModel": "models.vqa",
    "VisionConfig": "layers",
    "VisionTransformer": "layers",
    "ViLBERT": "models.vilbert",
    "ViLBERTConfig": "models.vilbert",
    "VisualBERT": "models.visualbert",
    "VisualBERTConfig": "models.visualbert",
    "add_lora": "layers",
    "align_size": "models.clip",
    "answer": "tasks.generate",
    "build_image_index": "tasks.image_index",
    "caption": "tasks.generate",
    "chat": "tasks.chat",
    "clip_size": "models.clip",
    "complete": "tasks.generate",
    "few_shot": "tasks.few_shot",
    "load": "checkpoint",
    "match": "tasks.match",
    "save": "checkpoint",
    "search_images": "tasks.search",
    "zero_shot_classify": "tasks.zero_shot",
}

__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minivlm' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minivlm.{_HOME[name]}"), name)


def __dir__():
    return sorted([*globals(), *_HOME])
