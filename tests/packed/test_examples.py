"""The examples that load packed checkpoints elsewhere: without pyprune, and in vLLM as far as its interface goes."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import types
from abc import ABC, abstractmethod
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import pyprune
from pyprune.model.packed_shards import PackedFiles

EXAMPLES = Path(__file__).parents[2] / "examples"


def module_of(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def packed(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = tiny.zeroed(tiny.model(request.param), 0.6).bfloat16()
    model.save_pretrained(root / "dense", max_shard_size="60KB")
    pyprune.pack(root / "dense", root / "packed")
    return pyprune.load(root / "dense").model, root / "packed"


def test_the_loader_without_pyprune_reads_the_same_tensors_and_model(packed):
    loader = module_of(EXAMPLES / "load_packed.py")
    model, folder = packed
    files, found = PackedFiles(folder), dict(loader.tensors(folder))
    assert found.keys() == files.where.keys()
    assert all(torch.equal(found[name].view(torch.uint8), files.read(name).view(torch.uint8)) for name in found)
    loaded, ids = loader.load(folder), tiny.ids(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    text = (EXAMPLES / "load_packed.py").read_text()
    assert len(text.splitlines()) <= 100 and "import pyprune" not in text


def test_the_loader_without_pyprune_refuses_damage(packed, tmp_path):
    loader = module_of(EXAMPLES / "load_packed.py")
    values = torch.ones(3)
    for mask in ([[0b111 << 5]], [[0b11]], [[0b1111]]):
        with pytest.raises(ValueError, match="x is damaged"):
            loader.unpack(torch.tensor(mask, dtype=torch.uint8), values, [1, 6], "x")
    assert loader.unpack(torch.tensor([[0b100101]], dtype=torch.uint8), values, [1, 6], "x").tolist() == [
        [1, 0, 1, 0, 0, 1]
    ]


def stand_ins(monkeypatch) -> dict:
    """Modules with vLLM's base classes: their abstract methods, names and signatures as of early 2026."""

    class QuantizeMethodBase(ABC):
        @abstractmethod
        def create_weights(self, layer, *weight_args, **extra_weight_attrs): ...

        @abstractmethod
        def apply(self, layer, *args, **kwargs): ...

        def process_weights_after_loading(self, layer):
            return

    class LinearMethodBase(QuantizeMethodBase):
        @abstractmethod
        def create_weights(
            self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        ): ...  # fmt: skip

        @abstractmethod
        def apply(self, layer, x, bias=None): ...

    class UnquantizedLinearMethod(LinearMethodBase):
        def create_weights(
            self, layer, input_size_per_partition, output_partition_sizes, input_size, output_size, params_dtype,
            **extra_weight_attrs,
        ):  # fmt: skip
            weight = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
            layer.register_parameter("weight", nn.Parameter(weight, requires_grad=False))

        def process_weights_after_loading(self, layer):
            layer.left_dense = True

        def apply(self, layer, x, bias=None):
            return nn.functional.linear(x, layer.weight, bias)

    class QuantizationConfig(ABC):
        def __init__(self):
            super().__init__()
            self.packed_modules_mapping = {}

        @abstractmethod
        def get_name(self): ...

        @abstractmethod
        def get_supported_act_dtypes(self): ...

        @classmethod
        @abstractmethod
        def get_min_capability(cls): ...

        @staticmethod
        @abstractmethod
        def get_config_filenames(): ...

        @classmethod
        @abstractmethod
        def from_config(cls, config): ...

        @abstractmethod
        def get_quant_method(self, layer, prefix): ...

    class BaseModelLoader(ABC):
        def __init__(self, load_config):
            self.load_config = load_config

        @abstractmethod
        def download_model(self, model_config): ...

        @abstractmethod
        def load_weights(self, model, model_config): ...

    class LinearBase(nn.Module):
        pass

    registered: dict = {"methods": ["UnquantizedLinearMethod"], "quantization": {}, "loader": {}}

    def registers(kind, base):
        def register(name):
            def take(cls):
                assert issubclass(cls, base)
                registered[kind][name] = cls
                known.append(name)
                return cls

            return take

        return register

    def v2(cls):
        registered["methods"].append(cls.__name__)
        return cls

    known: list[str] = ["fp8"]
    contents = {
        "vllm": {},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.linear": dict(
            LinearBase=LinearBase,
            UnquantizedLinearMethod=UnquantizedLinearMethod,
            register_weight_loader_v2_supported_method=v2,
        ),
        "vllm.model_executor.layers.quantization": dict(
            QUANTIZATION_METHODS=known, register_quantization_config=registers("quantization", QuantizationConfig)
        ),
        "vllm.model_executor.layers.quantization.base_config": dict(QuantizationConfig=QuantizationConfig),
        "vllm.model_executor.model_loader": dict(register_model_loader=registers("loader", BaseModelLoader)),
        "vllm.model_executor.model_loader.base_loader": dict(BaseModelLoader=BaseModelLoader),
    }
    for name, values in contents.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)
    return {
        **registered,
        "LinearBase": LinearBase,
        "bases": (QuantizationConfig, UnquantizedLinearMethod, BaseModelLoader),
    }


@pytest.fixture(scope="module")
def plugin():
    return module_of(EXAMPLES / "vllm_plugin" / "pyprune_vllm.py")


def accepts(own, base) -> bool:
    """Every call that fits the base's method fits ours: the same names in the same order, no more that are required."""
    mine, theirs = (list(inspect.signature(f).parameters.values()) for f in (own, base))
    return [p.name for p in mine[: len(theirs)]] == [p.name for p in theirs] and all(
        p.default is not p.empty for p in mine[len(theirs) :]
    )


def test_the_plugin_has_the_names_and_signatures_of_vllms_base_classes(plugin, monkeypatch):
    found = stand_ins(monkeypatch)
    plugin.register()
    plugin.register()
    config = found["quantization"]["pyprune"]()
    method = config.get_quant_method(found["LinearBase"](), "model.layers.0.mlp.down_proj")
    loader = found["loader"]["pyprune"](None)
    for one, base in zip((config, method, loader), found["bases"]):
        for name, function in inspect.getmembers(base, inspect.isfunction):
            assert name.startswith("__") or accepts(getattr(type(one), name), function), name
    assert type(method).__name__ in found["methods"], "the layers' second weight loader goes by the class's name"
    assert config.get_name() == "pyprune" and config.get_config_filenames() == [] and config.from_config({}) is not None
    assert config.get_quant_method(nn.Embedding(2, 2), "lm_head") is None
    assert type(config.get_quant_method(found["LinearBase"](), "layers.0.kv_b_proj")) is found["bases"][1]


@pytest.mark.parametrize("sparsity, packs", [(0.6, True), (0.0, False)])
def test_a_layer_of_the_plugin_multiplies_with_its_packed_weight(plugin, monkeypatch, sparsity, packs):
    found = stand_ins(monkeypatch)
    plugin.register()
    layer = found["LinearBase"]()
    method = found["quantization"]["pyprune"]().get_quant_method(layer, "model.layers.0.self_attn.qkv_proj")
    method.create_weights(layer, 48, [32, 16, 16], 48, 64, torch.float32)
    torch.manual_seed(0)
    dense = torch.randn(64, 48) * (torch.rand(64, 48) >= sparsity)
    layer.weight.data.copy_(dense)
    method.process_weights_after_loading(layer)
    assert (layer.weight.numel() == 0) is packs and hasattr(layer, "left_dense") is not packs
    x, bias = torch.randn(3, 48), torch.randn(64)
    for given in (bias, None):
        torch.testing.assert_close(method.apply(layer, x, given), nn.functional.linear(x, dense, given))
    if packs:
        arguments = (layer.packed_mask, layer.packed_values, layer.packed_offsets, 48, None)
        torch.library.opcheck(plugin.packed_linear, (x, *arguments), test_utils=("test_schema", "test_faketensor"))


def test_the_plugins_loader_hands_over_dense_tensors(plugin, packed, monkeypatch):
    found = stand_ins(monkeypatch)
    plugin.register()
    model, folder = packed
    given: dict = {}
    target = types.SimpleNamespace(load_weights=lambda weights: given.update(weights))
    loader = found["loader"]["pyprune"](None)
    loader.download_model(types.SimpleNamespace(model=str(folder)))
    loader.load_weights(target, types.SimpleNamespace(model=str(folder)))
    state = model.state_dict()
    assert given and all(torch.equal(tensor, state[name]) for name, tensor in given.items())


def test_the_finetuning_example_knows_its_options(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune_sparse.py", "-o", "runs/x", "--lora", "--steps", "3"])
    found = module_of(EXAMPLES / "finetune_sparse.py").arguments()
    assert found.lora and found.steps == 3 and found.model == "smollm2-135m"
