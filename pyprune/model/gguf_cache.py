"""GGUF files, whose weights are dequantised once: later openings read the safetensors that the first one left.

A GGUF file of 135 million parameters takes transformers half a minute to read, mostly for names and a vocabulary that
are parsed one string at a time; the same model as safetensors takes a second. The checkpoint lies in the user's cache
folder, in float32, bit for bit what was dequantised. ``PYPRUNE_GGUF_CACHE=0`` neither writes nor reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pyprune.ops.qualification import cache_folder

SWITCH = "PYPRUNE_GGUF_CACHE"
LARGEST = 4e9
"""Bytes of float32 weights above which nothing is kept: the user's cache folder is no place for them."""
MARK = ".gguf"
"""In a kept checkpoint, which file it was made from."""
PARTIAL = ".partial-"
"""How a checkpoint is called while it is written."""
EDGE = 2**20
"""Bytes at either end of the file that its key is made of, beside its size and time."""


def kept(path: Path) -> Path | None:
    """The folder of the checkpoint that was made from this GGUF file as it is now, None if there is none."""
    if not enabled():
        return None
    folder = _folder(path)
    return folder if (folder / MARK).is_file() else None


def enabled() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


def keep(path: Path, size: int, save: Callable[[Path], None]) -> Path | None:
    """Keep the checkpoint of a GGUF file, whole or not at all, in place of the one made of an earlier state of the
    file; returns its folder, None where nothing was kept.

    size: bytes of its weights. save: writes the checkpoint into a folder. A cache that cannot be written, or has no
    room for twice the size, is no error: the next opening reads the GGUF file again.
    """
    if not enabled() or size > LARGEST:
        return None
    folder = _folder(path)
    with contextlib.suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder.parent).free < 2 * size:
            return None
        temporary = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=folder.parent))
        try:
            save(temporary)
            (temporary / MARK).write_text(json.dumps({"file": str(path.resolve())}) + "\n")
            _drop(path.resolve())
            os.replace(temporary, folder)  # fails where another process was first; its checkpoint is the same
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return kept(path)


def _drop(file: Path) -> None:
    """Remove what was kept of this file before it, or a package, changed."""
    for mark in (cache_folder() / "gguf").glob(f"[!.]*/{MARK}"):
        with contextlib.suppress(OSError, ValueError, KeyError):
            if json.loads(mark.read_text())["file"] == str(file):
                shutil.rmtree(mark.parent, ignore_errors=True)


def _folder(path: Path) -> Path:
    """Where the checkpoint of this file belongs: named by its size, time, first and last bytes, and by the versions of
    what reads it."""
    about = path.stat()
    digest = hashlib.sha256(f"{about.st_size} {about.st_mtime_ns}".encode())
    for package in ("transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(importlib.metadata.version(package).encode())
    with open(path, "rb") as file:
        digest.update(file.read(EDGE))
        file.seek(max(0, about.st_size - EDGE))
        digest.update(file.read(EDGE))
    return cache_folder() / "gguf" / f"{path.stem}-{digest.hexdigest()[:16]}"
