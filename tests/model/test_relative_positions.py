"""Encoders whose blocks are handed relative positions (DeBERTa, T5): forward, statistics, masks, groups, reload."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

import pyprune
from pyprune.config import ConfigError
from pyprune.evaluation.perplexity import check_causal
from pyprune.execution.executor import Executor
from pyprune.masks.statistics import AGAIN, Statistics, observe
from pyprune.model.blocks import ModelView, weights_of
from pyprune.model.recording import call_block

_SIZES = dict(
    vocab_size=tiny.VOCABULARY,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    pad_token_id=0,
    relative_attention=True,
    pos_att_type=["c2p", "p2c"],
    position_biased_input=False,
)
_V3 = dict(_SIZES, position_buckets=8, norm_rel_ebd="layer_norm")
_T5 = dict(
    vocab_size=tiny.VOCABULARY,
    d_model=32,
    d_kv=8,
    d_ff=64,
    num_layers=3,
    num_heads=4,
    pad_token_id=0,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
)
BUILD = {
    "deberta": lambda: hf.DebertaModel(hf.DebertaConfig(**_SIZES)),
    "deberta_v3": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**_V3, share_att_key=True)),
    "deberta_v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**_V3)),
    "t5": lambda: hf.T5EncoderModel(hf.T5Config(**_T5)),
    "t5_gated": lambda: hf.T5EncoderModel(hf.T5Config(**_T5, feed_forward_proj="gated-gelu")),
    "umt5": lambda: hf.UMT5EncoderModel(hf.UMT5Config(**_T5)),
}
QUIET = {"progress": False}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and len(parameter) != tiny.VOCABULARY and float(parameter.std()) < 0.1:
                parameter.mul_(6)
    return model


def states(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).last_hidden_state


def outputs_by_hooks(model: nn.Module, ids: torch.Tensor) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []

    def hook(module, args, out):
        seen.append(out[0] if isinstance(out, tuple) else out)

    handles = [block.register_forward_hook(hook) for block in ModelView(model).blocks]
    states(model, ids)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", BUILD)
def test_block_by_block_forward_is_the_models_own(name):
    model = build(name)
    view = ModelView(model)
    sequences = [tiny.ids(1, length, seed=i)[0] for i, length in enumerate((5, 17, 5, 30, 17, 17))]
    executor = Executor(view, batch_size=2)
    stream = executor.embed(sequences)
    for i, block in enumerate(view.blocks):
        executor.run(i, block, stream, stream)
        for length, rows in stream.rows.items():
            for place, row in enumerate(rows):
                truth = outputs_by_hooks(model, sequences[row][None])[i][0]
                torch.testing.assert_close(stream.data[length][place], truth, rtol=1e-4, atol=1e-4)


def inputs_by_hooks(model: nn.Module, sequences: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything each linear layer of the blocks reads while the sequences pass the whole model one by one."""
    view, seen, handles = ModelView(model), {}, []
    for i, block in enumerate(view.blocks):
        for ref in weights_of(block):
            rows = seen.setdefault(view.name(i, ref), [])
            handles.append(
                block.get_submodule(ref.module_path).register_forward_pre_hook(
                    lambda m, a, rows=rows: rows.append(a[0].reshape(-1, a[0].shape[-1]))
                )
            )
    for ids in sequences:
        states(model, ids[None])
    for handle in handles:
        handle.remove()
    return {key: torch.cat(found).double() for key, found in seen.items()}


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("name", BUILD)
def test_statistics_are_those_of_everything_a_layer_reads(name, moments):
    """Also of the positions that DeBERTa's query and key read beside the tokens, once for each sequence."""
    model = build(name)
    ids = tiny.ids(5, 12)
    truth = inputs_by_hooks(model, ids)
    view = ModelView(model)
    executor = Executor(view, batch_size=3)
    stream = executor.embed(list(ids))
    for i, block in enumerate(view.blocks):
        observer = observe(
            executor,
            i,
            block,
            weights_of(block),
            stream,
            target=stream,
            sink=lambda c, d: Statistics(c, d, want_gram=not moments, want_moments=moments),
        )
        assert not any(AGAIN in key for key in observer.leader)
        for ref in weights_of(block):
            x, found = truth[view.name(i, ref)], observer.sinks[observer.leader[ref.name]]
            assert found.tokens == len(x), ref.name
            torch.testing.assert_close(found.norm.double(), x.square().sum(0).sqrt(), rtol=1e-3, atol=1e-3)
            if not moments:
                torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("name", BUILD)
def test_wanda_masks_are_those_of_hooks_on_the_whole_model(name):
    model = build(name)
    ids = tiny.ids(8, 12)
    truth = inputs_by_hooks(model, ids)
    result = pyprune.prune(model, method="wanda", sparsity=0.5, inputs="dense", calibration=ids, **QUIET)
    view, pruned = ModelView(model), ModelView(result.model)
    for i, block in enumerate(view.blocks):
        for ref in weights_of(block):
            scores = ref.view(block).double().abs() * truth[view.name(i, ref)].square().sum(0).sqrt()
            drop = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
            want = torch.ones_like(scores, dtype=torch.bool).scatter_(1, drop, False)
            assert ((ref.view(pruned.blocks[i]) != 0) == want).float().mean() > 0.999, ref.name


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize(
    "fields",
    [
        {"method": "sparsegpt", "pattern": "2:4"},
        {"method": "wanda", "reconstruct": "block", "reconstruction": {"epochs": 2}},
    ],
)
def test_masks_reload_in_stock_transformers(name, fields, tmp_path):
    model = build(name)
    result = pyprune.prune(model, calibration=tiny.ids(16, 16), **QUIET, **fields)
    assert abs(result.report["sparsity"] - 0.5) < 0.01
    assert 0 < result.report["blocks"][-1]["error"] < 1
    result.save(tmp_path / "out")
    probe = tiny.ids(2, 9, seed=9)
    for reloaded in (type(model).from_pretrained(tmp_path / "out").eval(), pyprune.load(tmp_path / "out").model):
        assert type(reloaded).__name__ == type(model).__name__
        torch.testing.assert_close(states(reloaded, probe), states(result.model, probe), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["deberta_v3", "t5"])
def test_streamed_run_is_the_same_bit_for_bit(name, tmp_path):
    build(name).save_pretrained(tmp_path / "dense")
    made = {}
    for stream in ("always", "never"):
        pyprune.prune(
            tmp_path / "dense",
            method="sparsegpt",
            calibration=tiny.ids(12, 16),
            stream=stream,
            output=str(tmp_path / stream),
            **QUIET,
        )
        made[stream] = pyprune.load(tmp_path / stream).model.state_dict()
    assert all(torch.equal(tensor, made["never"][key]) for key, tensor in made["always"].items())


@pytest.mark.parametrize("criterion", ["wifv", "taylor"])
@pytest.mark.parametrize("name", BUILD)
def test_neurons_go_and_the_smaller_model_reloads(name, criterion, tmp_path):
    model = build(name)
    result = pyprune.prune(
        model, pattern="neurons", sparsity=0.5, criterion=criterion, calibration=tiny.ids(12, 16), **QUIET
    )
    sizes = {tuple(p.shape) for n, p in result.model.named_parameters() if "intermediate" in n or ".wi" in n}
    assert {(32, 32)} == {shape for shape in sizes if len(shape) == 2}
    result.save(tmp_path / "out")
    reloaded = type(model).from_pretrained(tmp_path / "out").eval()
    probe = tiny.ids(2, 9, seed=9)
    torch.testing.assert_close(states(reloaded, probe), states(result.model, probe), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["deberta_v2", "deberta_v3"])
def test_whole_heads_of_deberta_go(name, tmp_path):
    """The model with two heads fewer is the dense one with those heads' outputs masked."""
    model = build(name)
    result = pyprune.prune(
        model,
        pattern="heads",
        sparsity=0.5,
        criterion="magnitude",
        reconstruct="none",
        calibration=tiny.ids(12, 16),
        structured={"nonstandard": "save"},
        **QUIET,
    )
    probe = tiny.ids(2, 9, seed=9)
    with torch.no_grad():
        for block, smaller in zip(model.encoder.layer, result.model.encoder.layer):
            assert smaller.attention.self.num_attention_heads == 2
            rows = [
                next(i for i in range(32) if torch.equal(block.attention.self.value_proj.weight[i], row))
                for row in smaller.attention.self.value_proj.weight
            ]
            gone = [i for i in range(32) if i not in rows]
            assert {i // 8 for i in gone}.isdisjoint({i // 8 for i in rows})
            block.attention.output.dense.weight[:, gone] = 0
    torch.testing.assert_close(states(result.model, probe), states(model, probe), rtol=1e-4, atol=1e-4)
    result.save(tmp_path / "out")
    torch.testing.assert_close(
        states(pyprune.load(tmp_path / "out").model, probe), states(result.model, probe), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", ["t5", "umt5"])
def test_heads_that_share_a_position_table_are_refused(name):
    with pytest.raises(ConfigError, match="pattern='neurons' is what can be pruned"):
        pyprune.prune(build(name), pattern="heads", calibration=tiny.ids(12, 16), **QUIET)


def test_a_convolution_between_blocks_is_refused():
    config = hf.DebertaV2Config(**_V3, conv_kernel_size=3, conv_act="gelu")
    with pytest.raises(ConfigError, match="DebertaV2Model changes the hidden states between its blocks 0 and 1"):
        pyprune.prune(hf.DebertaV2Model(config).eval(), calibration=tiny.ids(12, 16), **QUIET)


class _Chain(nn.Module):
    """Blocks that hand each other a second tensor: made of the hidden states, or of their number alone."""

    def __init__(self, of_states: bool, used: bool = True):
        super().__init__()
        self.config = hf.PretrainedConfig(vocab_size=tiny.VOCABULARY)
        self.embedding, self.used = nn.Embedding(tiny.VOCABULARY, 8), used
        self.blocks = nn.ModuleList(_Link(of_states) for _ in range(3))

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids):
        hidden, state = self.embedding(input_ids), torch.ones(())
        for block in self.blocks:
            hidden, beside = block(hidden, state)
            state = beside if self.used else state
        return hidden


class _Link(nn.Module):
    def __init__(self, of_states: bool):
        super().__init__()
        self.linear, self.of_states = nn.Linear(8, 8), of_states

    def forward(self, hidden, state):
        hidden = hidden + torch.tanh(self.linear(hidden)) * state
        return hidden, hidden.mean() if self.of_states else state * 1.5 + hidden.shape[1]


def test_what_blocks_hand_on_is_followed_or_refused():
    ids = tiny.ids(2, 7)
    for used, of_states in ((True, False), (False, True)):
        torch.manual_seed(0)
        model = _Chain(of_states, used).eval()
        view = ModelView(model)
        hidden, arguments = view.record(ids)
        with torch.no_grad():
            for block, given in zip(view.blocks, arguments):
                hidden = call_block(block, hidden, given)
            torch.testing.assert_close(hidden, model(ids))
    with pytest.raises(ConfigError, match="argument 1 of block 1 of _Chain is computed from the output of earlier"):
        ModelView(_Chain(of_states=True).eval()).record(ids)


def test_latency_of_an_encoder_without_a_limit_of_positions(tmp_path):
    from pyprune.evaluation.gain import measure

    build("t5").save_pretrained(tmp_path / "t5")
    assert measure(str(tmp_path / "t5"), tokens=24, new_tokens=1, batch_size=1, dtype="auto")["tokens"] == 24


def test_t5_encoders_have_no_perplexity():
    with pytest.raises(ConfigError, match="does not predict the next token"):
        check_causal(build("t5"))
