"""OpenFlamingo as its authors store it: openflamingo/OpenFlamingo-3B-vitl-mpt1b and kin. Awadalla et al. 2023.

    checkpoint.pt    what was trained: resampler, gated layers, the language model's embedding
    clip/            the frozen vision tower, a CLIP as open_clip or transformers store it (ViT-L/14 of openai)
    lang/            the frozen language model, in transformers' form (for the 3B anas-awadalla/mpt-1b-redpajama-200b)

checkpoint.pt says nothing about the other two, nor where the gated layers stand: that is read off the names in it.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from minivlm import pretrained
from minivlm.errors import UserError
from minivlm.layers.gated_cross_attention import GatedConfig
from minivlm.layers.language_model import LanguageModelConfig
from minivlm.layers.perceiver import PerceiverConfig
from minivlm.layers.vit import VisionConfig
from minivlm.models.flamingo import Flamingo, FlamingoConfig
from minivlm.pretrained import preprocessing
from minivlm.pretrained.files import Lazy, open_weights
from minivlm.pretrained.language import vocabulary
from minivlm.pretrained.names import Row, find, table, under
from minivlm.processor import Processor

model_class = Flamingo
CHECKPOINT = "checkpoint.pt"
CHUNK, PLACEHOLDER, PAD = "<|endofchunk|>", "<image>", "<PAD>"  # added to the language model's words, in this order

# ---- names -----------------------------------------------------------------------------------------------------------

RESAMPLER = table("""
    latents                     latents
    frame_embs                  times
    norm                        norm
    layers.*.0.norm_media       blocks.*.features_norm
    layers.*.0.norm_latents     blocks.*.latents_norm
    layers.*.0.to_q             blocks.*.attention.q_proj
    layers.*.0.to_kv            blocks.*.attention.{k,v}_proj
    layers.*.0.to_out           blocks.*.attention.out_proj
    layers.*.1.0                blocks.*.mlp_norm
    layers.*.1.1                blocks.*.mlp.up_proj
    layers.*.1.3                blocks.*.mlp.down_proj
""")

GATED = table("""
    attn_gate       attention_gate
    ff_gate         mlp_gate
    attn.norm       attention_norm
    attn.to_q       attention.q_proj
    attn.to_kv      attention.{k,v}_proj
    attn.to_out     attention.out_proj
    ff.0            mlp_norm
    ff.1            mlp.up_proj
    ff.3            mlp.down_proj
""")

# Where a gated layer's number stands in its name, now and in the first files: it is that of the block behind it.
GATE = re.compile(
    r"(lang_encoder\.(?:.+\.)?)(?:(\d+)\.gated_cross_attn_layer|gated_cross_attn_layers\.(\d+))\.attn_gate"
)
COPIES = ("vision_encoder.", "lang_encoder.old_decoder_blocks.")  # of frozen weights, in training files


def rows(config: FlamingoConfig, layers: str, lm: list[Row], tower: list[Row]) -> list[Row]:
    """layers: what the names of the language model's blocks begin with. lm, tower: the tables of the other two."""
    gated = []
    for i, block in enumerate(config.block_indices):
        theirs = (f"{layers}{block}.gated_cross_attn_layer.", f"lang_encoder.gated_cross_attn_layers.{block}.")
        gated += under(GATED, theirs, f"gated.{i}.")
    return [
        *under(RESAMPLER, "perceiver.", "resampler."),
        *gated,
        *under(lm, "lang_encoder.", "language_model."),
        *under([row for row in tower if row.ours.startswith("vision.")], "vision_encoder.", ""),
    ]


# ---- the three parts -------------------------------------------------------------------------------------------------


def read(directory: Path) -> pretrained.Published:
    """Everything but the tensors, and how to find these."""
    trained = strip(open_weights(directory, (CHECKPOINT,))[1])
    clip, lm = (read_part(directory, part) for part in ("clip", "lang"))
    layers, blocks = gated_blocks(trained, directory / CHECKPOINT)
    tokens, processor = read_processor(directory / "lang", lm, clip)
    names, _ = find(under(lm.rows, "lang_encoder.", ""), "token_embedding.weight")
    words = next((len(trained[name]) for name in names if name in trained), lm.config.vocab_size)
    language = replace(lm.config, vocab_size=words, pad_token=processor.pad_token, end_tokens=(tokens[CHUNK],))
    config = FlamingoConfig(
        **read_vision_features(trained, clip.config.vision, directory / CHECKPOINT),
        **read_gated(language, blocks, directory / CHECKPOINT),
        image_token=tokens[PLACEHOLDER],
    )

    def prepare(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        frozen = open_weights(directory / "lang", lm.weights)[1], open_weights(directory / "clip", clip.weights)[1]
        wanted = {name for row in clip.rows if row.ours.startswith("vision.") for name in row.theirs}
        of_tower = re.compile("|".join(re.escape(name).replace(r"\*", r"\d+") + r"(\..+)?" for name in sorted(wanted)))
        tower = Prefixed(frozen[1], "vision_encoder.", of_tower)
        return ChainMap(strip(weights), Prefixed(frozen[0], "lang_encoder."), tower)

    table = rows(config, layers, lm.rows, clip.rows)
    return pretrained.Published(Flamingo, config, table, (CHECKPOINT,), processor, prepare, defaults=lm.defaults)


def read_part(directory: Path, part: str) -> pretrained.Published:
    path = directory / part
    if not path.is_dir():
        raise UserError(
            f"{directory} holds what OpenFlamingo trained, but not what it was trained on: put the CLIP into "
            f"{directory / 'clip'} (open_clip's ViT-L/14 of openai) and the language model into {directory / 'lang'} "
            "(for OpenFlamingo-3B, anas-awadalla/mpt-1b-redpajama-200b)."
        )
    described = pretrained.read(path, pretrained.recognise(path))
    kind = VisionConfig if part == "clip" else LanguageModelConfig
    found = getattr(described.config, "vision", None) if part == "clip" else described.config
    if not isinstance(found, kind):
        raise UserError(f"{path} holds a {described.model_class.__name__}; it should be a " + (
            "CLIP with a ViT." if part == "clip" else "language model."
        ))  # fmt: skip
    return described


def strip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what training in parallel puts before names, and without copies of frozen weights."""
    plain = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return {name: tensor for name, tensor in plain.items() if not name.startswith(COPIES)}


class Prefixed(Lazy):
    """A file's tensors under longer names; only: those whose own name matches."""

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, only: re.Pattern | None = None):
        self.weights = weights
        self.names = {prefix + name: name for name in weights if only is None or only.fullmatch(name)}

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[self.names[name]]


# ---- config: read off the tensors ------------------------------------------------------------------------------------


def gated_blocks(weights: Mapping[str, Tensor], path: Path) -> tuple[str, list[int]]:
    """The prefix of the blocks' names, and the numbers of the blocks with a gated layer before them."""
    found = [match for name in weights if (match := GATE.fullmatch(name))]
    if not found:
        raise UserError(f"{path} is no OpenFlamingo checkpoint: it holds no gated cross-attention.")
    return found[0][1], sorted({int(match[2] or match[3]) for match in found})


def read_gated(language: LanguageModelConfig, blocks: list[int], path: Path) -> dict[str, Any]:
    """The fields about gated layers, which stand before block n − 1, 2n − 1 …

    They have 8 heads of 64 channels whatever the width, and GELU, where the paper has squared ReLU."""
    every = blocks[0] + 1
    if blocks != list(range(every - 1, language.depth, every)):
        raise UserError(
            f"{path} does not belong to the language model beside it, which has {language.depth} blocks: its gated layers "
            f"stand before blocks {', '.join(map(str, blocks))}."
        )
    gated = GatedConfig(heads=8, head_width=64, mlp_width=4 * language.width, activation="gelu")
    return {"language": language, "every": every, "offset": every - 1, "gated": gated}


def read_vision_features(weights: Mapping[str, Tensor], vision: VisionConfig, path: Path) -> dict[str, Any]:
    """The patches of the tower's last layer, as open_clip gave them until October 2023, when the weights were trained:
    before its last norm. 8 heads of 64 channels in the resampler as well."""
    if "perceiver.latents" not in weights:
        raise UserError(f"{path} is no OpenFlamingo checkpoint: it holds no perceiver.latents.")
    latents, width = weights["perceiver.latents"].shape
    depth = len({name.split(".")[2] for name in weights if name.startswith("perceiver.layers.")})
    times = weights.get("perceiver.frame_embs")
    resampler = PerceiverConfig(
        width=width,
        depth=depth,
        heads=8,
        head_width=64,
        latents=latents,
        activation="gelu",
        max_images=0 if times is None else len(times),
    )
    return {"vision": vision, "class_token": False, "vision_norm": False, "resampler": resampler}


# ---- processor -------------------------------------------------------------------------------------------------------


def read_processor(
    directory: Path, lm: pretrained.Published, clip: pretrained.Published
) -> tuple[dict[str, int], Processor]:
    """The ids of the added tokens, and CLIP's pictures with the language model's words and these."""
    source = lm.processor.source
    vocab = vocabulary(source, directory)
    if not vocab:
        raise UserError(f"{directory} has no tokenizer.json, without which the image token is not known.")
    pad = preprocessing.read_pad_token(directory, PAD)
    new = [token for token in (CHUNK, PLACEHOLDER, pad) if token not in vocab]
    tokens = {**vocab, **{token: len(vocab) + i for i, token in enumerate(new)}}
    pictures = {
        name: getattr(clip.processor.config, name) for name in ("image_size", "resize", "resize_to", "resample")
    }
    pictures |= {name: getattr(clip.processor.config, name) for name in ("crop", "rescale", "mean", "std", "pad_color")}
    config = replace(
        lm.processor.config,
        **pictures,
        pad_token=pad,
        image_token=PLACEHOLDER,
        image_tokens=1,
        chat="openflamingo",
    )
    processor = Processor(source, config)
    if new:
        processor.tokenizer.add_special_tokens(new)
        processor = Processor(processor.tokenizer, config)
    return tokens, processor
