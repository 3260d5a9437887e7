"""Conversations → what a published chat template writes. It is rendered by `render_template`, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from minivlm.chat_templates import Turn
from minivlm.special_tokens import PLACEHOLDER

SECONDS, LONGEST = 10, 1 << 17  # of rendering all probes; characters of a template

Render = Callable[[Sequence[Sequence[Turn]]], list[str | None]]  # conversations → what is written, None: it is refused


def renderer(source: str, tokens: dict[str, str], image_token: str = PLACEHOLDER) -> Render:
    """Conversations, each up to the assistant's next word if the user has the last one → what the template writes."""

    def render(conversations: Sequence[Sequence[Turn]]) -> list[str | None]:
        strings = [probe(turns, lambda turn: turn.text) for turns in conversations]
        parts = [probe(turns, typed) for turns in conversations]
        answers = [
            text and text.replace(image_token, PLACEHOLDER)
            for text in run(source, json.dumps(tokens), json.dumps(strings + parts))
        ]
        pairs = zip(answers[: len(strings)], answers[len(strings) :], conversations, strict=True)
        return [one if one is not None and turns[-1].text.strip() in one else other for one, other, turns in pairs]

    return render


def probe(turns: Sequence[Turn], content: Callable[[Turn], Any]) -> dict[str, Any]:
    messages = [{"role": turn.role, "content": content(turn)} for turn in turns]
    return {"messages": messages, "add_generation_prompt": turns[-1].role == "user"}


def typed(turn: Turn) -> list[dict[str, str]]:
    """A turn as templates of vision-language models want it: images first, then the text."""
    images = [{"type": "image"}] * turn.text.count(PLACEHOLDER)
    return [*images, {"type": "text", "text": turn.text.replace(f"{PLACEHOLDER}\n", "").replace(PLACEHOLDER, "")}]


@lru_cache(maxsize=16)
def run(source: str, tokens: str, probes: str) -> list[str | None]:
    """ValueError where the template is none, or does not come to an end."""
    if len(source) > LONGEST:
        raise ValueError("it is too long")
    import jinja2  # comes with PyTorch

    given = {"source": source, "tokens": json.loads(tokens), "probes": json.loads(probes)}
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT", "HOME", "LANG")}
    script, where = Path(__file__).with_name("render_template.py"), Path(jinja2.__file__).parent.parent
    command = [sys.executable, "-I", "-X", "utf8", str(script), str(where)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(given),
            capture_output=True,
            encoding="utf-8",
            timeout=SECONDS,
            env=environment,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"it could not be rendered ({type(error).__name__})") from None
    if done.returncode:
        raise ValueError("it could not be rendered")
    return json.loads(done.stdout)
