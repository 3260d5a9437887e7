"""The bricks. They import torch and each other; those that are models as well (language model, T5, ViT) a little more."""

from minivlm.layers.attention import Attention, CrossAttention, attend, set_attention_backend
from minivlm.layers.bert import BERT, BERTConfig
from minivlm.layers.co_attention import CoAttention
from minivlm.layers.efficientnet import EFFICIENTNET_SIZES, EfficientNet, EfficientNetConfig
from minivlm.layers.gated_cross_attention import GatedConfig, GatedCrossAttention, image_mask
from minivlm.layers.language_model import LanguageModel, LanguageModelConfig
from minivlm.layers.lora import LoRAConfig, LoRALinear, add_lora, lora_parameters, merge_lora
from minivlm.layers.mlp import MLP
from minivlm.layers.perceiver import PerceiverConfig, PerceiverResampler
from minivlm.layers.position import Cache, RopeScaling, Rotary, resize_position_table
from minivlm.layers.projector import LinearProjector, MLPProjector, ResamplerProjector
from minivlm.layers.qformer import QFormer, QFormerConfig
from minivlm.layers.resnet import RESNET_SIZES, ResNet, ResNetConfig
from minivlm.layers.t5 import T5, T5Config
from minivlm.layers.text import TextConfig, TextTransformer
from minivlm.layers.tower import ImageFeatures
from minivlm.layers.transformer import Block, Transformer, TransformerConfig
from minivlm.layers.vit import VIT_SIZES, VisionConfig, VisionTransformer

__all__ = [
    "BERT",
    "EFFICIENTNET_SIZES",
    "MLP",
    "RESNET_SIZES",
    "T5",
    "VIT_SIZES",
    "Attention",
    "BERTConfig",
    "Block",
    "Cache",
    "CoAttention",
    "CrossAttention",
    "EfficientNet",
    "EfficientNetConfig",
    "GatedConfig",
    "GatedCrossAttention",
    "ImageFeatures",
    "LanguageModel",
    "LanguageModelConfig",
    "LinearProjector",
    "LoRAConfig",
    "LoRALinear",
    "MLPProjector",
    "PerceiverConfig",
    "PerceiverResampler",
    "QFormer",
    "QFormerConfig",
    "ResNet",
    "ResNetConfig",
    "ResamplerProjector",
    "RopeScaling",
    "Rotary",
    "T5Config",
    "TextConfig",
    "TextTransformer",
    "Transformer",
    "TransformerConfig",
    "VisionConfig",
    "VisionTransformer",
    "add_lora",
    "attend",
    "image_mask",
    "lora_parameters",
    "merge_lora",
    "resize_position_table",
    "set_attention_backend",
]
