"""Programs of COCO's caption evaluation that are Java: found in the package pycocoevalcap, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from minivlm.errors import UserError


class Unavailable(UserError):
    """A score that cannot be had here, and what to install for it."""


def program_folder(score: str, folder: str, *files: str) -> Path:
    """The folder of a program of the package. Unavailable where Java, the package or one of its files is missing."""
    package = find_spec("pycocoevalcap")
    wanting = []
    if package is None or not package.submodule_search_locations:
        wanting.append("the package pycocoevalcap (pip install pycocoevalcap)")
    if shutil.which("java") is None:
        wanting.append("Java (Debian: apt install default-jre-headless)")
    if wanting:
        raise Unavailable(f"{score} is left out: it needs {' and '.join(wanting)}.")
    path = Path(next(iter(package.submodule_search_locations))) / folder
    for name in files:
        if not (path / name).is_file():
            raise Unavailable(f"{score} is left out: pycocoevalcap has no {folder}/{name} here; install it again.")
    return path


def run_java(score: str, folder: str, jar: str, arguments: list[str], text: str = "") -> str:
    """What the program answers to a text. Unavailable where it is missing, or fails."""
    path = program_folder(score, folder, jar)
    try:
        done = subprocess.run(["java", *arguments], cwd=path, input=text.encode(), capture_output=True, check=True)
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise Unavailable(f"{score} is left out: its Java program failed ({said[0][:200]}).") from None
    except OSError as error:
        raise Unavailable(f"{score} is left out: Java cannot be run ({error.strerror or error}).") from None
    return done.stdout.decode(errors="replace")
