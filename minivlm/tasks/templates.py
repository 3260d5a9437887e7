"""Sentences that a label is put into, for zero-shot classification: sets that have a name, and those of a file.

In a template {} is the label and {a} the label with its article: "a red circle", "an orange star".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from minivlm.errors import UserError, nearest
from minivlm.files import parse_json, read_bytes, read_text

PLAIN = ("{a}",)  # for captions that are nothing but a description, as those of the shapes world
PHOTO = (  # for models trained on web photographs; chosen from the 80 that CLIP's authors published for ImageNet
    "a photo of {a}.",
    "a photo of the {}.",
    "a close-up photo of {a}.",
    "a bright photo of {a}.",
    "a bad photo of {a}.",
    "a cropped photo of {a}.",
    "a photo of one {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
)
# The 80 that Radford et al. 2021 (§3.1.4) averaged for ImageNet, in the published order: "a" stands before a vowel as well.
IMAGENET = """
    a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. | a photo of the hard to see {}. |
    a low resolution photo of the {}. | a rendering of a {}. | graffiti of a {}. | a bad photo of the {}. |
    a cropped photo of the {}. | a tattoo of a {}. | the embroidered {}. | a photo of a hard to see {}. |
    a bright photo of a {}. | a photo of a clean {}. | a photo of a dirty {}. | a dark photo of the {}. |
    a drawing of a {}. | a photo of my {}. | the plastic {}. | a photo of the cool {}. | a close-up photo of a {}. |
    a black and white photo of the {}. | a painting of the {}. | a painting of a {}. | a pixelated photo of the {}. |
    a sculpture of the {}. | a bright photo of the {}. | a cropped photo of a {}. | a plastic {}. |
    a photo of the dirty {}. | a jpeg corrupted photo of a {}. | a blurry photo of the {}. | a photo of the {}. |
    a good photo of the {}. | a rendering of the {}. | a {} in a video game. | a photo of one {}. | a doodle of a {}. |
    a close-up photo of the {}. | a photo of a {}. | the origami {}. | the {} in a video game. | a sketch of a {}. |
    a doodle of the {}. | a origami {}. | a low resolution photo of a {}. | the toy {}. | a rendition of the {}. |
    a photo of the clean {}. | a photo of a large {}. | a rendition of a {}. | a photo of a nice {}. |
    a photo of a weird {}. | a blurry photo of a {}. | a cartoon {}. | art of a {}. | a sketch of the {}. |
    a embroidered {}. | a pixelated photo of a {}. | itap of the {}. | a jpeg corrupted photo of the {}. |
    a good photo of a {}. | a plushie {}. | a photo of the nice {}. | a photo of the small {}. |
    a photo of the weird {}. | the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. |
    a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. | graffiti of the {}. |
    a toy {}. | itap of my {}. | a photo of a cool {}. | a photo of a small {}. | a tattoo of the {}.
"""
TEMPLATE_SETS = {"plain": PLAIN, "photo": PHOTO, "imagenet": tuple(map(str.strip, IMAGENET.split("|")))}
HELP = (
    '"plain" (the label alone), "photo" (nine sentences for photographs), "imagenet" (the 80 of CLIP), a .txt of lines '
    "or a .json with a list of them, or sentences of your own with {} for the label or {a} for the label with a or an"
)


def read_templates(words: Sequence[str]) -> Sequence[str]:
    """The templates that a command line names: a set, a file of them, or the sentences themselves. UserError for none, and for
    one without a place for the label."""
    if len(words) != 1:
        return check(words)
    [word] = words
    if word in TEMPLATE_SETS:
        return TEMPLATE_SETS[word]
    if word.lower().endswith((".txt", ".json")) and "{" not in word:
        return of_file(word)
    if not has_place(word) and not re.search(r"\s", word):
        raise UserError(f"there is no set of templates called {word!r}.{nearest(word, TEMPLATE_SETS)}")
    return check(words)


def of_file(path: str) -> Sequence[str]:
    """Lines, or a list in JSON. As other programs write them, {c} is a place for the label as well."""
    if path.lower().endswith(".json"):
        try:
            found = parse_json(read_bytes(path))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}).") from None
        if not isinstance(found, list) or not all(isinstance(template, str) for template in found):
            raise UserError(f'{path} is no list of templates, ["a photo of {{}}.", …].')
    else:
        found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise UserError(f"{path} holds no template: write one a line, such as 'a photo of {{}}.'.")
    try:
        return check([template.replace("{c}", "{}") for template in found])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def has_place(template: str) -> bool:
    return "{}" in template or "{a}" in template


def check(templates: Sequence[str]) -> Sequence[str]:
    if not templates:
        raise UserError("there is no template to put the labels into; give one, such as '{a}'.")
    for template in templates:
        if not has_place(template):
            raise UserError(
                f"the template {template!r} has no place for the label; write {{}} for it, or {{a}} for a or an and it."
            )
    return templates


def fill(template: str, label: str) -> str:
    """ "a photo of {a}." and "orange star" → "a photo of an orange star." Other braces stay as they are."""
    return template.replace("{a}", with_article(label)).replace("{}", label)


def with_article(label: str) -> str:
    """ "orange star" → "an orange star"; by spelling, so "hour" is missed. A label that has an article keeps it."""
    if re.match(r"(a|an|the)\s", label, re.IGNORECASE):
        return label
    vowel = re.match(r"(?!eu|uni|use|one\b)[aeiou]", label, re.IGNORECASE)  # a unicorn, a one-way street
    return f"{'an' if vowel else 'a'} {label}"
