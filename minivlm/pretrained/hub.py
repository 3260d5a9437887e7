"""Finds a model: in a directory here, or by its name on the Hugging Face hub, whose files are downloaded once and kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from minivlm.errors import UserError

TEXT_FILES = ("*.json", "merges.txt", "vocab.txt", "chat_template.jinja")


def locate(source: str | Path, weights_of: Callable[[Path], tuple[str, ...]], *, named_by: Path | None = None) -> Path:
    """The directory of `source`, downloaded if it is a hub id, or a GGUF file.

    weights_of(directory): patterns of the weight files to download, best first. named_by: the directory that names the
    source as what it belongs to. No user asked for that, so it is only taken from where earlier downloads are kept.
    Raises UserError if it is not there. What reads as a path is never looked up on the hub.
    """
    try:
        path = Path(source).expanduser()
        directory, there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, of a user who is not, with a NUL
        raise UserError(
            f"{str(source)[:80]!r} is no name that a directory can have ({type(error).__name__})."
        ) from None
    if directory:
        return path
    if there and path.suffix == ".gguf":
        return path
    if there:
        raise UserError(f"{source} is a file; give the directory that holds it.")
    if not is_hub_id(source):
        train = f"; train it with python train.py {path.name}" if path.parent.name == "out" else ""
        raise UserError(f"{source} does not exist{train}.")
    if named_by is None:
        return download(str(source), weights_of)
    try:
        return download(str(source), weights_of, local_files_only=True)
    except UserError:
        raise UserError(
            f"{named_by} belongs to {source}, which is neither a directory here nor was it downloaded before. Say where it "
            f'is, or that it shall be downloaded: base="{source}" for minivlm.load, --base {source} for sample.py.'
        ) from None


def is_hub_id(source: str | Path) -> bool:
    """openai/clip-vit-base-patch32 is one; out/clip and ./clip are directories that are missing."""
    if isinstance(source, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source):
        return False
    owner, slash, _ = source.partition("/")
    return not slash or (owner not in ("out", "data") and not Path(owner).is_dir())


def download(name: str, weights_of: Callable[[Path], tuple[str, ...]], **options: bool) -> Path:
    """Configs first, since they say which weights are wanted; then the first kind that exists. Shows progress bars."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(TEXT_FILES), **options))
        if "gguf" in name.lower() and not (folder / "config.json").exists():
            raise UserError(f"{name} holds GGUF files: download one (hf download {name} FILE.gguf) and give its path.")
        for pattern in weights_of(folder):
            folder = Path(snapshot_download(name, allow_patterns=[pattern], **options))
            if any(folder.glob(pattern)):
                break
        return folder
    except GatedRepoError:
        raise UserError(f"{name} asks for its terms to be accepted on its hub page, and for `hf auth login`.") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name} is neither a directory here nor a public model on the Hugging Face hub.") from None
    except (OSError, ValueError) as error:  # no connection, offline mode, nothing in the cache
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no directory here and could not be downloaded from the Hugging Face hub ({why.rstrip('.')}); "
            "check the name and the connection, or give a local directory."
        ) from error
