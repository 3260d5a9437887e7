"""A publisher's names for tensors ⇄ ours: tables that are read row by row, and the small engine that applies them.

    theirs                            ours                             how
    encoder.layers.*.mlp.fc1          blocks.*.mlp.up_proj                         a module: its .weight, .bias …
    visual.proj                       image_projection.weight          transpose   stored as (in, out); not its bias
    attn.in_proj_weight               attention.{q,k,v}_proj.weight                three of ours, stacked
    attention.query_key_value         attention.{q,k,v}_proj                       … or, with `heads`, woven head by head
    logit_scale                       loss.logit_scale                 one         stored with an axis of 1 in front
    class_embedding                   class_embedding                  two         … with two of them
    temperature                       loss.logit_scale                 temperature ours is −ln of it
    seq_relationship                  match_head                       flip        the last row first
    cls|pooler                        -                                unread      a part that the model does not have
    a.weight|b.weight                 …                                            both are read, the first is written

`*` is the number of a layer. A table is strict in both directions: what has no row, no place or another shape is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from minivlm.errors import UserError

# Masks, indices and counters that some writers stored beside the weights. Nothing is computed from them.
IGNORED = re.compile(
    r"(.*\.)?(position_ids|rotary_emb\.inv_freq|h\.\d+\.attn\.bias|attn\.masked_bias|attn_mask|num_batches_tracked)"
    r"|(.*\.)?layers\.\d+\.attention\.(bias|masked_bias)"  # GPT-NeoX's masks
    r"|input_resolution|context_length|vocab_size"
    r"|(.*\.)?decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"  # the first T5's
)

AXES = {"one": 1, "two": 2}  # axes of length 1 that stand in front of theirs


@dataclass(frozen=True)
class Row:
    theirs: tuple[str, ...]  # the spellings that are read; the first is the one that is written
    ours: str
    how: str = ""
    part: int = 0  # ours is this part …
    parts: int = 1  # … of so many equal ones, along our first axis
    heads: int = 1  # the parts are stacked once for each of so many heads

    @cached_property
    def pattern(self) -> re.Pattern:
        return re.compile(re.escape(self.ours).replace(r"\*", r"(\d+)") + r"(\..+)?")

    def spellings(self, ours: str) -> list[str] | None:
        """Their names for our tensor, or None if this row is not about it."""
        if not (match := self.pattern.fullmatch(ours)):
            return None
        *numbers, rest = match.groups()
        return [fill_in(theirs, numbers) + (rest or "") for theirs in self.theirs]

    def their_shape(self, shape: torch.Size) -> tuple[int, ...]:
        if self.how in AXES:
            return (1,) * AXES[self.how] + tuple(shape)
        shape = (self.parts * shape[0], *shape[1:]) if self.parts > 1 else tuple(shape)
        return shape[::-1] if self.how == "transpose" else shape

    def to_ours(self, tensor: Tensor) -> Tensor:
        """A view where possible: memory-mapped weights stay where they are."""
        if not self.how and self.parts == 1:
            return tensor
        if self.how in AXES:
            return tensor.reshape(tensor.shape[AXES[self.how] :])
        if self.how == "temperature":
            return -tensor.log()
        if self.how == "flip":
            return tensor.flip(0)
        return self.own_rows(self.turn(tensor))

    def own_rows(self, tensor: Tensor) -> Tensor:
        """The rows of ours in a tensor that stacks several of ours along the first axis."""
        if self.parts == 1:
            return tensor
        return tensor.unflatten(0, (self.heads, self.parts, -1))[:, self.part].flatten(0, 1)

    def to_theirs(self, parts: list[Tensor]) -> Tensor:
        tensor = parts[0]
        if len(parts) > 1:
            tensor = torch.stack([part.unflatten(0, (self.heads, -1)) for part in parts], dim=1).flatten(0, 2)
        if self.how in AXES:
            return tensor.reshape(self.their_shape(tensor.shape))
        if self.how == "temperature":
            return (-tensor).exp()
        if self.how == "flip":
            return tensor.flip(0)
        return self.turn(tensor)

    def turn(self, tensor: Tensor) -> Tensor:
        return tensor.T if self.how == "transpose" and tensor.dim() == 2 else tensor


def fill_in(name: str, numbers: list[str]) -> str:
    """blocks.*.mlp, 3 → blocks.3.mlp"""
    for number in numbers:
        name = name.replace("*", number, 1)
    return name


def table(text: str) -> list[Row]:
    """The rows of a table as it is drawn above."""
    rows = []
    for line in filter(None, map(str.strip, text.splitlines())):
        theirs, ours, *how = line.split()
        names = expand(ours)
        for i, name in enumerate(names):
            rows.append(Row(tuple(theirs.split("|")), name, how[0] if how else "", i, len(names)))
    return rows


def expand(name: str) -> list[str]:
    """{q,k,v}_proj → q_proj, k_proj, v_proj"""
    match = re.fullmatch(r"(.*)\{(.+)\}(.*)", name)
    return [match[1] + word + match[3] for word in match[2].split(",")] if match else [name]


def under(rows: Iterable[Row], theirs: str | tuple[str, ...], ours: str) -> list[Row]:
    """The rows of a part, as they stand in a whole: names prefixed. Several prefixes of theirs: each one is read."""
    prefixes = (theirs,) if isinstance(theirs, str) else theirs
    return [replace(r, theirs=tuple(p + t for p in prefixes for t in r.theirs), ours=ours + r.ours) for r in rows]


def find(rows: list[Row] | None, ours: str) -> tuple[list[str], Row]:
    """Their spellings of our name and the row that says so; without a table, names are what they are."""
    if rows is None:
        return [ours], Row((ours,), ours)
    for row in rows:
        if (spellings := row.spellings(ours)) is not None:
            return spellings, row
    raise KeyError(f"the table of names has no row for {ours}")


def is_unread(theirs: str, rows: list[Row] | None) -> bool:
    """Does a table say that this tensor is of a part that our model does not have?"""
    parts = [part for row in rows or [] if row.how == "unread" for part in row.theirs]
    return any(theirs == part or theirs.startswith(f"{part}.") for part in parts)


def to_ours(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rows: list[Row] | None, where: str
) -> dict[str, Tensor]:
    """A tensor of `weights` for every name of `wanted` (a model's state; only shapes and identity are looked at).

    Names of `wanted` that are one tensor (tied weights) share one result, under whichever name is in the file.
    Raises UserError that names every tensor that is missing, unexpected or misshapen.
    """
    found, used, missing, misshapen = {}, set(), [], []
    for names in tied(wanted):
        candidates = [(theirs, row) for name in names for spellings, row in [find(rows, name)] for theirs in spellings]
        present = [(theirs, row) for theirs, row in candidates if theirs in weights]
        used.update(theirs for theirs, _ in present)
        if not present:
            if names[0].endswith("num_batches_tracked"):  # a counter that batch norm keeps and nothing reads
                found[names[0]] = torch.zeros((), dtype=torch.long)
            else:
                missing.append(candidates[0][0])
            continue
        theirs, row = present[0]
        tensor, target = weights[theirs], wanted[names[0]]
        shape = row.their_shape(target.shape)
        if tensor.shape != shape and not (row.how == "one" and tensor.numel() == 1):
            misshapen.append(f"{theirs} is {tuple(tensor.shape)} instead of {shape}")
        elif tensor.is_floating_point() != target.is_floating_point():
            misshapen.append(f"{theirs} is {str(tensor.dtype).removeprefix('torch.')}")
        else:
            found.update(dict.fromkeys(names, row.to_ours(tensor)))
    unexpected = [n for n in weights if n not in used and not IGNORED.fullmatch(n) and not is_unread(n, rows)]
    refuse_misfits(where, list(dict.fromkeys(missing)), unexpected, misshapen)
    return found


def to_theirs(tensors: Mapping[str, Tensor], rows: list[Row]) -> dict[str, Tensor]:
    """Our tensors under their names, in their shapes."""
    parts: dict[str, dict[int, Tensor]] = {}
    rows_by_name = {}
    for name, tensor in tensors.items():
        spellings, row = find(rows, name)
        parts.setdefault(spellings[0], {})[row.part] = tensor
        rows_by_name[spellings[0]] = row
    return {theirs: row.to_theirs([parts[theirs][i] for i in range(row.parts)]) for theirs, row in rows_by_name.items()}


def tied(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that are one and the same tensor, together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def refuse_misfits(where: str, missing: list[str], unexpected: list[str], misshapen: list[str]) -> None:
    """One sentence about everything that does not fit, if anything does not."""
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape or kind", misshapen))
    parts = [f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds if names]
    if parts:
        raise UserError(f"{where} does not hold the tensors that its config asks for: {'; '.join(parts)}.")


def listed(names: list[str], most: int = 8) -> str:
    """The first names of a long list, and how many there are beyond."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
