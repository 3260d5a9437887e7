"""A task is shown rather than described: a model reads examples in its prompt, and goes on as they do.

    <image>this is a dax.<image>this is a wug.<image>this is a   ── the likeliest candidate, or greedy generation ─→ dax
       │                    │                    └ the query
       └────────────────────┴ the examples

Alayrac et al. 2022, "Flamingo", on task adaptation with few-shot in-context learning: open answers are generated,
closed ones compared by their log-likelihood.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from minivlm.conversation import IGNORED, PLACEHOLDER, shared
from minivlm.datasets.continuation import pad
from minivlm.datasets.shapes.shots import END, LEAD
from minivlm.errors import UserError
from minivlm.layers.tower import ImageFeatures
from minivlm.special_tokens import Markup, Text
from minivlm.tasks.features import inference
from minivlm.tasks.generate import (
    Picture,
    beginning,
    check_answerer,
    has_encoder,
    language_config,
    model_inputs,
    places,
    say,
    until_stop,
)

CHUNK = "<|endofchunk|>"  # OpenFlamingo's models have this behind it


class Example(NamedTuple):
    """A picture and what is said about it. Of the query, how that begins."""

    image: Picture
    text: str


class Prompt(NamedTuple):
    images: Sequence[Picture]
    text: Text  # with an <image> mark for each


def few_shot(
    model,
    processor,
    examples: Sequence[tuple[Picture, str]],
    query: tuple[Picture, str],
    *,
    candidates: Sequence[str] | None = None,
    **options,
) -> str:
    """How the query's text goes on, after examples (picture, text) of how it does.

    candidates: one of these; None: any words, for which there are the options of `generation.Options`.
    UserError: a model that cannot read pictures between words, a text with an <image> mark of its own, a candidate that
    no example shows, and examples that do not fit the context.
    """
    check_reader(model, processor)
    examples, query = [Example(*example) for example in examples], Example(*query)
    check_texts([*examples, query])
    prompt = few_shot_prompt(examples, query, processor)
    if candidates is not None:
        check_candidates(candidates, examples)
        check_room(examples, query, candidates, model, processor)
        return likeliest(model, processor, [prompt], [candidates])[0]
    check_room(examples, query, options.get("max_new_tokens", 1), model, processor)
    options = {"stop": (END,), **options}
    [said] = say([beginning(prompt.text, model, processor)], [prompt.images], model, processor, options)
    return until_stop(processor.decode([said])[0], options["stop"])


def few_shot_prompt(examples: Sequence[Example], query: Example, processor) -> Prompt:
    known = processor.tokenizer.token_to_id(CHUNK) is not None
    text = write_prompt([text for _, text in examples], query.text, CHUNK if known else "")
    return Prompt([image for image, _ in [*examples, query]], text)


def write_prompt(texts: Sequence[str], query: str, end: str = "") -> list[str]:
    """Each text behind its picture's mark; those of the examples are ended, with the token `end` as well."""
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
    not preferred because another one begins with it. Each picture is looked at once."""
    scores = []
    with inference(model):
        for i in range(0, len(prompts), batch_size):
            scores += score_batch(model, processor, prompts[i : i + batch_size], candidates[i : i + batch_size])
    return scores


def score_batch(model, processor, prompts: Sequence[Prompt], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
    pixels = processor.images([image for prompt in prompts for image in prompt.images])
    features = model.image_features(pixels.to(model.device, model.dtype))
    features = features.unflatten(0, (len(pixels), -1))  # (M, views, N, C)
    ends = torch.tensor([len(prompt.images) for prompt in prompts]).cumsum(dim=0).tolist()
    rows, said, seen = [], [], []
    tokens_of = answers_apart if has_encoder(model) else candidate_tokens
    for prompt, some, end in zip(prompts, candidates, ends, strict=True):
        for read, answer in tokens_of(prompt, some, model, processor):
            rows.append(read)
            said.append(answer)
            seen += range(end - len(prompt.images), end)
    features = features[torch.tensor(seen)].flatten(0, 1)
    if has_encoder(model):
        known = log_likelihoods_apart(rows, said, features, model, processor)
    else:
        _, tokens, mask = model_inputs(
            [read + answer for read, answer in zip(rows, said, strict=True)], None, model, processor
        )
        output = model(ImageFeatures(features), tokens, mask)
        known = log_likelihoods(output, tokens, map(len, rows), mask.sum(dim=1).tolist())
    return [[next(known) for _ in some] for some in candidates]


def log_likelihoods_apart(rows: Sequence[list[int]], said: Sequence[list[int]], features: Tensor, model, processor):
    """Of what a decoder says (`said`), given what its encoder has read (`rows`): a float a row."""
    _, tokens, mask = model_inputs(rows, None, model, processor)
    labels = pad(said, IGNORED).to(model.device)
    output = model(ImageFeatures(features), tokens, mask, labels)
    for hidden, row in zip(output.hidden, said, strict=True):
        log_p = output.head(hidden[: len(row)]).float().log_softmax(dim=-1)  # (n, V)
        yield log_p.gather(1, torch.tensor(row, device=log_p.device)[:, None]).sum().item()


def answers_apart(prompt: Prompt, candidates: Sequence[str], model, processor) -> list[tuple[list[int], list[int]]]:
    """For each candidate, the prompt, which an encoder reads, and its own tokens, a text that the decoder says."""
    starts = int(processor.start_token is not None)
    answers = processor.encode([f"{text.strip()}{END}" for text in candidates])
    return [(beginning(prompt.text, model, processor), answer[starts:]) for answer in answers]


def log_likelihoods(output, tokens: Tensor, starts: Iterable[int], ends: Iterable[int]):
    """Of each row's tokens from its start to its end, given those before: a float a row."""
    for hidden, row, start, end in zip(output.hidden, tokens, starts, ends, strict=True):
        log_p = output.head(hidden[start - 1 : end - 1]).float().log_softmax(dim=-1)  # (n, V)
        yield log_p.gather(1, row[start:end, None]).sum().item()


def candidate_tokens(prompt: Prompt, candidates: Sequence[str], model, processor) -> list[tuple[list[int], list[int]]]:
    """For each candidate, the tokens that it is preceded by, the same for all, and its own with those of its end."""
    alone = beginning(prompt.text, model, processor)
    begun = processor.pieces(prompt.text)
    whole = [beginning([*begun, f" {text.strip()}{END}"], model, processor) for text in candidates]
    seam = min(shared(alone, row) for row in whole)  # some tokenisers join the prompt's last word with what follows
    return [(row[:seam], row[seam:]) for row in whole]


# ---- what can be asked -----------------------------------------------------------------------------------------------


def check_reader(model, processor) -> None:
    """UserError unless its pictures stand between its words."""
    check_answerer(model, processor, images=1)
    if places(model) is None or not hasattr(model, "image_features"):
        raise UserError(
            f"{type(model).__name__} sees its pictures in front of all words, so it cannot be shown examples: few-shot "
            "needs a model whose pictures stand in the text, as Flamingo."
        )


def pair_up(words: Sequence[str]) -> list[tuple[str, str]]:
    """[picture, text, picture, text] → [(picture, text), …]; UserError for a picture without a text."""
    if len(words) % 2:
        raise UserError(
            f"an example is a picture and its text, but {words[-1]!r} stands alone: give a text for each picture."
        )
    return list(zip(words[::2], words[1::2], strict=True))


def check_texts(examples: Sequence[Example]) -> None:
    """The last of them is the query."""
    for number, (_, text) in enumerate(examples, 1):
        name = "the query" if number == len(examples) else f"example {number}"
        if not text.strip():
            raise UserError(f"the text of {name} is empty; say what the picture shows, or how that begins.")
        if PLACEHOLDER in text:
            raise UserError(
                f"the text of {name} has an {PLACEHOLDER} mark, but its one picture stands in front of it: leave it out."
            )


def check_candidates(candidates: Sequence[str], examples: Sequence[Example]) -> None:
    """UserError for an answer that cannot be learnt from the examples, if there are any."""
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
    context = language_config(model).context
    length = lambda n: len(beginning(few_shot_prompt(examples[:n], query, processor).text, model, processor))
    if length(len(examples)) + room <= context:
        return
    most = max((n for n in range(len(examples)) if length(n) + room <= context), default=None)
    fit = "not even the query alone fits" if most is None else f"at most {most} of these examples fit"
    raise UserError(
        f"{len(examples)} examples and the query have {length(len(examples))} tokens and the answer takes {room}, but "
        f"the context has {context}: {fit}."
    )
