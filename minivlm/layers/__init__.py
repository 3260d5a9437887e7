"""The bricks. They import torch and each other, nothing else of the package."""

from minivlm.layers.attention import Attention, CrossAttention, attend, set_attention_backend
from minivlm.layers.mlp import MLP
from minivlm.layers.position import Cache, Rotary, resize_position_table
from minivlm.layers.resnet import RESNET_SIZES, ResNet, ResNetConfig
from minivlm.layers.text import TextConfig, TextTransformer
from minivlm.layers.transformer import Block, Transformer, TransformerConfig
from minivlm.layers.vit import VIT_SIZES, VisionConfig, VisionTransformer

__all__ = [
    "MLP",
    "RESNET_SIZES",
    "VIT_SIZES",
    "Attention",
    "Block",
    "Cache",
    "CrossAttention",
    "ResNet",
    "ResNetConfig",
    "Rotary",
    "TextConfig",
    "TextTransformer",
    "Transformer",
    "TransformerConfig",
    "VisionConfig",
    "VisionTransformer",
    "attend",
    "resize_position_table",
    "set_attention_backend",
]
