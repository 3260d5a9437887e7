"""CLIP as OpenAI's code and open_clip store it, with a ViT or a ModifiedResNet: laion/…, timm/…clip…, and kin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.layers.resnet import ResNetConfig
from minivlm.layers.text import TextConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.pretrained import preprocessing
from minivlm.pretrained.hf_clip import square
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = CLIP

# ---- names -----------------------------------------------------------------------------------------------------------

TRANSFORMER = table("""
    resblocks.*.ln_1                    blocks.*.attention_norm
    resblocks.*.attn.in_proj_weight     blocks.*.attention.{q,k,v}_proj.weight
    resblocks.*.attn.in_proj_bias       blocks.*.attention.{q,k,v}_proj.bias
    resblocks.*.attn.out_proj           blocks.*.attention.out_proj
    resblocks.*.ln_2                    blocks.*.mlp_norm
    resblocks.*.mlp.c_fc                blocks.*.mlp.up_proj
    resblocks.*.mlp.c_proj              blocks.*.mlp.down_proj
""")

VIT = table("""
    visual.conv1                    vision.patch_embedding
    visual.class_embedding          vision.class_embedding
    visual.positional_embedding     vision.position_embedding
    visual.ln_pre                   vision.embedding_norm
    visual.ln_post                  vision.norm
    visual.proj                     image_projection.weight         transpose
""") + under(TRANSFORMER, "visual.transformer.", "vision.transformer.")  # fmt: skip

BOTTLENECK = table("""
    conv1               reduce.conv
    bn1                 reduce.norm
    conv2               conv.conv
    bn2                 conv.norm
    conv3               expand.conv
    bn3                 expand.norm
    downsample.0        shortcut.conv
    downsample.1        shortcut.norm
""")

RESNET = table("""
    conv1                               stem.0.conv
    bn1                                 stem.0.norm
    conv2                               stem.1.conv
    bn2                                 stem.1.norm
    conv3                               stem.2.conv
    bn3                                 stem.2.norm
    attnpool.positional_embedding       attention_pool.position_embedding
    attnpool.q_proj                     attention_pool.attention.q_proj
    attnpool.k_proj                     attention_pool.attention.k_proj
    attnpool.v_proj                     attention_pool.attention.v_proj
    attnpool.c_proj                     attention_pool.attention.out_proj
""") + [row for i in range(4) for row in under(BOTTLENECK, f"layer{i + 1}.*.", f"stages.{i}.*.")]  # fmt: skip

TEXT = table("""
    token_embedding             text.token_embedding
    positional_embedding        text.position_embedding
    ln_final                    text.norm
""") + under(TRANSFORMER, "transformer.", "text.transformer.")  # fmt: skip


def rows(config: CLIPConfig) -> list[Row]:
    vision = under(RESNET, "visual.", "vision.") if isinstance(config.vision, ResNetConfig) else VIT
    linear = config.text_projection_bias  # then a module, otherwise a bare matrix (in, out)
    projection = "text_projection text_projection" if linear else "text_projection text_projection.weight transpose"
    return [
        *vision,
        *under(TEXT + table(projection), ("", "text."), ""),  # open_clip's "custom text" form puts text. before them
        *table("""
            logit_scale         loss.logit_scale        one
            logit_bias          loss.logit_bias         one
        """),
    ]


# ---- config: fields that are read (with defaults), of which only some values are supported, without effect -----------

READ = {"embed_dim": None, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": False, "init_logit_bias": None}
UNUSED = {"init_logit_scale", "nonscalar_logit_scale", "custom_text", "output_dict", "cast_dtype"}

TOWER_ONLY = {
    "ls_init_value": (None,),
    "block_type": (None, "default"),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn"), (False,)),
    "scale_fc": (False,),
}
VISION_READ = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "no_ln_pre": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}
VISION_ONLY = {**TOWER_ONLY, "attentional_pool": (False,), "pool_type": ("tok",), "timm_model_name": (None, "")}
VISION_UNUSED = {
    *("patch_dropout", "attn_pooler_queries", "attn_pooler_heads", "pos_embed_type", "final_ln_after_pool"),
    *("output_tokens", "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop"),
    "timm_drop_path",
}
TEXT_READ = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "eos_id": 2,
    "proj_bias": False,
    "act_kwargs": None,
    "norm_kwargs": None,
}
TEXT_ONLY = {**TOWER_ONLY, "embed_cls": (False,), "proj_type": ("linear",), "hf_model_name": (None, "")}
TEXT_UNUSED = {
    *("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "final_ln_after_pool", "output_tokens"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
}
POOLS = {"argmax": "argmax", "eos": "end", "first": "first", "last": "last"}


def read_config(values: dict[str, Any]) -> CLIPConfig:
    """open_clip_config.json → ours."""
    model = checked(values.get("model_cfg", {}), "model_cfg", READ, {}, UNUSED)
    if model["embed_dim"] is None:
        raise UserError("open_clip_config.json has no model_cfg.embed_dim.")
    text = checked(model["text_cfg"], "text_cfg", TEXT_READ, TEXT_ONLY, TEXT_UNUSED)
    vision = checked(model["vision_cfg"], "vision_cfg", VISION_READ, VISION_ONLY, VISION_UNUSED)
    if text["pool_type"] not in POOLS:
        raise UserError(f"text_cfg.pool_type is {text['pool_type']!r}; supported are {', '.join(POOLS)}.")
    quick = model["quick_gelu"]
    resnet = isinstance(vision["layers"], list)
    return CLIPConfig(
        vision=read_resnet(vision, model["embed_dim"]) if resnet else read_vit(vision, quick),
        text=TextConfig(
            **read_tower(text, "text_cfg", quick),
            heads=text["heads"],
            vocab_size=text["vocab_size"],
            context=text["context_length"],
            causal=not text["no_causal_mask"],
            use_mask=not text["no_causal_mask"],  # without the causal mask, words attend to padding as well
            pool=POOLS[text["pool_type"]],
            end_token=text["eos_id"] if text["pool_type"] == "eos" else None,
        ),
        embed_width=model["embed_dim"],
        image_projection=not resnet,
        text_projection_bias=text["proj_bias"],
        loss="softmax" if model["init_logit_bias"] is None else "sigmoid",
    )


def read_vit(values: dict[str, Any], quick: bool) -> VisionConfig:
    image, patch = square(values["image_size"], "image_size"), square(values["patch_size"], "patch_size")
    return VisionConfig(
        **read_tower(values, "vision_cfg", quick),
        heads=values["width"] // values["head_width"],
        image_size=image,
        patch_size=patch,
        drop_border=image % patch != 0,
        embedding_norm=not values["no_ln_pre"],
    )


def read_resnet(values: dict[str, Any], embed_width: int) -> ResNetConfig:
    return ResNetConfig(
        blocks=tuple(values["layers"]),
        width=values["width"],
        output_width=embed_width,
        heads=values["width"] * 32 // values["head_width"],
        image_size=square(values["image_size"], "image_size"),
    )


def read_tower(values: dict[str, Any], where: str, quick: bool) -> dict[str, Any]:
    """The fields that both transformers share, under our names."""
    act, norm = values["act_kwargs"] or {}, values["norm_kwargs"] or {}
    if act not in ({}, {"approximate": "none"}, {"approximate": "tanh"}) or (act and quick):
        raise UserError(f"{where}.act_kwargs is {act}, which is not supported; approximate none or tanh of gelu is.")
    if norm.keys() - {"eps"}:
        raise UserError(f"{where}.norm_kwargs is {norm}, of which only eps is supported.")
    return {
        "width": values["width"],
        "depth": values["layers"],
        "mlp_width": int(values["width"] * values["mlp_ratio"]),
        "activation": "quick_gelu" if quick else "gelu_tanh" if act.get("approximate") == "tanh" else "gelu",
        "norm_eps": norm.get("eps", 1e-5),
    }


def checked(given: dict, where: str, read: dict, only: dict[str, tuple], unused: set[str]) -> dict[str, Any]:
    """The fields to read, completed by their defaults. Any other that could change a number is refused by name."""
    for name, value in given.items():
        if not (name in read or name in unused or value in only.get(name, ())):
            raise UserError(f"open_clip_config.json has {where}.{name} = {value!r}, which is not supported.")
    return {**read, **given}


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(directory: Path, values: dict[str, Any], config: CLIPConfig) -> Processor:
    text = values["model_cfg"].get("text_cfg", {})
    unusual = text.get("tokenizer_kwargs") or text.get("tokenizer_mode")  # texts are cleaned in some other way first
    return preprocessing.make_processor(
        directory,
        None if unusual else preprocessing.read_tokenizer(directory, "CLIPTokenizer"),
        pad="<pad>",
        **({} if text.get("hf_tokenizer_name") else {"pad_token": 0}),
        context=config.text.context,
        pad_to_context=not config.text.causal or config.text.pool == "last",
        **preprocessing.read_open_clip_images(values.get("preprocess_cfg", {}), config.vision.image_size),
    )
