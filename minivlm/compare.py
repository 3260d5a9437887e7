"""python -m minivlm.compare out/a out/b out/c [--save comparison.png|.html|.json]: runs side by side.

training.json of the last checkpoint ──→ what it took, and the options in which the runs differ
metrics.json, samples.npz ─────────────→ scores with their intervals; the best is marked where it is surely better
log.jsonl ─────────────────────────────→ curves of all runs in one picture (--save)
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from minivlm import html
from minivlm.atomic_writing import write_atomically
from minivlm.command_line import Parser, check_place, check_sheet_name, write_sheet
from minivlm.curves import compared_plots
from minivlm.errors import UserError, run_command_line
from minivlm.evaluate.table import aligned
from minivlm.metrics import Score
from minivlm.pictures import CURVES
from minivlm.plots import draw_page
from minivlm.run_results import RunResults, read
from minivlm.sizes import in_words

MARK = " *"
MEANING = (
    "* surely the best: better than each other run by the paired bootstrap (95 %), or, without samples, by its interval"
)
WORDS = ("summary", "measured", "given")  # of a recipe, which change nothing
LOWER = re.compile(r"perplexity|CHAIR|hallucinat", re.IGNORECASE)  # scores of which less is better
NEITHER = re.compile(r"\byes\b", re.IGNORECASE)  # and of which neither is
Cells = dict[str, list[str]]  # rows by name, a text for each run


def main(argv: list[str]) -> None:
    parser = Parser(prog="python -m minivlm.compare", description=__doc__.partition(":")[2].split("\n\n")[0].strip())
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directories that train.py wrote")
    parser.add_argument("--save", metavar="FILE", help="curves as .png, everything as .html, the numbers as .json")
    options = parser.parse_args(argv)
    check_save(options.save)
    check_different(options.runs)
    runs = [read(path) for path in options.runs]
    for note in [*(note for run in runs for note in run.notes), *told_of_data(runs)]:
        print(f"note: {note}", file=sys.stderr)
    tables = tables_of(runs)
    print("\n\n".join(text(title, [run.name for run in runs], cells) for title, cells in tables.items()))
    if is_marked(tables):
        print(f"\n{MEANING}")
    if options.save:
        save(Path(options.save), runs, tables)


def check_save(path: str | None) -> None:
    """UserError, before the work, unless it can be written there."""
    if path is None:
        return
    kind = Path(path).suffix.lower()
    if kind in (".html", ".htm"):
        html.check_page(path, "--save")
    elif kind not in Image.registered_extensions() and kind != ".json":
        raise UserError(f"--save {path}: the name has to end in .png, .html or .json.")
    elif kind == ".json":
        check_place(path, "--save")
    else:
        check_sheet_name(path)


def check_different(paths: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for path in paths:
        if (before := known.setdefault(str(Path(path).resolve()), path)) is not path:
            raise UserError(f"{before} and {path} are the same run: name it once.")


def told_of_data(runs: Sequence[RunResults]) -> Iterator[str]:
    known = [run for run in runs if run.record.get("data")]
    if any(not same_data(known[0], run) for run in known[1:]):
        yield "the runs were trained on different data: their scores are not of the same samples"
    if len(names := {run.record["name"] for run in runs if run.record.get("name")}) > 1:
        yield f"the runs are of different recipes ({', '.join(sorted(names))}): their losses are not the same"


def same_data(one: RunResults, other: RunResults) -> bool:
    """Whether nothing says otherwise."""
    return None in (a := (one.record.get("data"), other.record.get("data"))) or a[0] == a[1]


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables_of(runs: Sequence[RunResults]) -> dict[str, Cells]:
    """By their titles; one without rows is left out."""
    tables = {"what they took": took(runs), "options that differ": differing(runs), "scores": scores_of(runs)}
    return {title: cells for title, cells in tables.items() if cells}


def took(runs: Sequence[RunResults]) -> Cells:
    columns = [dict(facts(run)) for run in runs]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name, "–") for column in columns] for name in names}


def facts(run: RunResults) -> Iterator[tuple[str, str]]:
    record, steps = run.record, [line["step"] + 1 for line in run.log]
    numbers = lambda key: [line[key] for line in run.log if isinstance(line.get(key), (int, float))]
    if record:
        yield "recipe", str(record.get("name", record["recipe"].get("type", "–")))
    if done := record.get("step") or max(steps, default=0):
        whole = record["recipe"].get("steps", done) if record else done
        yield "steps", f"{done:,}" if done >= whole else f"{done:,} of {whole:,}"
    for name in ("parameters", "trained"):
        if name in record:
            yield name, f"{record[name]:,}"
    if seconds := record.get("seconds") or max(numbers("seconds"), default=0):
        yield "minutes", f"{seconds / 60:.1f}"
    if speeds := numbers("samples_per_second"):
        yield "samples/s", f"{median(speeds):,.0f}"
    if held := numbers("peak_memory"):
        yield "peak memory", in_words(max(held))
    if judged := [(line["validation"], line["step"] + 1) for line in run.log if line.get("validation") is not None]:
        best, step = max(judged)
        yield "best validation", f"{best:.1%} (step {step:,})"
    elif record:
        yield "last validation", f"{record['score']:.1%}"


def differing(runs: Sequence[RunResults]) -> Cells:
    """Options of recipes, and of the machines that they ran on, in which not all runs agree."""
    known = [flat(run.record["recipe"]) | flat(run.record.get("on") or {}, "on ") if run.record else {} for run in runs]
    names = dict.fromkeys(name for options in known for name in options if name.split(".")[0] not in WORDS)
    told = [options for options in known if options]
    differ = [name for name in names if len({repr(options.get(name)) for options in told}) > 1]
    # Fields of parts of different types are not options of each other: the types tell it all.
    parts = tuple(name.removesuffix("type") for name in differ if name.endswith(".type"))
    everywhere = lambda name: all(name in options for options in told)
    differ = [name for name in differ if everywhere(name) or not (parts and name.startswith(parts))]
    return {name: [shown(options[name]) if name in options else "–" for options in known] for name in differ}


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """{"data": {"cache": 1}} → {"data.cache": 1}; parts have types, which are options as well."""
    found = {}
    for name, value in values.items():
        found |= flat(value, f"{before}{name}.") if isinstance(value, Mapping) and value else {f"{before}{name}": value}
    return found


def shown(value: Any) -> str:
    told = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return told if len(told) <= 40 else f"{told[:39]}…"


def scores_of(runs: Sequence[RunResults]) -> Cells:
    cells = {}
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        cells[name] = [cell(run.scores[name]) if name in run.scores else "–" for run in runs]
        if (first := best(name, runs)) is not None:
            cells[name][first] += MARK
    return cells


def is_marked(tables: Mapping[str, Cells]) -> bool:
    return any(cell.endswith(MARK) for row in tables.get("scores", {}).values() for cell in row)


def cell(score: Score) -> str:
    return f"{score.text(score.value).strip()}{f' ({known})' if (known := score.interval_text()) else ''}"


def best(name: str, runs: Sequence[RunResults]) -> int | None:
    """The place of the run whose score is surely better than that of each other run that has it."""
    sign = -1 if LOWER.search(name) else 1
    there = [i for i, run in enumerate(runs) if name in run.scores]
    if len(there) < 2 or NEITHER.search(name):
        return None
    first = max(there, key=lambda i: sign * runs[i].scores[name].value)
    return first if all(better(name, runs[first], runs[i], sign) for i in there if i != first) else None


def better(name: str, one: RunResults, other: RunResults, sign: int) -> bool:
    a, b = one.scores[name], other.scores[name]
    if same_data(one, other) and a.samples and b.samples and a.samples.comparable(b.samples):
        found = a.samples.paired(b.samples)
        return found.low > 0 if sign > 0 else found.high < 0
    if a.interval is None or b.interval is None:
        return False
    return a.interval[0] > b.interval[1] if sign > 0 else a.interval[1] < b.interval[0]


# ---- what is written -------------------------------------------------------------------------------------------------


def text(title: str, names: Sequence[str], cells: Cells) -> str:
    rows = [[title, *names], *([name, *row] for name, row in cells.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(aligned(row[i], width, i) for i, width in enumerate(widths)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def picture(runs: Sequence[RunResults]) -> Image.Image:
    colours = dict(zip([run.name for run in runs], cycle(CURVES)))
    return draw_page(
        "Runs side by side", compared_plots({run.name: run.log for run in runs}, colours), names=[*colours.items()]
    )


def save(path: Path, runs: Sequence[RunResults], tables: Mapping[str, Cells]) -> None:
    kind, names = path.suffix.lower(), [run.name for run in runs]
    if kind == ".json":
        marked = {name: runs[i].name for name in tables.get("scores", {}) if (i := best(name, runs)) is not None}
        values = {
            "runs": {run.name: dict(facts(run)) for run in runs},
            "options": {name: dict(zip(names, row, strict=True)) for name, row in differing(runs).items()},
            "scores": {run.name: {name: score.record() for name, score in run.scores.items()} for run in runs},
            "best": marked,
        }
        told = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        write_atomically(path, lambda file: file.write_text(told, encoding="utf-8"))
    elif kind in (".html", ".htm"):
        heads = [
            html.table([title, *names], [[name, *row] for name, row in cells.items()])
            for title, cells in tables.items()
        ]
        curves = picture(runs)
        shown = html.image(curves, side=max(curves.size), alt="curves of the runs over their steps")
        body = [
            html.tag("h1", "Runs side by side"),
            *heads,
            html.tag("p", MEANING) if is_marked(tables) else None,
            shown,
        ]
        html.write_page(path, html.page("Runs side by side", *body))
    else:
        write_sheet(picture(runs), str(path))
        return
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command_line(main)
