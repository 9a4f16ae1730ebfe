"""Mixtures of experts: what routes stays dense, and every expert is calibrated on the tokens it gets, each once."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import transformers as hf
from hooked import linear_inputs, wanda_mask
from torch import nn

import pyprune
from pyprune.config import ConfigError, PruneConfig
from pyprune.execution.executor import Executor
from pyprune.masks.solvers import inverse_factor, solve
from pyprune.masks.statistics import Statistics, observe
from pyprune.model.blocks import ModelView, select_weights, weights_of

COMMON = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CONFIGS = {
    "llama4": lambda: hf.Llama4TextConfig(
        **COMMON,
        head_dim=8,
        intermediate_size=16,
        intermediate_size_mlp=48,
        num_local_experts=4,
        num_experts_per_tok=1,
        attention_chunk_size=32,
        interleave_moe_layer_step=1,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **COMMON, head_dim=8, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
    ),
    "phimoe": lambda: hf.PhimoeConfig(**COMMON, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2),
    "jetmoe": lambda: hf.JetMoeConfig(
        **{**COMMON, "num_attention_heads": None},
        kv_channels=8,
        intermediate_size=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=24,
    ),
}
ROUTERS = {
    "llama4": ["feed_forward.router.weight"],
    "phimoe": ["mlp.router.weight"],
    "jetmoe": ["mlp.router.layer.weight", "self_attention.experts.router.layer.weight"],
    "qwen2_moe": ["mlp.gate.weight", "mlp.shared_expert_gate.weight"],
    "gpt_oss": ["mlp.router.weight"],
}
QUIET = dict(progress=False, evaluation=pyprune.Evaluation(enabled=False))


def collected(model: nn.Module, ids: torch.Tensor, handles: list, found: dict[str, list]) -> dict[str, torch.Tensor]:
    """What hooks put into ``found`` while each sequence passes the model by itself; the hooks are removed."""
    with torch.no_grad():
        for row in ids:
            model(row[None])
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def moe(architecture: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = CONFIGS[architecture]()
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) * 0.15)
            elif "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


class Expert(nn.Module):
    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.own_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x):
        return torch.sigmoid(self.own_gate(x)) * self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class ListOfExperts(nn.Module):
    """A mixture as remote code writes it: experts are modules, called only if a token is routed to them."""

    def __init__(self, hidden: int = 32, inner: int = 16, count: int = 6, top: int = 1, empty: bool = False):
        super().__init__()
        self.gate = nn.Linear(hidden, count, bias=False)
        self.experts = nn.ModuleList(Expert(hidden, inner) for _ in range(count))
        self.top, self.empty = top, empty

    def forward(self, hidden):
        x = hidden.reshape(-1, hidden.shape[-1])
        weights, chosen = self.gate(x).softmax(-1).topk(self.top, dim=-1)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if len(token) or self.empty:
                out.index_add_(0, token, expert(x[token]) * weights[token, slot, None])
        return out.reshape(hidden.shape)


def list_moe(**options) -> nn.Module:
    torch.manual_seed(3)
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.mlp = ListOfExperts(**options)
        for parameter in layer.mlp.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def rare(rows: int = 12, length: int = 4) -> torch.Tensor:
    """So few tokens per batch that experts come and go."""
    return tiny.ids(rows, length, seed=5)


def expert_inputs(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Float64 inputs of every fused expert of Llama 4 and GPT-OSS, recomputed from what its module is called with."""
    found: dict[str, list] = {}

    def note(path, module, args):
        count = module.num_experts
        if len(args) == 1:  # Llama 4: all tokens for each expert, those of others times zero
            tokens = [part[(part != 0).any(1)] for part in args[0].view(count, -1, args[0].shape[-1])]
        else:
            x, chosen = args[0].reshape(-1, args[0].shape[-1]), args[1]
            tokens = [x[(chosen == e).any(1)] for e in range(count)]
        for e, x in enumerate(tokens):
            x = x.detach().double()
            inner = x @ module.gate_up_proj[e].detach().double()
            if len(args) == 1:
                gate, up = inner.chunk(2, -1)
                inner = up * module.act_fn(gate)
            else:
                inner = module._apply_gate(inner + module.gate_up_proj_bias[e].detach().double())
            found.setdefault(f"{path}.gate_up_proj[{e}]", []).append(x)
            found.setdefault(f"{path}.down_proj[{e}]", []).append(inner)

    handles = [
        m.register_forward_pre_hook(lambda m, a, n=n: note(n, m, a))
        for n, m in model.named_modules()
        if type(m).__name__ in ("Llama4TextExperts", "GptOssExperts")
    ]
    return collected(model, ids, handles, found)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_routers_and_gates_stay_dense_and_are_named(architecture):
    model = moe(architecture)
    before = copy.deepcopy(model.state_dict())
    result = pyprune.prune(model, method="magnitude", sparsity=0.5, calibration=rare(), **QUIET)
    view = ModelView(result.model)
    expected = sorted(f"{view.path}.{i}.{name}" for i in range(2) for name in ROUTERS[architecture])
    assert sorted(result.report["coverage"]["skipped"]) == expected
    for name in expected:
        assert torch.equal(result.model.state_dict()[name], before[name])
    pruned = {row["name"] for row in result.report["weights"]}
    assert not pruned & set(expected)
    for name, parameter in result.model.named_parameters():
        if name.startswith(view.path) and parameter.ndim >= 2 and name not in expected and not name.endswith("bias"):
            assert abs((parameter == 0).float().mean().item() - 0.5) < 0.02, name


def test_gates_of_experts_in_a_list_stay_dense_and_swiglu_gates_do_not():
    result = pyprune.prune(list_moe(), method="magnitude", sparsity=0.5, calibration=rare(), **QUIET)
    skipped = [name for name in result.report["coverage"]["skipped"] if name.startswith("model.layers.0.")]
    assert sorted(skipped) == sorted(
        ["model.layers.0.mlp.gate.weight", *(f"model.layers.0.mlp.experts.{e}.own_gate.weight" for e in range(6))]
    )
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in {row["name"] for row in result.report["weights"]}


@pytest.mark.parametrize(
    "architecture,pattern",
    [("llama4", "router"), ("jetmoe", "*.router.layer.weight"), ("qwen2_moe", "shared_expert_gate")],
)
def test_routers_are_pruned_when_a_target_names_them_alone(architecture, pattern):
    view = ModelView(moe(architecture))
    chosen = [view.name(i, ref) for i, refs in enumerate(select_weights(view, [pattern], [])) for ref in refs]
    assert chosen and all("gate" in name or "router" in name for name in chosen)
    wide = [view.name(i, ref) for i, refs in enumerate(select_weights(view, ["*"], [])) for ref in refs]
    assert not set(chosen) & set(wide)
    both = [view.name(i, ref) for i, refs in enumerate(select_weights(view, ["*", pattern], [])) for ref in refs]
    assert set(both) == set(wide) | set(chosen)


def test_ignoring_a_router_that_is_dense_anyway_is_no_mistake():
    view = ModelView(moe("llama4"))
    assert select_weights(view, [], ["router"]) == select_weights(view, [], [])


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_no_other_layer_is_taken_for_a_router(architecture):
    for block in ModelView(tiny.model(architecture)).blocks:
        assert weights_of(block) == weights_of(block, routers=True)


def test_a_key_projection_as_wide_as_there_are_experts_is_no_router():
    model = list_moe(count=16, inner=8)  # tiny LLaMA's keys are 16 wide
    assert model.model.layers[0].self_attn.k_proj.out_features == 16
    assert "self_attn.k_proj.weight" in {ref.path for ref in weights_of(model.model.layers[0])}


@pytest.mark.parametrize("architecture", ["llama4", "gpt_oss"])
def test_transposed_experts_are_pruned_by_their_own_tokens(architecture):
    model, ids = moe(architecture), tiny.ids(8, 24)
    inputs = expert_inputs(model, ids)
    result = pyprune.prune(model, method="wanda", sparsity=0.5, inputs="dense", calibration=ids, **QUIET)
    compared = 0
    for name, x in inputs.items():
        path, expert = name[:-1].split("[")
        dense = model.get_parameter(path)[int(expert)].detach().T
        pruned = result.model.get_parameter(path)[int(expert)].detach().T
        if len(x) > 4:
            assert torch.equal(pruned != 0, wanda_mask(dense, x)), name
            compared += 1
    assert compared >= 12 and not any("no calibration token" in w for w in result.report["warnings"] if "[0]" in w)


@pytest.mark.parametrize("architecture", ["llama4", "gpt_oss"])
def test_statistics_of_transposed_experts_count_only_tokens_they_get(architecture):
    model, ids = moe(architecture), tiny.ids(8, 24)
    inputs, view = expert_inputs(model, ids), ModelView(model)
    executor = Executor(view, batch_size=3)
    stream = executor.embed(list(ids))
    with executor.compute(0) as module:
        observer = observe(executor, 0, module, weights_of(module), stream, lambda c, d: Statistics(c, d))
    first = {n.removeprefix(f"{view.path}.0."): x for n, x in inputs.items() if n.startswith(f"{view.path}.0.")}
    assert sum(len(x) > 0 for x in first.values()) >= 6
    for name, x in first.items():
        if len(x):
            assert observer.sinks[name].tokens == len(x), name
            torch.testing.assert_close(observer.sinks[name].gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        else:
            assert name not in observer.sinks


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
@pytest.mark.parametrize("architecture", ["llama4", "gpt_oss"])
def test_sparsegpt_on_transposed_experts_reaches_the_reference_objective(architecture, pattern, tmp_path):
    model, ids = moe(architecture), tiny.ids(16, 32)
    inputs = expert_inputs(model, ids)
    result = pyprune.prune(
        model, method="sparsegpt", pattern=pattern, sparsity=0.5, inputs="dense", calibration=ids, **QUIET
    )
    config = PruneConfig(method="sparsegpt", pattern=pattern, sparsity=0.5)
    checked = 0
    for name, x in inputs.items():
        if len(x) < 2 * x.shape[1]:
            continue
        checked += 1
        path, expert = name[:-1].split("[")
        dense = model.get_parameter(path)[int(expert)].detach().T.contiguous()
        pruned = result.model.get_parameter(path)[int(expert)].detach().T
        gram = (x.T @ x).float()
        statistics = Statistics(x.shape[1], torch.device("cpu"))
        statistics.gram, statistics.count = gram, torch.tensor(len(x))
        [wanted] = solve([dense], [config], statistics, inverse_factor(gram.clone(), len(x), config.damping))
        if pattern == "2:4":
            assert int((pruned.reshape(len(pruned), -1, 4) != 0).sum(-1).max()) <= 2
        lost = [(x @ (w - dense).double().T).square().sum() for w in (pruned, wanted.weight)]
        assert lost[0] <= 1.001 * lost[1] and ((pruned != 0) == wanted.mask).float().mean() > 0.99, name
    assert checked >= 4
    result.save(tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    for name, parameter in result.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name
    found = pyprune.inspect(tmp_path / "out")
    assert pattern != "2:4" or "2:4" in found["holds"]


@pytest.mark.parametrize("architecture", ["llama4", "gpt_oss"])
def test_block_reconstruction_keeps_the_zeros_of_transposed_experts(architecture):
    model, ids = moe(architecture), tiny.ids(8, 24)
    settings = dict(method="wanda", pattern="2:4", calibration=ids, **QUIET)
    plain = pyprune.prune(model, **settings)
    trained = pyprune.prune(
        model, reconstruct="block", reconstruction=pyprune.Reconstruction(epochs=3, lr=1e-3), **settings
    )
    steps = trained.report["blocks"][0]["steps"]
    assert steps[-1]["calibration"] < steps[0]["calibration"]
    for (name, a), (_, b) in zip(plain.model.named_parameters(), trained.model.named_parameters()):
        if ".0." in name and "experts" in name and "bias" not in name:
            assert torch.equal(a != 0, b != 0), name
            assert not torch.equal(a, b), name


@pytest.mark.parametrize("architecture", ["llama4", "gpt_oss", "jetmoe", "phimoe"])
def test_experts_that_no_token_reaches_are_pruned_by_magnitude_and_said(architecture):
    model = moe(architecture)
    result = pyprune.prune(model, method="wanda", sparsity=0.5, calibration=tiny.ids(1, 2), **QUIET)
    silent = {w.partition(" saw no")[0] for w in result.report["warnings"] if "saw no calibration token" in w}
    assert silent
    for name in silent:
        path, expert = name[:-1].split("[")
        dense, pruned = (m.get_parameter(path)[int(expert)].detach().abs() for m in (model, result.model))
        assert dense[pruned == 0].max() <= dense[pruned != 0].min()


def test_neurons_of_transposed_experts_go_whole(tmp_path):
    """GPT-OSS interleaves gate and up columns and gives experts biases: rows of both go with their neuron."""
    result = pyprune.prune(moe("gpt_oss"), pattern="neurons", sparsity=0.5, calibration=tiny.ids(8, 24), **QUIET)
    experts = result.model.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (4, 32, 16) and experts.gate_up_proj_bias.shape == (4, 16)
    result.save(tmp_path / "out")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tiny.ids(2, 16, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, result.model(ids).logits, rtol=0, atol=0)


class PlainStack(nn.Module):
    """Two matrices per expert without gates, stored ``[experts, in, out]``: no shape tells the way round."""

    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.randn(4, 32, 16) * 0.1)
        self.down = nn.Parameter(torch.randn(4, 16, 32) * 0.1)

    def forward(self, hidden):
        x = hidden.reshape(-1, 32)
        return sum((x[e::4] @ self.up[e]).relu() @ self.down[e] for e in range(4)).mean(0).expand(hidden.shape)


def test_experts_multiplied_the_other_way_round_are_refused_and_not_taken_for_unreached():
    model = tiny.model("llama")
    for layer in model.model.layers:
        layer.mlp = PlainStack()
    with pytest.raises(ConfigError, match=r"mlp.up is multiplied as \[experts, in, out\]"):
        pyprune.prune(model, method="wanda", calibration=tiny.ids(4, 8), **QUIET)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_experts_in_a_list_lose_no_token_to_the_early_end_of_a_pass(batch_size, empty):
    model, ids = list_moe(empty=empty), rare()
    truth, view = linear_inputs(model, ids), ModelView(model)
    executor = Executor(view, batch_size=batch_size)
    stream = executor.embed(list(ids))
    with executor.compute(0) as module:
        observer = observe(executor, 0, module, weights_of(module), stream, lambda c, d: Statistics(c, d))
    counts = set()
    for ref in weights_of(view.blocks[0]):
        x = truth.get(f"model.layers.0.{ref.path}", torch.zeros(0, 1))
        counts.add(len(x))
        if not len(x):
            assert ref.name not in observer.leader
            continue
        sink = observer.sinks[observer.leader[ref.name]]
        assert sink.tokens == len(x), ref.name
        torch.testing.assert_close(sink.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
    assert len(counts) > 3  # the experts got different numbers of tokens


def test_masks_of_experts_in_a_list_are_those_of_the_full_forward():
    model, ids = list_moe(), rare()
    truth = linear_inputs(model, ids)
    result = pyprune.prune(model, method="wanda", sparsity=0.5, inputs="dense", calibration=ids, **QUIET)
    for row in result.report["weights"]:
        if row["name"] in truth:
            dense = model.get_parameter(row["name"]).detach()
            assert torch.equal(result.model.get_parameter(row["name"]) != 0, wanda_mask(dense, truth[row["name"]]))


def test_global_propagation_takes_experts_in_a_list_as_they_are():
    """The dense stream sends other tokens to an expert: there is no cross Gram for it, whatever it is stored in."""
    result = pyprune.prune(
        list_moe(top=2), method="sparsegpt", sparsity=0.5, global_propagation=True, calibration=tiny.ids(6, 8), **QUIET
    )
    assert all(row["sparsity"] == pytest.approx(0.5, abs=0.01) for row in result.report["weights"])


def test_chunked_feed_forward_layers_lose_no_token_either():
    """Longer sequences make more chunks: the product that came last before is not the last one now."""
    model = tiny.model("bert", chunk_size_feed_forward=4)
    sequences = [tiny.ids(1, length, seed=length)[0] for length in (4, 8, 8, 12)]
    view = ModelView(model)
    seen = []
    layer = model.encoder.layer[0].intermediate.dense
    handle = layer.register_forward_pre_hook(lambda m, a: seen.append(a[0].reshape(-1, 32).double()))
    with torch.no_grad():
        for sequence in sequences:
            model(sequence[None])
    handle.remove()
    executor = Executor(view, batch_size=1)
    stream = executor.embed(sequences)
    with executor.compute(0) as module:
        refs = [ref for ref in weights_of(module) if "intermediate" in ref.path]
        observer = observe(executor, 0, module, refs, stream, lambda c, d: Statistics(c, d))
    x = torch.cat(seen)
    sink = observer.sinks["intermediate.dense.weight"]
    assert sink.tokens == len(x) == 32
    torch.testing.assert_close(sink.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_an_unknown_target_still_says_what_there_is():
    with pytest.raises(ConfigError, match="routre"):
        select_weights(ModelView(moe("llama4")), ["routre"], [])
