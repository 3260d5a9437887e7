"""What a published file says and this package does not follow is refused by name, unless it is switched off or known to be
without effect on pixels, token ids, weights and answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from minivlm.errors import UserError


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
                supported = " and ".join(repr(v) for v in only[name])
                raise UserError(f"{where} has {name} = {value!r}, which is not supported; {supported} is.")
        elif name not in known and is_on(value):
            raise UserError(
                f"{where} has {name} = {shown(value)}, which is not known here and may change what comes out."
            )


def is_on(value: Any) -> bool:
    return value not in (None, False, 0, "") and value not in ([], {})


def shown(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}…"
