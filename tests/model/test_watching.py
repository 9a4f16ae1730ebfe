"""The watcher of a block's products: what it sees and replaces is what the block computes with."""

from __future__ import annotations

import tiny
import torch
from torch import nn

from pyprune.model.blocks import ModelView, WeightRef, weights_of
from pyprune.model.recording import Stop, call_block
from pyprune.model.watching import Watch, begin_gradients, expert_loop


def first_block(name: str):
    view = ModelView(tiny.model(name))
    hidden, arguments = view.record(tiny.ids(2, 12))
    return view, view.blocks[0], hidden, arguments[0]


def seen_in(name: str) -> tuple[nn.Module, dict[WeightRef, torch.Tensor]]:
    view, block, hidden, arguments = first_block(name)
    seen: dict[WeightRef, torch.Tensor] = {}
    with torch.no_grad(), expert_loop(view.model.config), Watch(block, weights_of(block), seen.__setitem__):
        call_block(block, hidden, arguments)
    return block, seen


def test_linear_layers_hand_on_the_very_tensor_that_they_read():
    block, seen = seen_in("llama")
    by_path = {ref.path: x for ref, x in seen.items()}
    assert set(by_path) == {ref.path for ref in weights_of(block)}
    assert by_path["self_attn.q_proj.weight"] is by_path["self_attn.k_proj.weight"]
    assert by_path["mlp.gate_proj.weight"] is by_path["mlp.up_proj.weight"]
    gate, up = (
        nn.functional.linear(by_path["mlp.gate_proj.weight"], block.get_parameter(f"mlp.{name}.weight"))
        for name in ("gate_proj", "up_proj")
    )
    torch.testing.assert_close(by_path["mlp.down_proj.weight"], nn.functional.silu(gate) * up)


def test_every_token_is_seen_by_as_many_experts_as_it_is_routed_to():
    block, seen = seen_in("qwen3_moe")
    down = {ref.expert: x for ref, x in seen.items() if ref.path.endswith("down_proj")}
    gate_up = {ref.expert: x for ref, x in seen.items() if ref.path.endswith("gate_up_proj")}
    assert sum(map(len, gate_up.values())) == 2 * 12 * 2  # two sequences of twelve tokens, two experts for each
    for expert, x in gate_up.items():
        gate, up = nn.functional.linear(x, block.mlp.experts.gate_up_proj[expert]).chunk(2, -1)
        torch.testing.assert_close(down[expert], nn.functional.silu(gate) * up)


def test_a_replaced_output_is_what_the_block_goes_on_with():
    for name, path, size in (
        ("llama", "mlp.down_proj.weight", 1),
        ("gpt2", "mlp.c_proj.weight", 1),
        ("qwen3_moe", "mlp.experts.down_proj", 4),
    ):
        view, block, hidden, arguments = first_block(name)
        refs = [ref for ref in weights_of(block) if ref.path == path]
        assert len(refs) == size
        with torch.no_grad(), expert_loop(view.model.config):
            with Watch(block, refs, replace=lambda ref, x, output: torch.zeros_like(output)):
                replaced = call_block(block, hidden, arguments)
            dense = call_block(block, hidden, arguments)
            for ref in refs:
                ref.view(block).zero_()
                if hasattr(block.mlp, "c_proj"):
                    block.mlp.c_proj.bias.zero_()
            zeroed = call_block(block, hidden, arguments)
        torch.testing.assert_close(replaced, zeroed)
        assert not torch.allclose(dense, zeroed)


def test_a_weight_of_several_modules_is_seen_in_each_and_named():
    block = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    block[2].weight = block[0].weight
    seen = []
    watch = Watch(block, weights_of(block), lambda ref, x: seen.append(x))
    block(torch.ones(2, 3))
    assert [ref.path for ref in watch.shared] == ["0.weight"]
    assert len(seen) == 2 and seen[0].equal(torch.ones(2, 3))
    watch.close()


def test_an_input_given_by_name_is_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):
            return self.inner(input=x)

    block, seen, x = Named(), [], torch.randn(4, 3)
    with Watch(block, weights_of(block), lambda ref, x: seen.append(x)):
        block(x)
    assert seen[0] is x


def test_a_pass_that_is_stopped_leaves_nothing_behind():
    """The mode in which experts are seen ends with the pass, however that ends, and a closed watch sees nothing."""
    view, block, hidden, arguments = first_block("mixtral")
    seen = []

    def see(ref, x):
        seen.append(ref)
        if ref.expert is not None:
            raise Stop

    watch = Watch(block, weights_of(block), see)
    assert watch.has_experts
    depth = torch._C._len_torch_function_stack()
    with torch.no_grad(), expert_loop(view.model.config):
        for _ in range(2):
            try:
                call_block(block, hidden, arguments)
            except Stop:
                pass
            else:
                raise AssertionError("no expert was seen")
            assert torch._C._len_torch_function_stack() == depth
        watch.close()
        seen.clear()
        call_block(block, hidden, arguments)
    assert seen == []


def test_gradients_begin_at_the_hidden_states():
    for name in ("llama", "bert"):
        _, block, hidden, arguments = first_block(name)
        block.requires_grad_(False)
        handle = begin_gradients(block)
        assert call_block(block, hidden, arguments).requires_grad
        handle.remove()
        assert not call_block(block, hidden, arguments).requires_grad
