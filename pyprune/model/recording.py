"""What a model's own forward pass does with its blocks, seen by running it with recorders in their places.

Learnt in this order, each from a pass over a few tokens, and from then on recorded batch by batch:

1. which blocks are applied, in which order (:attr:`Recorded.order`);
2. what blocks return beside the hidden states, where the model needs it (:attr:`Recorded.forms`);
3. which of their arguments depend on the tokens (:attr:`Recorded.tokenwise`), and that none depends on what will be
   pruned.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyprune.config import ConfigError
from pyprune.model.arguments import Arguments, Tokenwise, find_tokenwise, probe_batches, same, tidy
from pyprune.model.attributes import any_token, embedding_device, token_embedding, vocabulary_size


class Stop(Exception):
    """Ends a forward pass early."""


Call = tuple[int, Tensor, Arguments]
"""An application of a block: its place in the model's list, the hidden states and the rest that it was given."""


class Recorder(nn.Module):
    """Stands in for a block: keeps what it was called with and returns what ``give`` makes of that."""

    def __init__(self, block: nn.Module, place: int, calls: list[Call], give: Callable, end: int | None = None):
        """place: in the list of blocks. calls: of all recorders, to which each call is added. end: the number of calls
        with which the forward pass ends here."""
        super().__init__()
        object.__setattr__(self, "_block", block)  # not a submodule: the model must not see it twice
        self.place, self.calls, self.give, self.end = place, calls, give, end

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block, name)  # models read attributes such as ``attention_type`` off their blocks

    def forward(self, *args, **kwargs):
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        call = (self.place, hidden, Arguments(args, kwargs))
        self.calls.append(call)
        if len(self.calls) == self.end:
            raise Stop
        return self.give(self._block, *call)


def disturb(hidden: Tensor) -> Tensor:
    """Other hidden states of the same size, so that what is computed from them shows."""
    return hidden.flip(-1) + 1


COMPUTED = object()
"""In a block's form: what only the block itself can say."""

Form = tuple | None
"""What a block returns beside its hidden states: per entry an argument's place (the block passes it on), COMPUTED, or
in a one-tuple what is no tensor. None for a block that returns the hidden states alone."""


def _form(out, given: Arguments) -> Form:
    if not isinstance(out, (tuple, list)):
        return None
    places = {
        id(value): place
        for place, value in (*enumerate(given.args), *given.kwargs.items())
        if isinstance(value, Tensor)
    }
    return tuple(places.get(id(value), COMPUTED) if isinstance(value, Tensor) else (value,) for value in out[1:])


def call_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """Output hidden states of a block, whatever it wraps them in."""
    out = block(hidden, *arguments.args, **arguments.kwargs)
    return out[0] if isinstance(out, tuple) else out


class Repeated(nn.Module):
    """Blocks that one forward pass applies more than once, with all that lies between, as one block.

    Its arguments are those of every application; parts have their places in the model's list for names.
    """

    def __init__(self, blocks: nn.ModuleList, places: list[int]):
        super().__init__()
        first = {id(blocks[place]): str(place) for place in reversed(places)}
        self.order = [first[id(blocks[place])] for place in places]
        self.step = 0
        """The application at work."""
        for name in dict.fromkeys(self.order):
            self.add_module(name, blocks[int(name)])

    def forward(self, hidden: Tensor, steps: tuple[Arguments, ...]) -> Tensor:
        for step, (name, arguments) in enumerate(zip(self.order, steps, strict=True)):
            self.step = step
            hidden = call_block(self.get_submodule(name), hidden, arguments)
        return hidden


def _units(blocks: nn.ModuleList, order: list[int]) -> list[list[int]]:
    """The applications cut into the shortest runs such that no parameter is used in two of them."""
    last = {id(p): k for k, place in enumerate(order) for p in blocks[place].parameters()}
    units: list[list[int]] = [[]]
    end = 0
    for k, place in enumerate(order):
        units[-1].append(place)
        end = max([end, *(last[id(p)] for p in blocks[place].parameters())])
        if k == end < len(order) - 1:
            units.append([])
            end = k + 1
    return units


class Recorded:
    """A model as the blocks that its forward pass applies, and what it hands them."""

    def __init__(
        self, model: nn.Module, path: str, slots: nn.ModuleList, matrices: Callable[[nn.Module], list[Tensor]]
    ):
        """slots: the model's own list of blocks, at ``path``. matrices: what would be pruned of a block."""
        self.model, self.path, self.slots, self._matrices = model, path, slots, matrices
        self.hold: Callable = lambda index: contextlib.nullcontext()
        """Makes a block's weights real for the duration, where they come and go."""
        self.order, self._plain = self._applied()
        """Places in ``slots`` as one forward pass calls them."""
        units = _units(slots, self.order)
        self.shared = self.order != list(range(len(units)))
        """Whether the blocks are not simply those of the list, one by one; then every block is a :class:`Repeated`."""
        self.blocks = nn.ModuleList(Repeated(slots, unit) for unit in units) if self.shared else slots

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    @torch.no_grad()
    def _applied(self) -> tuple[list[int], bool]:
        """The order of the blocks in a forward pass over two tokens, and whether hidden states are all that they need
        to return.

        What cannot be followed so (a model without weights, say) is taken for a plain list; :meth:`record`, which
        calibration cannot do without, refuses what is none. Raises ConfigError if blocks are applied several times, but
        not each to the output of the one before.
        """
        calls: list[Call] = []
        outputs: list[Tensor] = []
        plain, whole = list(range(len(self.slots))), False
        weight = next(token_embedding(self.model).parameters())
        device = next((b.device for b in self.model.buffers()), None) if weight.is_meta else weight.device

        def give(block: nn.Module, place: int, hidden: Tensor, given: Arguments) -> Tensor:
            outputs.append(hidden.clone())
            return outputs[-1]

        ids = torch.full((1, 2), any_token(self.model), device=device)
        with contextlib.suppress(Exception):  # each architecture has its own way to miss what a block returns
            self._pass(ids, calls, give)
            whole = True
        order = [place for place, _, _ in calls]
        chained = all(hidden is before for (_, hidden, _), before in zip(calls[1:], outputs))
        if order == plain or set(order) != set(plain):
            return plain, whole and chained and order == plain and calls[0][1].shape[:-1] == ids.shape
        if not chained:
            raise ConfigError(
                f"{self._name} applies the blocks of {self.path} {len(order)} times in a forward pass, "
                "but not each to the output of the one before; such loops cannot be pruned"
            )
        return order, whole

    @functools.cached_property
    def _probes(self) -> tuple[Tensor, Tensor]:
        """Two batches of a few tokens that differ in the first of their two rows."""
        device = embedding_device(self.model)
        one, other = probe_batches(self.model.config, vocabulary_size(self.model))
        return one.to(device), other.to(device)

    @functools.cached_property
    def forms(self) -> list[Form]:
        """What each block of the list returns beside its hidden states. Nearly always that is nothing that matters, and
        no block has to run.

        Raises ConfigError where a pass block by block would not be the model's own.
        """
        forms: list[Form] = [None] * len(self.slots)
        if self._plain or self._applied()[1]:  # a streamed model's embeddings come after the view was made
            return forms
        ids = self._probes[0]
        calls: list[Call] = []
        known: dict[tuple, Form] = {}

        def learn(block: nn.Module, place: int, hidden: Tensor, given: Arguments):
            key = (type(block), tuple((n, tuple(p.shape)) for n, p in block.named_parameters()))
            if key not in known:
                known[key] = _form(*self._run(block, place, hidden, given))
            forms[place] = known[key]
            return self._returned(forms, block, place, hidden, given)

        try:
            self._pass(ids, calls, learn, end=len(self.order))
        except Exception as error:  # each architecture has its own way to miss what it needs
            raise ConfigError(
                f"{self._name} cannot be run block by block on token ids: {' '.join(str(error).split())[:300]}"
            ) from error
        self._check_chain(calls, ids)
        if not any(form and COMPUTED in form for form in forms):
            return forms
        # what is computed may be for others than the blocks: then it need not be
        hollow = [form and tuple((None,) if entry is COMPUTED else entry for entry in form) for form in forms]
        found: list[Call] = []
        with contextlib.suppress(Exception):  # as above
            self._pass(ids, found, functools.partial(self._returned, hollow), end=len(self.order))
            if len(found) == len(calls) and all(_same_arguments(one, other) for one, other in zip(found, calls)):
                return hollow
        return forms

    def _check_chain(self, calls: list[Call], ids: Tensor) -> None:
        """Every block of a pass must get what the one before it returned, as ``[sequences, tokens, hidden]``."""
        if not calls:
            raise ConfigError(f"{self._name} calls none of its blocks; it cannot be pruned block by block")
        first = calls[0][1]
        if first.shape[:-1] != ids.shape:
            raise ConfigError(
                f"{self._name} passes states of shape {list(first.shape)} between its blocks for "
                f"{ids.shape[0]} sequences of {ids.shape[1]} tokens; only [sequences, tokens, hidden] "
                "can be stored and calibrated block by block"
            )
        for (before, *_), (place, hidden, _) in zip(calls, calls[1:]):
            if not same(hidden, first):
                raise ConfigError(
                    f"{self._name} changes the hidden states between its blocks {before} and {place}: "
                    "pruning block by block would not follow its forward pass"
                )

    @functools.cached_property
    def tokenwise(self) -> Tokenwise:
        """Which arguments of the blocks depend on the tokens, found by recording different ones; costs three small
        embeddings. Raises ConfigError for a model whose blocks cannot be run apart from it."""
        return find_tokenwise(self._name, self._recorded, self._probes)

    def record(self, input_ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """First-block input ``[batch, tokens, hidden]`` and each block's arguments, for unpadded ids of one length.

        Runs the model's own forward with recorders in place of the blocks, so masks, rotary embeddings and per-layer
        attention kinds are the model's own; costs the embedding only, and the blocks that make arguments of later ones
        (T5's first). Raises ConfigError where a pass block by block would not be the model's own.
        """
        self.tokenwise.numbers([])
        return self._recorded(input_ids)

    @torch.no_grad()
    def _recorded(self, input_ids: Tensor, disturbed: bool = False) -> tuple[Tensor, list[Arguments]]:
        """disturbed: the stand-ins change the states, and what blocks compute for later ones they compute without the
        weights that would be pruned, so that arguments show which depend on either."""
        calls: list[Call] = []
        self._pass(
            input_ids, calls, functools.partial(self._returned, self.forms, disturbed=disturbed), end=len(self.order)
        )
        if [place for place, _, _ in calls] != self.order:
            raise ConfigError(
                f"{self._name} called {len(calls)} of its {len(self.order)} blocks in one forward pass; "
                "its block order cannot be followed"
            )
        steps = [tidy(self._name, given) for _, _, given in calls]
        if not self.shared:
            return calls[0][1], steps
        rest = iter(steps)
        return calls[0][1], [
            Arguments((tuple(next(rest) for _ in block.order),), {})
            for block in self.blocks
            if isinstance(block, Repeated)
        ]

    @torch.no_grad()
    def complete(self, input_ids: Tensor, outputs):
        """The model's output when its last block returns ``outputs``: final norm and head, no block runs."""
        calls: list[Call] = []

        def give(block: nn.Module, place: int, hidden: Tensor, given: Arguments):
            if len(calls) < len(self.order):
                return self._returned(self.forms, block, place, hidden, given)
            if isinstance(outputs, Tensor) and (form := self.forms[place]) is not None:
                return (outputs, *(None for _ in form))
            return outputs

        return self._pass(input_ids, calls, give)

    def _returned(
        self, forms: list[Form], block: nn.Module, place: int, hidden: Tensor, given: Arguments, disturbed: bool = False
    ):
        """What a stand-in returns: the hidden states it was given, and beside them what the block's form says."""
        hidden, form = disturb(hidden) if disturbed else hidden, forms[place]
        if form is None:
            return hidden
        computed = self._run(block, place, hidden, given, disturbed)[0] if COMPUTED in form else ()
        return (
            hidden,
            *(
                computed[k]
                if entry is COMPUTED
                else entry[0]
                if isinstance(entry, tuple)
                else given.args[entry]
                if isinstance(entry, int)
                else given.kwargs[entry]
                for k, entry in enumerate(form, 1)
            ),
        )

    def _run(self, block: nn.Module, place: int, hidden: Tensor, given: Arguments, hollow: bool = False):
        """A block's output, and its arguments in its own type; hollow: without the weights that would be pruned."""
        with self.hold(place):
            own = next(p for p in block.parameters() if p.is_floating_point())
            if hollow:
                block = copy.deepcopy(block)
                for matrix in self._matrices(block):
                    matrix.zero_()
            given = given.to(own.device, own.dtype, {})
            return block(hidden.to(own.device, own.dtype), *given.args, **given.kwargs), given

    def _pass(self, input_ids: Tensor, calls: list[Call], give: Callable, end: int | None = None):
        """The model's own forward with recorders in place of its blocks."""
        with contextlib.suppress(Stop), torch.no_grad():
            return self._forward(
                input_ids, [Recorder(block, place, calls, give, end) for place, block in enumerate(self.slots)]
            )

    def _forward(self, input_ids: Tensor, stand_ins: list[nn.Module]):
        originals = list(self.slots)
        try:
            for i, module in enumerate(stand_ins):
                self.slots[i] = module
            with uncached(self.model) as options:
                return self.model(input_ids, **options)
        finally:
            for i, block in enumerate(originals):
                self.slots[i] = block


def _same_arguments(one: Call, other: Call) -> bool:
    first, second = one[2].values(), other[2].values()
    return first.keys() == second.keys() and all(same(value, second[path]) for path, value in first.items())


@contextlib.contextmanager
def uncached(model: nn.Module) -> Iterator[dict]:
    """The model makes no cache for the duration, whatever its head: its configurations say so, and so do the options
    yielded, to be passed to its forward where that has the parameter."""
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if getattr(getattr(m, "config", None), "use_cache", False)
    }
    try:
        for config in configs.values():
            config.use_cache = False
        yield {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    finally:
        for config in configs.values():
            config.use_cache = True
