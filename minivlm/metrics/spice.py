"""SPICE: F1 of what a caption and its references say, as tuples (Anderson et al. 2016, §3).

    "a small red circle on the left"  →  (circle) · (circle, small) · (circle, red) · (circle, at, left)

In the shapes world captions parse exactly. Elsewhere the official program parses them, which is Java (`spice_by_java`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from minivlm.datasets.shapes.text import parse
from minivlm.metrics.official_java import Unavailable, program_folder, run_java

PARSER = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def spice_of_shapes(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n,) F1 of each caption of the shapes world beside what its references say together."""
    values = []
    for text, known in zip(texts, references, strict=True):
        said, true = tuples([text]), tuples(known)
        values.append(2 * len(said & true) / max(1, len(said) + len(true)))
    return np.array(values)


def tuples(captions: Iterable[str]) -> set[tuple[str, ...]]:
    """Objects, attributes and relations. As in SPICE, what is said twice counts once."""
    found: set[tuple[str, ...]] = set()
    for thing in (thing for caption in captions for thing in parse(caption)):
        found.add((thing.shape,))
        found |= {(thing.shape, attribute) for attribute in (thing.colour, thing.size) if attribute}
        if thing.place:
            found.add((thing.shape, "at", thing.place))
    return found


def spice_by_java(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n,) F1 of each tokenised caption by the official program. Unavailable where it, or the parser it needs, is missing."""
    library = program_folder("SPICE", "spice", "spice-1.0.jar") / "lib"
    if missing := [name for name in PARSER if not (library / name).is_file()]:
        raise Unavailable(
            f"SPICE is left out: its parser, {missing[0]}, is missing in {library} (python -c 'from pycocoevalcap.spice.spice "
            "import Spice; Spice()' downloads it)."
        )
    samples = [
        {"image_id": i, "test": text, "refs": list(known)}
        for i, (text, known) in enumerate(zip(texts, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "captions.json", Path(folder) / "scores.json"
        asked.write_text(json.dumps(samples), encoding="utf-8")
        arguments = ["-Xmx8G", "-jar", "spice-1.0.jar", str(asked), "-out", str(answered), "-subset", "-silent"]
        run_java("SPICE", "spice", "spice-1.0.jar", arguments)
        rows = json.loads(answered.read_text(encoding="utf-8"))
    values = {row["image_id"]: row["scores"]["All"]["f"] for row in rows}
    # None or NaN: neither the caption nor its references say anything that the parser takes for an object.
    return np.nan_to_num(np.array([values[i] for i in range(len(texts))], dtype=np.float64))
