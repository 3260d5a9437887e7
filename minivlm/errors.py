"""Errors that a user can mend, each one sentence: what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """A mistake in the input rather than in the program. Command lines print its text alone and exit with 2."""


class Note(UserWarning):
    """A warning for the user about what is done all the same. Command lines print its text alone."""


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean a or b?' for the known names closest to `word`, or all of them where none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(close)}?"
    return f" There are: {', '.join(sorted(known))}."


def as_started(text: str) -> str:
    """The text, with its commands as they work where `minivlm`, installed, started this program: `python sample.py chat`
    becomes `minivlm sample chat`."""
    program = Path(sys.argv[0])
    module = program.name == "__main__.py" and program.parent.name == "minivlm"
    if not module and program.stem != "minivlm":
        return text
    text = re.sub(r"(torchrun \S+) train\.py", r"\1 -m minivlm train", text)
    commands = r"python (?:-m minivlm\.(?:datasets\.)?(\w+)|(train|sample)\.py)"
    return re.sub(commands, rf"{'python -m minivlm' if module else 'minivlm'} \1\2", text)


def run_command_line(main: Callable[[list[str]], None]) -> None:
    """Call main(argv); a UserError becomes one line on stderr and exit code 2, Ctrl-C becomes exit code 130. A `Note`
    is one line as well, but ends nothing.

    A sign that the terminal, or the file that the output goes to, has no room for is written as \\u2192.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with notes_in_a_line():
            main(sys.argv[1:])
    except UserError as error:
        print(f"error: {as_started(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `sample.py … | head` closed the pipe: nothing is wrong
        sys.stderr.close()
        sys.exit(0)


@contextmanager
def notes_in_a_line() -> Iterator[None]:
    """Inside, a `Note` is a line on stderr, without the place in the code that Python puts around a warning."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(message, category, *where):
            if issubclass(category, Note):
                print(f"note: {as_started(str(message))}", file=sys.stderr)
            else:
                show(message, category, *where)

        warnings.showwarning = tell
        yield
