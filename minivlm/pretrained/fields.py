"""Fields of a published config.json ⇄ those of our configs: tables that are read row by row, and what is in no table.

    theirs                      ours            what a file means that does not have the field
    hidden_size                 width           768
    hidden_act                  activation      "gelu"              a publisher's word for it, see ACTIVATIONS
    eos_token_id                -               2                   read by other code, which also writes it

What a file says and this package does not follow is refused by name, unless it is switched off or known to be without
effect on pixels, token ids, weights and answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from minivlm.config import shown
from minivlm.errors import UserError
from minivlm.pretrained.generation_config import FIELDS as GENERATION

ACTIVATIONS = {  # their word → ours; of several words, the first is the one that is written
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "squared_relu",
    "silu": "silu",
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
}
DERIVED = {  # our field that is None → what it stands for, by width, heads and depth
    "mlp_width": lambda width, heads, depth: 4 * width,
    "head_width": lambda width, heads, depth: width // heads,
    "kv_heads": lambda width, heads, depth: heads,
    "decoder_depth": lambda width, heads, depth: depth,
    "context_width": lambda width, heads, depth: width,
}


class Fields(dict[str, tuple[str, Any]]):
    """Their name → ours, or "-", and the default of theirs."""

    def complete(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The file's values, with the defaults of what it leaves out."""
        return {name: default for name, (_, default) in self.items()} | dict(values)

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The file's values by our names."""
        values = self.complete(values)
        named = {ours: values[theirs] for theirs, (ours, _) in self.items() if ours != "-"}
        if "activation" in named:
            named["activation"] = read_activation(named["activation"])
        return named

    def write(self, config: Any) -> dict[str, Any]:
        """Our config by their names."""
        return {theirs: self.value(config, ours) for theirs, (ours, _) in self.items() if ours != "-"}

    def value(self, config: Any, ours: str) -> Any:
        value = getattr(config, ours)
        if ours == "activation":
            return write_activation(value)
        return DERIVED[ours](config.width, config.heads, config.depth) if value is None and ours in DERIVED else value

    def but(self, **defaults: Any) -> Fields:
        """The same table with other defaults, and rows that other code reads."""
        return Fields({**self, **{theirs: (self.get(theirs, ("-",))[0], value) for theirs, value in defaults.items()}})


def fields(text: str) -> Fields:
    """The table as it is drawn above; defaults as they stand in JSON."""
    rows = (line.split(maxsplit=2) for line in filter(None, map(str.strip, text.splitlines())))
    return Fields({theirs: (ours, json.loads(default)) for theirs, ours, default in rows})


def read_activation(word: str) -> str:
    if word not in ACTIVATIONS:
        raise UserError(f"config.json asks for the activation {word!r}; there are {', '.join(ACTIVATIONS)}.")
    return ACTIVATIONS[word]


def write_activation(name: str) -> str:
    return next(word for word, ours in ACTIVATIONS.items() if ours == name)


# ---- what is not followed --------------------------------------------------------------------------------------------

# Of any config.json: what another file or another reader follows, what only training or another task needs.
COMMON = {
    *("_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "auto_map"),
    *("_commit_hash", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "torchscript"),
    *("use_bfloat16", "tf_legacy_loss", "return_dict", "output_past", "problem_type", "id2label", "label2id"),
    *("num_labels", "_num_labels", "finetuning_task", "tokenizer_class", "prefix", "sep_token_id", "is_decoder"),
    *("is_encoder_decoder", "add_cross_attention", "tie_word_embeddings", "chunk_size_feed_forward"),
    *("gradient_checkpointing", "label_smoothing"),
    *("initializer_range", "initializer_factor", "init_std", "logit_scale_init_value", "temperature_init_value"),
    *("attention_dropout", "activation_dropout", "dropout", "dropout_rate", "hidden_dropout", "hidden_dropout_prob"),
    *("attention_probs_dropout_prob", "classifier_dropout", "resid_pdrop", "embd_pdrop", "emb_pdrop", "attn_pdrop"),
    *("layerdrop", "drop_connect_rate", "transformers.js_config", "unsloth_fixed", "unsloth_version", "resume_path"),
    *("custom_pipelines", "_flash_attn_2_enabled", "model_max_length", "license"),
}


class Known(NamedTuple):
    """The fields of a part of a config.json that are followed, or without effect besides `COMMON`. only: see below."""

    fields: frozenset[str]
    only: Mapping[str, Collection[Any]] = MappingProxyType({})

    @classmethod
    def of(cls, *fields: str | Iterable[str], **only: Collection[Any]) -> Known:
        names = {name for some in fields for name in ([some] if isinstance(some, str) else some)}
        return cls(frozenset(names), only)

    def __or__(self, other: Known) -> Known:
        return Known(self.fields | other.fields, {**self.only, **other.only})


def check_config(values: Mapping[str, Any], path: str, parts: Mapping[str, Known]) -> None:
    """`refuse_unknown` for each part of a config.json: "" is the whole, any other the name of a part of it."""
    for name, known in parts.items():
        part = values.get(name) if name else values
        if isinstance(part, dict):
            fields = known.fields | COMMON | GENERATION | ({*parts} if not name else set())
            refuse_unknown(part, f"{path}: {name}" if name else path, fields, only=known.only)


def refuse_unless(values: Mapping[str, Any], **supported: Any) -> None:
    """UserError if a field that changes what the model computes has another value than the one that is supported."""
    for name, value in supported.items():
        if (given := values.get(name, value)) != value:
            raise UserError(f"config.json has {name} = {given!r}, which is not supported; {value!r} is.")


def refuse_unknown(
    values: Mapping[str, Any],
    where: str,
    known: Collection[str],
    *,
    only: Mapping[str, Collection[Any]] | None = None,
) -> None:
    """UserError for the first field that is neither `known` (followed, or without effect) nor off: null, false, 0, empty.

    only: fields of which these values alone are followed; absent or null, they are the default.
    """
    for name, value in values.items():
        if only and name in only:
            if value is not None and value not in only[name]:
                supported = " or ".join(repr(v) for v in only[name])
                raise UserError(f"{where} has {name} = {value!r}, which is not supported; it must be {supported}.")
        elif name not in known and is_on(value):
            raise UserError(
                f"{where} has {name} = {shown(value)}, which is not known here and may change what comes out."
            )


def is_on(value: Any) -> bool:
    return value not in (None, False, 0, "") and value not in ([], {})
