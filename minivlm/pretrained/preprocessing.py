"""preprocessor_config.json and tokeniser files ⇄ `Processor`."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.errors import UserError
from minivlm.files import read_bytes, read_json, read_text
from minivlm.pretrained import tokenizer_config
from minivlm.pretrained.fields import refuse_unknown
from minivlm.processor import CLIP_MEAN, CLIP_STD, Processor, ProcessorConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # by PIL's numbers

# What a file that is absent, or silent about a field, means. A size of None is that of the model's images.
CLIP_IMAGES = {
    "do_resize": True,
    "size": None,
    "square": False,  # what a bare number means: both sides, or the shorter one
    "resample": 3,
    "do_center_crop": True,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
HALF = (0.5, 0.5, 0.5)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIGLIP_IMAGES = {**CLIP_IMAGES, "square": True, "do_center_crop": False, "image_mean": HALF, "image_std": HALF}
BLIP_IMAGES = {**SIGLIP_IMAGES, **{k: CLIP_IMAGES[k] for k in ("image_mean", "image_std")}}
VIT_IMAGES = {**SIGLIP_IMAGES, "resample": 2}
KINDS = {  # image_processor_type, which says what a silent file means
    **dict.fromkeys(("CLIPImageProcessor", "CLIPFeatureExtractor", "BitImageProcessor"), CLIP_IMAGES),
    "LlavaImageProcessor": {**CLIP_IMAGES, "do_pad": False},
    "SiglipImageProcessor": SIGLIP_IMAGES,
    **dict.fromkeys(("BlipImageProcessor", "IdeficsImageProcessor"), BLIP_IMAGES),
    **dict.fromkeys(("ViTImageProcessor", "ViTFeatureExtractor"), VIT_IMAGES),
}

WITHOUT_EFFECT = {  # on pixels of pictures in RGB, that all have one size
    *("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format", "device"),
    *("input_data_format", "return_tensors", "default_to_square", "disable_grouping", "size_divisor", "do_pad"),
    *("_valid_processor_keys", "_processor_class", "transformers_version", "num_query_tokens", "image_token"),
    *(
        "patch_size",
        "image_seq_length",
        "num_additional_image_tokens",
        "vision_feature_select_strategy",
        "num_image_tokens",
    ),
    *("chat_template", "tokenizer_class"),
}


def read_images(
    directory: Path,
    image_size: int,
    defaults: dict[str, Any],
    *,
    kinds: dict[str, dict[str, Any]] = KINDS,
    more: Collection[str] = (),
) -> dict[str, Any]:
    """transformers' settings → the fields of `ProcessorConfig` about images.

    defaults: where the file does not say of which of the `kinds` it is. more: fields that the caller follows.
    """
    path, values = find_images(directory)
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    kind = kind.removesuffix("Pil").removesuffix("Fast")
    if kind and kind not in kinds:
        raise UserError(f"{path} has image_processor_type = {kind!r}; supported are {', '.join(kinds)}.")
    defaults = kinds.get(kind, defaults)
    only = {"image_num_channels": (3,), "use_square_size": (False,)}
    refuse_unknown(values, str(path), {*defaults, *more, *WITHOUT_EFFECT}, only=only)
    v = {**defaults, **{k: value for k, value in values.items() if value is not None}}
    if "image_size" in more and values.get("image_size"):  # IDEFICS's, which goes before the other
        v["size"] = values["image_size"]
    resize, size = read_size(path, v["size"] or image_size, square=v["square"])
    _, crop_size = read_size(path, v["crop_size"] or image_size, square=True)
    if v["resample"] not in range(len(RESAMPLE)):
        raise UserError(f"{path} has resample {v['resample']!r}; PIL knows 0 to {len(RESAMPLE) - 1}.")
    fields = {}
    if v.get("do_pad") and "do_pad" in defaults:
        fields["pad_color"] = tuple(int(x * 255) for x in three(v["image_mean"]))
    return {
        **fields,
        "image_size": crop_size if v["do_center_crop"] else size,
        "resize": resize if v["do_resize"] else "none",
        "resize_to": size,
        "resample": RESAMPLE[v["resample"]],
        "crop": "floor" if v["do_center_crop"] else "none",
        "rescale": float(v["rescale_factor"]) if v["do_rescale"] else 1.0,
        "mean": three(v["image_mean"]) if v["do_normalize"] else (0.0,) * 3,
        "std": three(v["image_std"]) if v["do_normalize"] else (1.0,) * 3,
    }


def find_images(directory: Path) -> tuple[Path, dict[str, Any]]:
    """Since its version 5 transformers writes them into processor_config.json; before, they had a file of their own."""
    path = directory / "processor_config.json"
    if path.exists() and "image_processor" in (values := read_json(path)):
        return path, values["image_processor"]
    path = directory / "preprocessor_config.json"
    return path, read_json(path) if path.exists() else {}


def read_size(path: Path, size: int | dict[str, int], *, square: bool) -> tuple[str, int]:
    """The way of resizing, and the size. Files of 2021 and 2022 have a bare number."""
    if isinstance(size, int):
        return ("squash" if square else "shortest"), size
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return "shortest", size["shortest_edge"]
    if isinstance(size, dict) and set(size) == {"height", "width"} and size["height"] == size["width"]:
        return "squash", size["height"]
    raise UserError(f"{path} has the size {size}; supported are a number, a shortest_edge, equal height and width.")


def three(value: float | list[float]) -> tuple[float, ...]:
    return tuple(map(float, value if isinstance(value, (list, tuple)) else [value] * 3))


def write_images(config: ProcessorConfig, kind: str) -> dict[str, Any]:
    """The reverse. open_clip's crop is not one of transformers': it may begin a pixel further along."""
    size = config.resize_to or config.image_size
    shortest = config.resize == "shortest"
    pads = config.pad_color is not None
    if pads and config.pad_color != (mean := tuple(int(x * 255) for x in config.mean)):
        raise UserError(
            f"transformers pads with the mean's {mean}, not with {config.pad_color}; save without layout='hf'."
        )
    return {
        "image_processor_type": "LlavaImageProcessor" if pads else kind,
        **({"do_pad": True} if pads else {}),
        "do_convert_rgb": True,
        "do_resize": config.resize != "none",
        "size": {"shortest_edge": size} if shortest else {"height": size, "width": size},
        "resample": RESAMPLE.index(config.resample),
        "do_center_crop": config.crop != "none",
        "crop_size": {"height": config.image_size, "width": config.image_size},
        "do_rescale": True,
        "rescale_factor": config.rescale,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def read_open_clip_images(values: dict[str, Any], image_size: int) -> dict[str, Any]:
    """preprocess_cfg of open_clip_config.json → the fields of `ProcessorConfig` about images."""
    v = {"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    v |= {k: value for k, value in values.items() if value is not None}
    size = [image_size, (image_size,) * 2, [image_size] * 2]
    known = {"mean", "std", "interpolation", "resize_mode", "fill_color"}  # the last of a resize_mode that is refused
    refuse_unknown(values, "open_clip_config.json: preprocess_cfg", known, only={"mode": ("RGB",), "size": size})
    if v["resize_mode"] not in ("shortest", "squash"):
        raise UserError(f"preprocess_cfg.resize_mode is {v['resize_mode']!r}; shortest and squash are supported.")
    return {
        "image_size": image_size,
        "resize": v["resize_mode"],
        "resample": "bilinear"
        if v["interpolation"] == "bilinear"
        else "bicubic",  # open_clip reads "random" so as well
        "crop": "round" if v["resize_mode"] == "shortest" else "none",
        "mean": three(v["mean"]),
        "std": three(v["std"]),
    }


# ---- tokeniser -------------------------------------------------------------------------------------------------------


def read_tokenizer(
    directory: Path, family: str, *, special: Sequence[str] = (), adds_bos: bool = False
) -> bytes | None:
    """tokenizer.json as tokenizer_config.json changes it, or what there was before: BERT's vocab.txt, CLIP's and GPT-2's
    vocab.json and merges.txt. None if there is nothing.

    family: the class of the tokeniser, where the files do not say. special, adds_bos: of a GPT-2 without tokenizer.json,
    its special tokens, and whether the last of them begins a text where tokenizer_config.json is silent.
    """
    names = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json")
    whole, vocab, merges, pieces, added = (directory / name for name in names)
    about = tokenizer_config.read_about(directory)
    if whole.exists():
        return tokenizer_config.follow(read_bytes(whole), about, family, whole)
    if family == "BertTokenizer" and pieces.exists():
        return tokenizer_config.word_pieces(lines_of(pieces), about)
    if family not in ("CLIPTokenizer", "GPT2Tokenizer") or not vocab.exists() or not merges.exists():
        return None  # of the other classes these two do not say all
    pairs = [line.split() for line in lines_of(merges) if line and not line.startswith("#version")]
    if family == "CLIPTokenizer":
        special = tokenizer_config.CLIP_FRAME
    start = tokenizer_config.spelt(about, "bos_token", special[-1]) if about.get("add_bos_token", adds_bos) else None
    values = tokenizer_config.byte_pairs(family, read_json(vocab), pairs, special, start, about)
    given = {
        id: {"content": token, "special": True} for token, id in (read_json(added) if added.exists() else {}).items()
    }
    tokenizer_config.add_tokens(values, given, f"{added} gives {{!r}} the number {{}}, but it is {{}}.")
    return json.dumps(values, ensure_ascii=False).encode()


def lines_of(path: Path) -> list[str]:
    """The lines of a text; signs that Unicode counts as ends of lines are parts of tokens."""
    return [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]


def make_processor(directory: Path, source: Tokenizer | bytes | None, *, pad: str | int, **fields: Any) -> Processor:
    """A processor with these fields of `ProcessorConfig`, and those that the tokeniser's files decide.

    pad: the padding where they name none.
    """
    tidy = source is not None and bool(tokenizer_config.read_about(directory).get("clean_up_tokenization_spaces"))
    return Processor(source, ProcessorConfig(**{"pad_token": read_pad_token(directory, pad), **fields}, tidy=tidy))


def read_pad_token(directory: Path, default: str | int) -> str | int:
    """The padding token that tokenizer_config.json or special_tokens_map.json names."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (directory / name).exists() and (token := read_json(directory / name).get("pad_token")):
            return token["content"] if isinstance(token, dict) else token
    return default


def tokenizer_files(processor: Processor, end_token: int | None = None) -> dict[str, str]:
    """File name → content, as transformers' AutoTokenizer reads them.

    end_token: the model's, where the tokeniser puts none after a text.
    """
    if processor.source is None:
        return {}
    tokenizer = processor.tokenizer
    # open_clip pads with "!", which must stay a word: where the padding is no special token, the end token serves
    special = tokenizer.get_added_tokens_decoder()
    end = processor.end_token if end_token is None else end_token
    pad = processor.pad_token if processor.pad_token in special else end
    named = {"bos": processor.start_token, "eos": end, "pad": pad}
    spelt = {name: tokenizer.id_to_token(i) for name, i in named.items() if i is not None}
    tokens = {f"{name}_token": token for name, token in spelt.items() if token is not None}
    suffix = getattr(tokenizer.model, "end_of_word_suffix", None)
    values = {
        "tokenizer_class": "CLIPTokenizer" if suffix == "</w>" else "PreTrainedTokenizerFast",
        **tokens,
        "model_max_length": processor.context,
        "clean_up_tokenization_spaces": processor.config.tidy,
        "model_input_names": ["input_ids"] if processor.config.pad_to_context else ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(values, indent=2)}
