"""ALIGN as Hugging Face transformers stores it (AlignModel): kakaobrain/align-base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minivlm.errors import UserError
from minivlm.layers.efficientnet import EfficientNetConfig
from minivlm.models.clip import CLIP, CLIPConfig
from minivlm.pretrained import bert, hf_clip, preprocessing
from minivlm.pretrained.fields import Known, fields
from minivlm.pretrained.names import Row, table, under
from minivlm.processor import Processor

model_class = CLIP

# ---- names: their blocks are counted through, ours by stages --------------------------------------------------------

BLOCK = table("""
    expansion.expand_conv               expand.conv
    expansion.expand_bn                 expand.norm
    depthwise_conv.depthwise_conv       depthwise.conv
    depthwise_conv.depthwise_norm       depthwise.norm
    squeeze_excite.reduce               weigh.reduce
    squeeze_excite.expand               weigh.expand
    projection.project_conv             project.conv
    projection.project_bn               project.norm
""")


def rows(config: CLIPConfig) -> list[Row]:
    blocks = [(stage, i) for stage, depth in enumerate(config.vision.depths) for i in range(depth)]
    blocks = [
        under(BLOCK, f"vision_model.encoder.blocks.{n}.", f"vision.stages.{stage}.{i}.")
        for n, (stage, i) in enumerate(blocks)
    ]
    return [
        *table("""
            vision_model.embeddings.convolution     vision.stem.conv
            vision_model.embeddings.batchnorm       vision.stem.norm
            text_projection                         text_projection
            temperature                             loss.logit_scale        temperature
        """),
        *(row for block in blocks for row in block),
        *under(bert.MODEL, "text_model.", "text."),
    ]


# ---- config: a file holds only what differs from these ---------------------------------------------------------------

VISION_FIELDS = fields("""
    num_channels                -               3
    pooling_type                -               "mean"
    image_size                  image_size      600
    width_coefficient           width_scale     2.0
    depth_coefficient           depth_scale     3.1
    depth_divisor               divisor         8
    kernel_sizes                kernels         [3, 3, 5, 3, 5, 5, 3]
    in_channels                 -               [32, 16, 24, 40, 80, 112, 192]
    out_channels                channels        [16, 24, 40, 80, 112, 192, 320]
    depthwise_padding           even_padding    []
    strides                     strides         [1, 2, 2, 2, 1, 2, 1]
    num_block_repeats           blocks          [1, 2, 2, 3, 3, 4, 1]
    expand_ratios               expansions      [1, 6, 6, 6, 6, 6, 6]
    squeeze_expansion_ratio     squeeze         0.25
    hidden_act                  activation      "swish"
    batch_norm_eps              norm_eps        1e-3
""")

known = hf_clip.of_towers(
    bert.KNOWN,
    Known.of(VISION_FIELDS, "hidden_dim", "batch_norm_momentum", "num_hidden_layers"),
    Known.of("projection_dim"),
)


def read_config(values: dict[str, Any]) -> CLIPConfig:
    """transformers' config.json → ours."""
    return CLIPConfig(
        vision=read_vision(hf_clip.part(values, "vision_config")),
        text=bert.read_config(hf_clip.part(values, "text_config")),
        embed_width=values.get("projection_dim", 640),
        image_projection=False,
        text_projection_bias=True,
        label_smoothing=0.1,
        initial_temperature=1.0,
    )


def read_vision(values: dict[str, Any]) -> EfficientNetConfig:
    v = VISION_FIELDS.complete(values)
    if v["num_channels"] != 3 or v["pooling_type"] != "mean":
        raise UserError(
            f"config.json asks for images of {v['num_channels']} channels and the pooling {v['pooling_type']!r}; only 3 "
            "channels and 'mean' are supported."
        )
    given = {**VISION_FIELDS.read(v), "image_size": hf_clip.square(v["image_size"], "image_size")}
    vision = EfficientNetConfig(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})
    before = (vision.stem_channels, *vision.channels[:-1])
    if list(map(vision.scaled, v["in_channels"])) != list(map(vision.scaled, before)):
        raise ValueError(f"in_channels are {v['in_channels']}, but what comes before each stage has {list(before)}")
    return vision


def write_config(config: CLIPConfig) -> dict[str, Any]:
    """Ours → transformers' config.json."""
    vision = config.vision
    if not isinstance(vision, EfficientNetConfig):
        raise UserError("transformers' ALIGN has an EfficientNet, which this is not; save without layout='hf'.")
    return {
        "architectures": ["AlignModel"],
        "model_type": "align",
        "projection_dim": config.embed_width,
        "text_config": {"model_type": "align_text_model", **bert.FIELDS.write(config.text)},
        "vision_config": {
            "model_type": "align_vision_model",
            **VISION_FIELDS.write(vision),
            "in_channels": [vision.stem_channels, *vision.channels[:-1]],
            "hidden_dim": vision.output_width,  # no width, but the side of the largest grid that their pool averages
        },
    }


# ---- processor -------------------------------------------------------------------------------------------------------

IMAGES = {  # EfficientNetImageProcessor's
    **preprocessing.CLIP_IMAGES,
    "size": {"height": 346, "width": 346},
    "square": True,
    "do_center_crop": False,
    "crop_size": {"height": 289, "width": 289},
    "image_mean": (0.485, 0.456, 0.406),
    "image_std": (0.229, 0.224, 0.225),
}
CONTEXT = 64  # what its processor pads texts to, of the 512 that its text encoder has positions for


def read_processor(directory: Path, values: dict[str, Any], config: CLIPConfig) -> Processor:
    _, given = preprocessing.find_images(directory)
    kinds = {"EfficientNetImageProcessor": IMAGES}
    more = ("rescale_offset", "include_top")
    images = preprocessing.read_images(directory, config.vision.image_size, IMAGES, kinds=kinds, more=more)
    if given.get("rescale_offset", False):  # pixels go from −1 to 1 before anything else
        images["mean"] = tuple(1 + mean for mean in images["mean"])
    if given.get("include_top", True):  # they are divided by the deviations once more; ALIGN's are not
        top = preprocessing.three(given.get("image_std", IMAGES["image_std"]))
        images["std"] = tuple(std * more for std, more in zip(images["std"], top, strict=True))
    source = preprocessing.read_tokenizer(directory, "BertTokenizer")
    pad = (values.get("text_config") or {}).get("pad_token_id", 0)
    context = min(CONTEXT, config.text.context)
    return preprocessing.make_processor(directory, source, pad=pad, context=context, **images)


def write_processor(processor: Processor, config: CLIPConfig) -> dict[str, dict[str, Any]]:
    """File name → what is in it, beside the tokeniser."""
    images = preprocessing.write_images(processor.config, "EfficientNetImageProcessor")
    return {"preprocessor_config.json": {**images, "rescale_offset": False, "include_top": False}}
