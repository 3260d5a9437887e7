"""A published chat template ⇄ ours: it is rendered with known texts, and what stands between these is how turns are written.

    chat_template.jinja ── rendered by a process of its own ──→ "<|user|>\\nQuser</s>\\n<|assistant|>\\n" ──→ `ChatTemplate`

A template is a program, so it runs where it can do no harm: in Jinja's sandbox, with little memory and little time.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivlm.chat_templates import CHOICES, TEMPLATES, ChatTemplate, Turn
from minivlm.errors import Note, UserError
from minivlm.files import read_json, read_text
from minivlm.pretrained.template_sandbox import Render, renderer
from minivlm.special_tokens import PLACEHOLDER, TAG, Markup

if TYPE_CHECKING:
    from minivlm.processor import Processor

# ---- finding it ------------------------------------------------------------------------------------------------------

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")  # that a template may ask for


def with_chat_template(processor: Processor, directory: Path, *, framed: bool = False) -> Processor:
    """The processor with the chat template that was published in `directory`, if there is one.

    framed: a start token is put before a prompt that does not begin with one, as LLaVA's processor does.
    """
    if processor.source is None or (source := find_source(directory)) is None:
        return processor
    return with_template(processor, source, special_tokens(directory), framed=framed)


def with_template(processor: Processor, source: str, tokens: Mapping[str, str], *, framed: bool = False) -> Processor:
    """The processor with the chat template of this Jinja source, which may ask for these tokens (bos_token …)."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    try:
        templates = derive(renderer(source, tokens, processor.config.image_token), added, tokens)
    except ValueError:  # it writes turns in another way than ours
        return type(processor)(tokenizer, replace(processor.config, chat="unknown"))
    meant = [one for template in templates for one in starts(template, processor, framed=framed)]
    fields = next(filter(None, map(named, meant)), {"chat": "own", "chat_format": meant[0]})
    return type(processor)(tokenizer, replace(processor.config, **fields))


def starts(template: ChatTemplate, processor: Processor, *, framed: bool) -> list[ChatTemplate]:
    """The template, and the same with the tokeniser's own start token, if that comes to the same."""
    same = replace(template, start=None)
    if framed and template.start == "":
        return [same]
    in_front = [] if processor.start_token is None else [processor.start_token]
    alike = processor.ids([Markup(template.start), "a"]) == in_front + processor.ids("a")
    return [same, template] if alike else [template]


def find_source(directory: Path) -> str | None:
    """The template as transformers finds it: in a file of its own, or among the settings of processor or tokeniser."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return read_text(path)
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = directory / name
        given = read_json(path).get("chat_template") if path.exists() else None
        if isinstance(given, list):  # several by name
            given = {one.get("name"): one.get("template") for one in given if isinstance(one, dict)}
        if isinstance(given, dict):
            given = given.get("default")
        if isinstance(given, str):
            return given
        if given is not None:
            raise UserError(f"{path} has a chat_template that is no text.")
    return None


def special_tokens(directory: Path) -> dict[str, str]:
    tokens = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = directory / name
        values = read_json(path) if path.exists() else {}
        for key in SPECIAL:
            token = values.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                tokens[key] = token
    return tokens


# ---- understanding it ------------------------------------------------------------------------------------------------

S, U, A, V, B = "Qsystem", "Quser", "Qanswer", "Qsecond", "Qlast"
SYSTEM, USER, ANSWER, SECOND, LAST = (
    Turn(role, text)
    for role, text in zip(("system", "user", "assistant", "user", "assistant"), (S, U, A, V, B), strict=True)
)
PROBES = (  # in the order in which `derive` asks for them; the last ones only to see that it was understood
    (USER,),
    (USER, ANSWER, SECOND),
    (USER, ANSWER, SECOND, LAST),
    (SYSTEM, USER),
    (Turn("user", f"  {U} \n"),),
    (Turn("user", f"{PLACEHOLDER}\n{U}"),),
    (USER, ANSWER, SECOND, LAST, Turn("user", "and now?")),
    (SYSTEM, USER, ANSWER, SECOND),
    (Turn("system", "You are terse."), Turn("user", "why is it red?\nand round?")),
)


def derive(render: Render, added: Collection[str], tokens: Mapping[str, str]) -> list[ChatTemplate]:
    """Templates that write what `render` does. ValueError: there is none.

    added: the tokens that stand beside the words, one of which ends an answer. tokens: bos_token and eos_token.
    """
    first, second, whole, with_system, padded, with_image, *_ = render(PROBES)
    opening, prompt = cut(first, U)
    _, history, between, _ = cut(second, U, A, V)
    closing = cut(whole, U, A, V, B)[-1]
    check(history.startswith(prompt))
    tail, end, rest = answer_end(between, closing, added)
    before_user = common_suffix(rest, opening)
    start = opening.removesuffix(before_user)
    if start not in ("", tokens.get("bos_token")):  # there is a system turn by default, which may end as an answer does
        before_user = before_user.lstrip()
        start = tokens.get("bos_token", "") if opening.startswith(tokens.get("bos_token", "")) else ""
    template = ChatTemplate(
        system=None,
        user=f"{before_user}{{}}{prompt}",
        answer=f"{history.removeprefix(prompt)}{{}}{tail}",
        end=end or tokens.get("eos_token"),
        after=rest.removesuffix(before_user),
        start=opening.removesuffix(before_user),
        trim=padded == f"{opening}{U}{prompt}",
        end_is_read=end is not None,
    )
    if with_image == f"{opening}{PLACEHOLDER}{U}{prompt}":
        template = replace(template, user=f"{before_user}{{pictures}}{{}}{prompt}")
    written = dict(zip(PROBES, render(PROBES), strict=True))
    forms = system_forms(template, opening, with_system, start) if once(with_system, S, U) else []
    whole_forms = [form for form in (*forms, template) if follows(form, written)]
    check(bool(whole_forms))
    return whole_forms


def answer_end(between: str, closing: str, added: Collection[str]) -> tuple[str, str | None, str]:
    """The text behind an answer: up to its end token, that token, and the rest up to the user's next text."""
    common = common_prefix(closing, between)
    found = [(common.index(token), -len(token), token) for token in added if TAG.fullmatch(token) and token in common]
    if not found:
        return "", None, between
    at, _, end = min(found)
    return between[:at], end, between[at + len(end) :]


def system_forms(template: ChatTemplate, opening: str, with_system: str, start: str) -> Iterator[ChatTemplate]:
    """Yields what the text around the system's may mean: a turn of its own, or a part of the user's."""
    before, behind, _ = cut(with_system, S, U)
    before_user = template.user.partition("{")[0]
    for opened in dict.fromkeys((start, "", template.start)):
        if not before.startswith(opened) or not opening.startswith(opened):
            continue
        lead, standing = before.removeprefix(opened), opening.removeprefix(opened)
        if behind.endswith(before_user):
            form = replace(template, start=opened, system=f"{lead}{{}}{behind.removesuffix(before_user)}")
            default = standing.removeprefix(lead).removesuffix(behind)
            yield form if standing == before_user else replace(form, default_system=default)
        if lead.startswith(before_user):
            inside = f"{lead.removeprefix(before_user)}{{}}{behind}"
            yield replace(template, start=opened, system=inside, in_user=True)


def follows(template: ChatTemplate, written: Mapping[Sequence[Turn], str | None]) -> bool:
    """Does it write what is written? What follows the last answer does not count."""
    for turns, wanted in written.items():
        if turns[0].role == "system" and template.system is None:
            continue
        ours = write(template, turns)
        if wanted != ours and not (wanted and turns[-1].role == "assistant" and wanted.startswith(ours)):
            return False
    return True


def write(template: ChatTemplate, turns: Sequence[Turn]) -> str:
    """The conversation as one string."""
    if template.default_system is not None and turns[0].role != "system":
        turns = [Turn("system", template.default_system), *turns]
    said = [template.start or ""]
    for turn, pieces in template.segments(turns):
        said += pieces
        if turn.role == "assistant" and template.end_is_read:
            said.append(template.end or "")
    return "".join(said)


def named(template: ChatTemplate) -> dict[str, Any] | None:
    """The fields of `ProcessorConfig` for a template that is known by name, whatever its system says."""
    system = template.default_system
    own = replace(template, default_system=None)
    name = next((name for name in CHOICES if alike(TEMPLATES[name], own)), None)
    return None if name is None or system == "" else {"chat": name, "system": system}


def alike(one: ChatTemplate, other: ChatTemplate) -> bool:
    """Do both write the same?"""
    fields = lambda t: (t.start, t.trim, t.end, t.end_is_read, t.system is None)
    probes = [turns for turns in PROBES if turns[0].role != "system" or one.system is not None]
    return fields(one) == fields(other) and all(write(one, turns) == write(other, turns) for turns in probes)


def once(text: str | None, *words: str) -> bool:
    """Has the text each of the words once, in this order?"""
    return text is not None and re.findall("|".join(words), text) == [*words]


def cut(text: str | None, *words: str) -> list[str]:
    """The pieces of the text between the words."""
    check(once(text, *words))
    return re.split("|".join(words), text)


def common_prefix(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def common_suffix(a: str, b: str) -> str:
    return common_prefix(a[::-1], b[::-1])[::-1]


def check(holds: bool) -> None:
    if not holds:
        raise ValueError("it writes turns in another way than ours")


# ---- writing it ------------------------------------------------------------------------------------------------------


def write_chat_template(processor: Processor) -> dict[str, str]:
    """File name → a template of Jinja that writes conversations as ours does; nothing for a model whose images stand in
    front of all text, and where ours is not known."""
    config = processor.config
    template = config.chat_format if config.chat == "own" else TEMPLATES.get(config.chat)
    if config.chat == "unknown":
        said = "the chat template of this model is not recognised, and not written: copy it from where the model comes from."
        warnings.warn(Note(said), stacklevel=2)
    if processor.source is None or template is None or template.framed or template.caption is not None:
        return {}
    system = template.default_system if config.system is None else config.system or None
    start = template.start
    if start is None:
        start = "" if processor.start_token is None else processor.tokenizer.id_to_token(processor.start_token)
    own_end = None if processor.answer_end is None else processor.tokenizer.id_to_token(processor.answer_end)
    known = template.end is not None and processor.tokenizer.token_to_id(template.end) is not None
    end = (template.end if known else own_end) or ""
    whole = replace(template, start=start, end=end, default_system=system)
    return {"chat_template.jinja": source_of(whole, config.image_token)}


def source_of(template: ChatTemplate, placeholder: str) -> str:
    """The template in Jinja, in one line, since a line's end is a part of what is written."""
    before_user, _, prompt = template.user.partition("{}")
    before_user, images = before_user.replace("{pictures}", ""), "{pictures}" in template.user
    before_answer, _, behind_answer = template.answer.partition("{}")
    text = "words(message['content'])" + ("|trim" if template.trim else "")
    system = "{{ raise_exception('this chat template has no place for a system turn') }}"
    if template.system is not None:
        before, _, behind = template.system.partition("{}")
        system = put(before) + "{{ told" + ("|trim" if template.trim else "") + " }}" + put(behind)
    system = "{% if told is not none %}" + system + "{% endif %}"
    outside, inside = ("", "{% if loop.first %}" + system + "{% endif %}") if template.in_user else (system, "")
    end = put(template.end)
    if not template.end_is_read:
        end = "{% if loop.last %}" + end + "{% endif %}"
    return "".join(
        (
            WORDS.replace("PLACEHOLDER", spelt(placeholder if images else f"{placeholder}\n")),
            "{% if messages[0]['role'] == 'system' %}{% set told = words(messages[0]['content']) %}",
            "{% set rest = messages[1:] %}{% else %}",
            f"{{% set told = {'none' if template.default_system is None else spelt(template.default_system)} %}}",
            "{% set rest = messages %}{% endif %}",
            put(template.start) + outside,
            "{% for message in rest %}{% if message['role'] == 'user' %}",
            "{% if not loop.first %}" + put(template.after) + "{% endif %}",
            put(before_user) + inside + "{{ " + text + " }}" + put(prompt),
            "{% else %}",
            put(before_answer) + "{{ words(message['content'])|trim }}" + put(behind_answer) + end,
            "{% endif %}{% endfor %}",
        )
    )


WORDS = (  # of a turn that is a string, or a list of images and texts
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}"
    "{% for part in content %}{% if part['type'] == 'image' %}{{ PLACEHOLDER }}{% endif %}{% endfor %}"
    "{% for part in content %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endmacro %}"
)


def put(text: str | None) -> str:
    return f"{{{{ {spelt(text)} }}}}" if text else ""


def spelt(text: str) -> str:
    """The text as a string of Jinja."""
    return json.dumps(text, ensure_ascii=False)
