"""What all tests share: no network, a tiny model with its tokenizer, and Triton's interpreter.

``TRITON_INTERPRET`` has to be set before Triton itself is imported, so it is set here, around the import, and taken
away again: other tests and the processes they start do not see it. The ``interpreter`` fixture sets it for the tests
that run kernels. On a GPU machine nothing is interpreted and ``tests/ops/test_triton_gpu.py`` runs instead.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the Hub's client: no test may need the network
os.environ["PYPRUNE_QUALIFY"] = "0"  # a fixed choice of back-ends, here and in the processes that tests start

import numpy as np
import pytest
import torch

INTERPRETED = not torch.cuda.is_available()


def _round_to_bfloat16(handle, tl, interpreter):
    """The interpreter truncates float32 to bfloat16; the hardware rounds to nearest even."""
    data = torch.from_numpy(np.ascontiguousarray(handle.data)).to(torch.bfloat16).view(torch.int16).numpy()
    return interpreter.TensorHandle(data.view(np.uint16).reshape(handle.data.shape), tl.bfloat16)


def _repair_bfloat16(interpreter, tl) -> None:
    """bfloat16 lives in the interpreter as raw uint16: widen before a product, round on the way back."""
    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self, a, b, *rest):
        widen = [cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return dot(self, *widen, *rest)

    def cast_impl(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _round_to_bfloat16(source, tl, interpreter)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


if INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language
        import triton.runtime.interpreter

        import pyprune.triton_kernels  # noqa: F401  (kernels are interpreted functions if imported now)

        _repair_bfloat16(triton.runtime.interpreter, triton.language)
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def interpreter(monkeypatch):
    """Run Triton kernels on CPU tensors, through ops too."""
    if not INTERPRETED:
        pytest.skip("this machine has a GPU: tests/ops/test_triton_gpu.py runs the kernels on it")
    from pyprune.ops import choice

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(choice, "_loaded", {})
    monkeypatch.setattr(choice, "_settled", {})


@pytest.fixture(scope="session")
def tokenizer():
    """One token a character; ids 0 to 3 are padding, BOS, EOS and unknown. Adds no special tokens by itself."""
    import tiny

    return tiny.tokenizer()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """Folder of a tiny LLaMA with that tokenizer. Not to be written to."""
    import tiny

    path = tmp_path_factory.mktemp("models") / "llama"
    tiny.model("llama", vocab_size=tiny.CHARACTERS).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def stop_after(monkeypatch):
    """Makes runs stop once that many blocks are finished; -1: never."""
    from pyprune.execution.journal import Journal

    count = -1
    point = Journal.safe_point

    def stopping(self):
        self._stopping = len(self.entries) == count
        point(self)

    monkeypatch.setattr(Journal, "safe_point", stopping)

    def choose(number):
        nonlocal count
        count = number

    return choose
