"""generation_config.json ⇄ what holds for `generate` where its caller says nothing (`Model.defaults`).

repetition_penalty, min_length, num_beams …     as they are, see FOLLOWED
do_sample, temperature, top_k, top_p, min_p     temperature 0 where nothing is sampled
eos_token_id, pad_token_id, decoder_start_token_id      go into the model's config
penalty_alpha, guidance_scale …                 another way of choosing: named at loading, see `not_followed`
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from minivlm import config as configs
from minivlm.errors import UserError
from minivlm.files import read_json
from minivlm.generation.options import Options

NAME = "generation_config.json"
TOKENS = ("eos_token_id", "pad_token_id", "decoder_start_token_id")

# Whose `generate` reads the file. BLIP's and BLIP-2's call that of their language model, which knows its own config alone.
READERS = ("gpt2", "gpt_neox", "opt", "t5", "llama", "mistral", "qwen2", "mpt", "mosaic_gpt", "llava", "idefics")

Tokens = tuple[int, ...]
FOLLOWED = {  # name, here as there → its type
    "max_new_tokens": int,
    "max_length": int,
    "min_new_tokens": int,
    "min_length": int,
    "num_beams": int,
    "length_penalty": float,
    "early_stopping": bool | Literal["never"],
    "repetition_penalty": float,
    "no_repeat_ngram_size": int,
    "bad_words_ids": tuple[Tokens, ...],
    "suppress_tokens": Tokens,
    "begin_suppress_tokens": Tokens,
    "forced_bos_token_id": int,
    "forced_eos_token_id": Tokens,
}
SAMPLING = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
STANDARD = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}  # where a file that samples is silent

WITHOUT_EFFECT = {  # on the tokens of an answer
    *("_from_model_config", "transformers_version", "bos_token_id", "do_sample", "use_cache", "cache_implementation"),
    *("cache_config", "max_cache_len", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "compile_config", "disable_compile", "low_memory"),
    *("prefill_chunk_size", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "target_lookbehind"),
    *("assistant_lookbehind", "assistant_early_exit", "continuous_batching_config", "max_matching_ngram_size"),
    *("chat_format", "max_window_size", "trust_remote_code", "task_specific_params"),
}
OFF = {  # what is not followed → the value that switches it off, besides null, false, 0 and nothing
    **dict.fromkeys(("encoder_repetition_penalty", "typical_p", "guidance_scale", "num_beam_groups"), 1),
    "num_return_sequences": 1,
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty", "penalty_alpha", "epsilon_cutoff"), 0),
    **dict.fromkeys(("eta_cutoff", "top_h", "sequence_bias", "exponential_decay_length_penalty", "constraints"), 0),
    **dict.fromkeys(("force_words_ids", "watermarking_config", "token_healing", "dola_layers", "stop_strings"), 0),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "max_time", "prompt_lookup_num_tokens"), 0),
    **dict.fromkeys(("use_mtp", "assistant_ensemble_weight", "speculation_type"), 0),
}
FIELDS = {*TOKENS, *FOLLOWED, *SAMPLING, *OFF, *WITHOUT_EFFECT}  # of a config.json, up to transformers 4


def read_values(directory: Path, config: Mapping[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The file, or without one what config.json says about it, as files of transformers 4 do."""
    path = directory / NAME
    if path.exists():
        return path, read_json(path)
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return directory / "config.json", {k: v for k, v in {**inner, **config}.items() if k in FIELDS}


def tokens(values: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens that a file names, which go before those of config.json."""
    return {name: values[name] for name in TOKENS if values.get(name) is not None}


def read(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Options` that a file gives. UserError for values without sense."""
    given = {name: value for name, value in values.items() if value is not None}
    if isinstance(given.get("forced_eos_token_id"), int):
        given["forced_eos_token_id"] = [given["forced_eos_token_id"]]
    if "max_new_tokens" in given:  # it goes before the other
        given.pop("max_length", None)
    if given.get("do_sample") and given.get("num_beams", 1) == 1:
        given = {**STANDARD, **given}
    else:  # the others hold for a caller who samples
        given.pop("temperature", None)
    given = {name: value for name, value in given.items() if (name, value) not in (("top_k", 0), ("top_p", 1.0))}
    kinds = FOLLOWED | SAMPLING
    found = {
        name: configs.coerce(kind, given[name], f"{path}: {name}") for name, kind in kinds.items() if name in given
    }
    try:
        options = Options(**found)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    standard = vars(Options())
    return {name: value for name, value in vars(options).items() if name in found and value != standard[name]}


def not_followed(values: Mapping[str, Any]) -> list[str]:
    """The names of fields that are switched on and not followed."""
    names = [n for n, value in values.items() if n not in FOLLOWED and n not in SAMPLING and n not in WITHOUT_EFFECT]
    switched_on = [name for name in names if name not in TOKENS and values[name] and values[name] != OFF.get(name)]
    beams = values.get("num_beams") or 1
    return [*switched_on, *(["do_sample beside num_beams"] if values.get("do_sample") and beams > 1 else [])]


def write(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """config: transformers' config.json, which says what ends an answer."""
    values = {**tokens(config), **defaults}
    if values.get("temperature"):
        values = {"do_sample": True, **STANDARD, "top_k": 0, **values}
    return values
