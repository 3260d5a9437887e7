"""The report on a model: scores, curves, samples, attention and pitfalls on one page, which requests nothing.

python -m minivlm.evaluate MODEL --data DIR [--predictions FILE] [--diagnose] --report report.html
python -m minivlm.evaluate --predictions FILE --references FILE_OR_DIR --report report.html
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minivlm.datasets.source import source_of
from minivlm.evaluate.diagnose.pitfall import Pitfall
from minivlm.evaluate.images_of import Images, images_named
from minivlm.evaluate.predictions import Prediction
from minivlm.evaluate.report.made import made
from minivlm.evaluate.report.samples import SIDE, chosen, sample_section
from minivlm.evaluate.report.scores import by_kind, pitfall_section, score_section
from minivlm.evaluate.report.shown import Shown, show
from minivlm.evaluate.report.training import training_section
from minivlm.html import Content, check_page, markup, page, tag, write_page
from minivlm.metrics import Score

__all__ = ["Report", "add_options", "check", "write_report"]

WORLD = "data/shapes"  # where --data points if it is not given


@dataclass
class Report:
    """What a report is written from. columns: what a model is called → its scores; of one model alone it is called "".
    predictions: what it generated, judged; pitfalls: None where nobody asked for them. images: the folder of the images."""

    columns: Mapping[str, Mapping[str, Score]]
    argv: Sequence[str]
    name: str
    data: str | os.PathLike
    images: str | os.PathLike | None = None
    predictions: Sequence[Prediction] = ()
    pitfalls: Sequence[Pitfall] | None = None
    shown: Shown = field(default_factory=Shown)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE.html", help="write all this and more to one page for a browser")


def check(options: Namespace) -> None:
    """UserError, before the work, where the page cannot be written."""
    if options.report is not None:
        check_page(options.report, "--report")


def run(
    options: Namespace,
    argv: Sequence[str],
    columns: Mapping[str, Mapping[str, Score]],
    predictions: Sequence[Prediction],
    pitfalls: Sequence[Pitfall] | None,
    model=None,
    processor=None,
    how=None,
) -> None:
    """Write the report that --report asks for."""
    files = options.predictions or []
    if options.model is None:
        data, images = " and ".join(map(str, options.references)), next(filter(os.path.isdir, options.references), None)
        if images is None and options.data != WORLD:
            images = options.data
    else:
        data = images = source_of(options.data, options)
    name = options.model or " and ".join(map(str, files))
    write_report(
        options.report, Report(columns, argv, name, data, images, predictions, pitfalls), model, processor, how
    )
    print(f"wrote {options.report}, {Path(options.report).stat().st_size / 1e6:.1f} MB")


def write_report(path: str, report: Report, model=None, processor=None, how=None) -> None:
    """model: None where there are predictions alone. how: see `minivlm.evaluate.compare.How`."""
    groups = grouped(report.predictions)
    images = images_for(report, groups)
    if model is not None:
        report.shown = show(model, processor, report.data, how, report.predictions, images)
        groups |= {name: some for name, some in report.shown.predictions.items() if some}
        images = {**images, **report.shown.images}
    if not report.shown.attention and not report.shown.without_attention:
        report.shown.without_attention = "there is no model, but predictions alone"
    write_page(path, page(f"{report.name} on {report.data}", body(report, groups, images, model)))


def grouped(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    groups = {
        "Answers": [p for p in predictions if not p.is_caption],
        "Captions": [p for p in predictions if p.is_caption],
    }
    return {name: some for name, some in groups.items() if some}


def images_for(report: Report, groups: Mapping[str, Sequence[Prediction]]) -> Images:
    """Of the predictions that are shown."""
    names = [p.image for some in groups.values() for p in chosen(some)]
    if not names or report.images is None or not Path(report.images).is_dir():
        return {}
    return images_named(names, report.images, side=2 * SIDE)


def body(report: Report, groups: Mapping[str, Sequence[Prediction]], images: Images, model) -> Content:
    """All sections, with links to them in front."""
    sections: dict[str, Content] = {
        "Scores": score_section(report.columns),
        "Training": training_section(report.name),
        "By kind": [by_kind(name, some) for name, some in groups.items()],
        "Samples": [sample_section(i, *group, images, report.images) for i, group in enumerate(groups.items())]
        + report.shown.strips,
        "Attention": report.shown.attention or tag("p", f"Left out: {report.shown.without_attention}", class_="note"),
        "Pitfalls": pitfall_section(report.pitfalls, model is not None),
        "How it was made": made(report.argv, report.name, report.data, model),
    }
    if not sections["Samples"]:
        sections["Samples"] = tag("p", f"Left out: {report.shown.without_samples}", class_="note")
    sections = {name: found for name, content in sections.items() if (found := markup(content))}
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = tag("nav", [tag("a", name, href=f"#{ids[name]}") for name in sections], aria_label="sections")
    heading = [tag("h1", f"{report.name} on {report.data}"), links]
    return heading + [tag("section", tag("h2", name, id=ids[name]), content) for name, content in sections.items()]
