"""Tar files as WebDataset writes them, for tests."""

import io
import tarfile

import numpy as np
from PIL import Image


def encoded(seed=0, *, size=(40, 50), kind="PNG"):
    """The bytes of an image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), kind)
    return file.getvalue()


def write_tar(path, members, *, mode="w", **how):
    """members: (name, bytes or text), in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **how) as archive:
        for name, content in members:
            content = content.encode() if isinstance(content, str) else content
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return path


def samples(count, *, first=0, **texts):
    """count images `000012.png`, each with texts beside it: txt="a red {}" makes 000012.txt."""
    for i in range(first, first + count):
        yield f"{i:06d}.png", encoded(i)
        for extension, text in texts.items():
            yield f"{i:06d}.{extension}", text.format(i)
