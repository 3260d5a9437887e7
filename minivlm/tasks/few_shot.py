"""A task is given by examples: a model continues a prompt that holds some.

    <image>this is a dax.<image>this is a wug.<image>this is a   ── the likeliest candidate, or greedy generation ─→ dax
       │                    │                    └ the query
       └────────────────────┴ the examples

Alayrac et al. 2022, "Flamingo", on task adaptation with few-shot in-context learning: open answers are generated,
closed ones compared by their log-likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from minivlm.conversation import IGNORED, PLACEHOLDER, shared
from minivlm.datasets.continuation import pad
from minivlm.datasets.shapes.shots import END, LEAD
from minivlm.errors import UserError
from minivlm.image_preprocessing import Picture
from minivlm.layers.tower import ImageFeatures
from minivlm.processes import each
from minivlm.special_tokens import Markup, Text
from minivlm.tasks.abilities import require_answers
from minivlm.tasks.features import inference
from minivlm.tasks.generate import generate_tokens, model_inputs, prompt_tokens, until_stop

CHUNK = "<|endofchunk|>"  # OpenFlamingo's models have this behind it


class Example(NamedTuple):
    """An image and its text. Of the query, how the text begins."""

    image: Picture
    text: str


class Prompt(NamedTuple):
    images: Sequence[Picture]
    text: Text  # with an <image> for each


def few_shot(
    model,
    processor,
    examples: Sequence[tuple[Picture, str]],
    query: tuple[Picture, str],
    *,
    candidates: Sequence[str] | None = None,
    **options,
) -> str:
    """Continue the text of the query (image, text) after examples (image, text).

    candidates: the answer is one of these; None: any text, generated with the options of `generation.Options`.
    UserError: a model whose images have no place in a text, a text with an <image> of its own, a candidate that no example
    has, and examples that do not fit the context.
    """
    return few_shot_all(model, processor, examples, [query], candidates=candidates, **options)[0]


def few_shot_all(
    model,
    processor,
    examples: Sequence[tuple[Picture, str]],
    queries: Sequence[tuple[Picture, str]],
    *,
    candidates: Sequence[str] | None = None,
    **options,
) -> list[str]:
    """`few_shot` for a batch of queries after the same examples."""
    require_answers(model, processor, images=1, ability="few-shot")
    examples, queries = [Example(*example) for example in examples], [Example(*query) for query in queries]
    if candidates is not None:
        check_candidates(candidates, examples)
    for query in queries:
        check_texts([*examples, query])
        check_room(examples, query, candidates or options.get("max_new_tokens", 1), model, processor)
    prompts = [few_shot_prompt(examples, query, processor) for query in queries]
    if candidates is not None:
        return likeliest(model, processor, prompts, [candidates] * len(prompts))
    options = {"stop": (END,), **options}
    tokens = [prompt_tokens(prompt.text, model, processor) for prompt in prompts]
    rows = generate_tokens(tokens, [prompt.images for prompt in prompts], model, processor, options)
    return [until_stop(text, options["stop"]) for text in processor.decode(rows)]


def few_shot_prompt(examples: Sequence[Example], query: Example, processor) -> Prompt:
    known = processor.tokenizer.token_to_id(CHUNK) is not None
    text = write_prompt([text for _, text in examples], query.text, CHUNK if known else "")
    return Prompt([image for image, _ in [*examples, query]], text)


def write_prompt(texts: Sequence[str], query: str, end: str = "") -> list[str]:
    """Each text behind its <image>; those of the examples are ended, with the token `end` as well."""
    examples = [[Markup(PLACEHOLDER), f"{text.strip().removesuffix(END)}{END}", Markup(end)] for text in texts]
    return [*chain.from_iterable(examples), Markup(PLACEHOLDER), query.strip()]


def shot_prompt(labels: Sequence[str], lead: str = LEAD) -> str:
    """["dax", "wug"] → "<image>this is a dax.<image>this is a wug.<image>this is a\""""
    return "".join(write_prompt([f"{lead} {label}" for label in labels], lead))


# ---- how likely is a candidate? --------------------------------------------------------------------------------------


def likeliest(model, processor, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[str]:
    """The likeliest of each prompt's candidates."""
    scores = score(model, processor, prompts, candidates)
    return [max(zip(ours, some, strict=True))[1] for ours, some in zip(scores, candidates, strict=True)]


def score(
    model, processor, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]], *, batch_size: int = 32
) -> list[list[float]]:
    """log p of each candidate as what follows its prompt: one list a prompt. Its end counts as well, so that a word is
    not preferred because another one begins with it. The features of each image are computed once."""
    some = lambda i: score_batch(model, processor, prompts[i : i + batch_size], candidates[i : i + batch_size])
    with inference(model):
        return [*chain.from_iterable(each(some, range(0, len(prompts), batch_size)))]


def score_batch(model, processor, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
    pixels = processor.images([image for prompt in prompts for image in prompt.images])
    features = model.image_features(pixels.to(model.device, model.dtype))
    features = features.unflatten(0, (len(pixels), -1))  # (M, views, N, C)
    ends = torch.tensor([len(prompt.images) for prompt in prompts]).cumsum(dim=0).tolist()
    rows, images = [], []  # a row for each candidate: the tokens before it, and its own
    split = prompt_and_answer if model.continues_prompt else encoder_and_decoder_text
    for prompt, some, end in zip(prompts, candidates, ends, strict=True):
        rows += (pairs := split(prompt, some, model, processor))
        images += [*range(end - len(prompt.images), end)] * len(pairs)
    features = features[torch.tensor(images)].flatten(0, 1)
    known = iter(log_likelihoods(rows, ImageFeatures(features), model, processor))
    return [[next(known) for _ in some] for some in candidates]


def log_likelihoods(
    rows: Sequence[tuple[list[int], list[int]]], images: ImageFeatures, model, processor
) -> Iterator[float]:
    """Of the second tokens of each row, given the first."""
    before, answers = zip(*rows, strict=True)
    if model.continues_prompt:
        _, tokens, mask = model_inputs([a + b for a, b in rows], None, model, processor)
        output, starts = model(images, tokens, mask), [len(some) - 1 for some in before]
    else:
        _, tokens, mask = model_inputs(before, None, model, processor)
        output, starts = model(images, tokens, mask, pad(answers, IGNORED).to(model.device)), [0] * len(rows)
    for hidden, answer, start in zip(output.hidden, answers, starts, strict=True):
        log_p = output.head(hidden[start : start + len(answer)]).float().log_softmax(dim=-1)  # (n, V)
        yield log_p.gather(1, torch.tensor(answer, device=log_p.device)[:, None]).sum().item()


def encoder_and_decoder_text(
    prompt: Prompt, candidates: Sequence[str], model, processor
) -> list[tuple[list[int], list[int]]]:
    """For each candidate, the prompt, a text for the encoder, and its own tokens, a text that the decoder generates."""
    starts = int(processor.start_token is not None)
    answers = processor.encode([f"{text.strip()}{END}" for text in candidates])
    return [(prompt_tokens(prompt.text, model, processor), answer[starts:]) for answer in answers]


def prompt_and_answer(prompt: Prompt, candidates: Sequence[str], model, processor) -> list[tuple[list[int], list[int]]]:
    """For each candidate, the tokens before it, the same for all, and its own with those of its end."""
    alone = prompt_tokens(prompt.text, model, processor)
    begun = processor.pieces(prompt.text)
    whole = [prompt_tokens([*begun, f" {text.strip()}{END}"], model, processor) for text in candidates]
    seam = min(shared(alone, row) for row in whole)  # some tokenisers join the prompt's last word with what follows
    return [(row[:seam], row[seam:]) for row in whole]


# ---- what can be asked -----------------------------------------------------------------------------------------------


def pair_up(words: Sequence[str]) -> list[tuple[str, str]]:
    """[image, text, image, text] → [(image, text), …]; UserError for an image without a text."""
    if len(words) % 2:
        raise UserError(
            f"an example is an image and its text, but {words[-1]!r} stands alone: give a text for each image."
        )
    return list(zip(words[::2], words[1::2], strict=True))


def check_texts(examples: Sequence[Example]) -> None:
    """The last of them is the query."""
    for number, (_, text) in enumerate(examples, 1):
        name = "the query" if number == len(examples) else f"example {number}"
        if not text.strip():
            raise UserError(f"the text of {name} is empty; say what the image shows, or how that begins.")
        if PLACEHOLDER in text:
            raise UserError(
                f"the text of {name} has an {PLACEHOLDER}, but its one image stands in front of it: leave it out."
            )


def check_candidates(candidates: Sequence[str], examples: Sequence[Example]) -> None:
    """UserError for an answer that no example has, if there are any."""
    if len(candidates) < 2:
        raise UserError(f"there are at least two candidates to choose from, not {len(candidates)}.")
    for candidate in candidates:
        ends = [text.strip().removesuffix(END).endswith(candidate.strip()) for _, text in examples]
        if examples and not any(ends):
            raise UserError(
                f"the answer {candidate!r} is not among the examples: none of their texts ends with it, so give one "
                "that does, or leave it out."
            )


def check_room(examples: Sequence[Example], query: Example, answer: int | Sequence[str], model, processor) -> None:
    """UserError, with the number of examples that would fit, if these and the answer do not.

    answer: its number of tokens, or the candidates.
    """
    room = answer if isinstance(answer, int) else max(len(processor.ids([f" {text}{END}"])) for text in answer)
    context = model.language_config.context
    length = lambda n: len(prompt_tokens(few_shot_prompt(examples[:n], query, processor).text, model, processor))
    if length(len(examples)) + room <= context:
        return
    most = max((n for n in range(len(examples)) if length(n) + room <= context), default=None)
    fit = "not even the query alone fits" if most is None else f"at most {most} of these examples fit"
    raise UserError(
        f"{len(examples)} examples and the query have {length(len(examples))} tokens and the answer takes {room}, but "
        f"the context has {context}: {fit}."
    )
