"""A checkpoint before it is opened: its configuration, its files, its model without weights, each read when asked for;
and whether a run holds its weights whole or streams them, and why."""

from __future__ import annotations

from functools import cached_property

import torch

from pyprune.config import ConfigError
from pyprune.execution.activation_store import available_memory
from pyprune.model import assembly, checkpoint
from pyprune.model.architecture import assume_causal
from pyprune.model.attributes import dtype_named
from pyprune.model.blocks import ModelView
from pyprune.model.checkpoint import Source
from pyprune.model.origin import Origin
from pyprune.model.shards import Files
from pyprune.model.skeleton import skeleton

SHARE = 0.5
"""``stream="auto"`` streams a model that needs more than this share of the free memory."""
FORMAT = "only a local folder of safetensors files can be read block by block"


class Unopened:
    """What is known of a checkpoint without reading its weights."""

    def __init__(self, name: str, dtype: str = "auto"):
        """dtype: that its weights are to have in memory; ``auto`` keeps their own."""
        self.name, self.dtype = name, dtype

    @cached_property
    def source(self) -> Source:
        return checkpoint.resolve(self.name)

    @cached_property
    def config(self):
        """Its Hugging Face configuration."""
        found = checkpoint.load_config(self.name)
        if self.source.gguf_file:
            assume_causal(found)
        return found

    @cached_property
    def origin(self) -> Origin:
        """Its folder; of a Hub id the configuration is enough here."""
        return checkpoint.find_origin(self.source) if self.source.local else Origin()

    @property
    def files(self) -> Files | None:
        """Its safetensors files, if they are here."""
        return self.origin.files if isinstance(self.origin.files, Files) else None

    @cached_property
    def kind(self) -> torch.dtype:
        """The type of its weights in memory: asked for, or the configuration's, or that of the first in its files."""
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        if self.source.gguf_file:
            return torch.float32
        named = dtype_named(self.config)
        if named is not None:
            return named
        infos = (self.files.info(name) for name in self.files.where) if self.files else ()
        return next((dtype for dtype, _ in infos if dtype.is_floating_point), torch.float32)

    @cached_property
    def view(self) -> ModelView:
        """Its model without weights."""
        return ModelView(skeleton(self.config, self.kind, self.origin))

    @property
    def bytes(self) -> int:
        """What its weights take in memory: by its files, or by its model where they are not here."""
        return self.files.bytes_as(self.kind) if self.files else assembly.stored_bytes(self.view.model)

    def streams(self, stream: str, obstacle: str | None = None, models: int = 1) -> tuple[bool, str]:
        """Whether its weights are streamed, and why or why not.

        stream: auto, always or never; ``auto`` streams what needs more than half of the free memory, if it can be
        streamed. obstacle: why the caller needs it whole. models: how many the caller would hold at once. Raises
        ConfigError where ``always`` cannot.
        """
        if stream == "never":
            return False, "stream is never"
        free = available_memory()
        if self.files is None:
            obstacle = obstacle or self._unreadable()
        counted = not (self.files is None and obstacle)  # what is not here is not counted in vain
        if stream == "auto" and counted and models * self.bytes < SHARE * free:
            return False, "they fit into memory"
        reason = obstacle or self.why_whole()
        if reason is not None:
            if stream == "always":
                raise ConfigError(
                    f"{self.name} cannot be streamed: {reason}; set stream='never' (or auto) to load it whole"
                )
            return False, reason
        why = (
            "stream is always"
            if stream == "always"
            else f"their {'' if models == 1 else f'{models} × '}{self.bytes / 2**30:.1f} GiB are more than half of the "
            f"{free / 2**30:.1f} GiB that are free"
        )
        return True, why if self.files else why + "; if the names in their files, which are not here, are the model's"

    def _unreadable(self) -> str | None:
        """Why its files are none to stream from; None also where it has none yet."""
        if self.source.gguf_file or not self.source.local or self.origin.files is not None:
            return FORMAT
        return None

    def why_whole(self) -> str | None:
        """Why its tensors cannot be streamed, None if they can; one of the wrong shape is a ConfigError."""
        if checkpoint.structured_sizes(self.source):
            return "its blocks have sizes of their own"
        model, view, files = self.view.model, self.view, self.files
        if view.shared:
            return "its blocks are applied several times, or share weights"
        if files is None:
            return None
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters(remove_duplicate=False)}
        for keys in assembly.names_of(model):
            found = [key for key in keys if key in files]
            if not found:
                return f"its files have no {keys[0]}: their names are not the model's"
            if len(keys) > 1 and any(key.startswith(view.path + ".") for key in keys):
                return f"{keys[0]} and {keys[1]} share their weight"
            if len(found) > 1 and not all(torch.equal(files.read(found[0]), files.read(key)) for key in found[1:]):
                return f"its config says that {found[0]} and {found[1]} are one, its files hold two"
            for key in found:
                if files.info(key)[1] != shapes[key]:
                    raise ConfigError(
                        f"{key} in {self.name} has shape {list(files.info(key)[1])}, its architecture "
                        f"needs {list(shapes[key])}"
                    )
        return None
