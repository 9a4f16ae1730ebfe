"""A CUDA device that is none: tensors that say they are on ``cuda:0`` and lie in host memory, and who waits for them.

Whole runs go through it as on a GPU, by the reference ops (nothing else runs on such tensors): the branches for a GPU
are taken, and what would make the host wait is counted with the line of the package that asked: numbers read from the
device, sizes that depend on data, copies between host and device that are not from or to pinned memory, streams that
are waited for. It knows nothing of the order of streams, which tests/execution/test_activation_store.py simulates.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from pyprune.execution.relay import Pass
from pyprune.execution.residency import Arrivals
from pyprune.ops import reference
from pyprune.reconstruction.trained_window import TrainedWindow

aten = torch.ops.aten
READS = {
    getattr(Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__format__", "__array__")
}
SIZED = (aten.nonzero.default, aten.masked_select.default, aten.equal.default, aten._unique2.default)
OPERATORS = {"__invert__": "bitwise_not"}

waits: Counter = Counter()
"""Kind of wait, file and line of the package → how often."""
graphs: Counter = Counter()
"""``recorded`` and ``replayed`` → how often."""
_pinned: set[int] = set()
_recording: Recording | None = None


def waited(kind: str) -> None:
    """Count a wait where the package, or the model's own code, asked for it; a recording does not allow any."""
    if _recording is not None:
        raise RuntimeError(f"{kind}: operation not permitted when stream is capturing")
    frame = sys._getframe(1)
    while frame is not None and not any(part in frame.f_code.co_filename for part in ("/pyprune/", "/transformers/")):
        frame = frame.f_back
    place = "elsewhere" if frame is None else f"{'/'.join(frame.f_code.co_filename.split('/')[-2:])}:{frame.f_lineno}"
    waits[kind, place] += 1


class OnDevice(Tensor):
    """A tensor of the simulated device around one in host memory."""

    @staticmethod
    def __new__(cls, inside: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls,
            inside.size(),
            strides=inside.stride(),
            storage_offset=inside.storage_offset(),
            dtype=inside.dtype,
            device="cuda:0",
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            if isinstance(args[0], cls):
                waited("read")
            return func(_inside(args[0]), *args[1:], **kwargs)
        if func is Tensor.__getitem__:
            return _take(*args)
        if func is Tensor.__setitem__:
            return _put(*args)
        if func is Tensor.copy_ and not torch.is_grad_enabled():
            return _run(aten.copy_.default, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            try:
                return func(*args, **kwargs)
            except RuntimeError as error:  # a method that looks for the device's driver before it is dispatched
                if "not linked with support" not in str(error):
                    raise
                return getattr(aten, OPERATORS.get(func.__name__, func.__name__))(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _inside(x):
    return x.inside if isinstance(x, OnDevice) else x


def _is_pinned(x: Tensor) -> bool:
    return not isinstance(x, OnDevice) and x.untyped_storage().data_ptr() in _pinned


def _pin(x: Tensor) -> Tensor:
    pinned = x.clone()
    _pinned.add(pinned.untyped_storage().data_ptr())
    return pinned


def _run(func, args, kwargs):
    """An operator on what the tensors hold; its results are on the device if any tensor was, or if it says so."""
    flat = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    on, kwargs = any(isinstance(x, OnDevice) for x in flat), dict(kwargs)
    pin = kwargs.pop("pin_memory", None)
    if func is aten._fused_sdp_choice.default:
        return 0  # attention written out: the fused kernels are the real device's
    if on and func in SIZED:
        waited(f"size of {func}")
    if func is aten._local_scalar_dense.default and on:
        waited("read")
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = torch.device("cpu")
        if (
            func is aten._to_copy.default
            and there != on
            and not (there and kwargs.get("non_blocking") and _is_pinned(args[0]))
        ):
            waited("copy to the device" if there else "copy to the host")
        on = there
    if func is aten.copy_.default:
        target, source = args[0], args[1]
        on = isinstance(target, OnDevice)
        if on != isinstance(source, OnDevice) and (source.ndim or not on):
            host = source if on else target
            if not (_is_pinned(host) and (kwargs.get("non_blocking") or args[2:] == (True,))):
                waited("copy to the device" if on else "copy to the host")
    inside = tree_map(_inside, (args, kwargs))
    out = _recording.take(func, *inside) if on and _recording is not None else func(*inside[0], **inside[1])
    given = {id(_inside(x)): x for x in flat}

    def wrap(x):
        if not isinstance(x, Tensor) or id(x) in given:
            return given.get(id(x), x)
        if pin:
            _pinned.add(x.untyped_storage().data_ptr())
        return OnDevice(x) if on else x

    return tree_map(wrap, out)


def _take(x: Tensor, index):
    """``x[index]`` by operators alone; indexing looks for the device's driver."""
    index = index if isinstance(index, tuple) else (index,)
    eaten = sum(
        i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None and i is not ... for i in index
    )
    out, dim, gathered = aten.alias(x), 0, {}
    for i in index:
        if i is ...:
            dim += x.ndim - eaten
        elif i is None:
            out, dim = aten.unsqueeze(out, dim), dim + 1
        elif isinstance(i, slice):
            out, dim = aten.slice(out, dim, i.start, i.stop, i.step or 1), dim + 1
        elif isinstance(i, (Tensor, list)):
            if isinstance(i, Tensor) and i.dtype == torch.bool:
                waited("size of an index")
            gathered[dim] = i if isinstance(i, Tensor) else torch.tensor(i, device=x.device)
            dim += gathered[dim].ndim if gathered[dim].dtype == torch.bool else 1
        else:
            out = aten.select(out, dim, int(i))
    if gathered:
        out = aten.index(out, [gathered.get(d) for d in range(max(gathered) + 1)])
    return out


def _put(x: Tensor, index, value) -> None:
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, Tensor) for i in index):
        if any(isinstance(i, Tensor) and i.dtype == torch.bool for i in index) and getattr(value, "ndim", 0):
            waited("size of an index")
        value = value if isinstance(value, Tensor) else torch.tensor(value, dtype=x.dtype, device=x.device)
        aten.index_put_(x, list(index), value)
        return
    view = _take(x, index)
    view.copy_(value) if isinstance(value, Tensor) else view.fill_(value)


class _Stream:
    cuda_stream = 0

    def __init__(self, *args, **options): ...

    def wait_stream(self, other): ...

    def wait_event(self, event): ...

    def record_event(self, event=None):
        return event or _Event()

    def synchronize(self):
        waited("stream")


class _Event:
    def __init__(self, *args, **options): ...

    def record(self, stream=None): ...

    def elapsed_time(self, other) -> float:
        return 1.0

    def synchronize(self):
        waited("event")


class Recording:
    """Operators between the begin and the end of a recorded graph, and the memory they work on.

    As on a GPU, nothing of it has happened when it ends, and what it makes lies in its own memory: undefined until a
    replay, which does everything again on the memory that was recorded.
    """

    def __init__(self):
        self.calls: list[tuple] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: dict[int, Tensor] = {}

    def take(self, func, args, kwargs):
        for x in tree_flatten((args, kwargs))[0]:
            if isinstance(x, Tensor) and not {x.untyped_storage().data_ptr()} & {*self.before, *self.made}:
                self.before[x.untyped_storage().data_ptr()] = _bytes(x), _bytes(x).clone()
        out = func(*args, **kwargs)
        found = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor)]
        for x in found:
            if x.untyped_storage().data_ptr() not in self.before:
                self.made[x.untyped_storage().data_ptr()] = x
        self.calls.append((func, args, kwargs, found))
        return out

    def end(self):
        for place, was in self.before.values():
            place.copy_(was)
        for x in self.made.values():
            _bytes(x).fill_(255)  # NaN

    def replay(self):
        for func, args, kwargs, found in self.calls:
            again = [x for x in tree_flatten(func(*args, **kwargs))[0] if isinstance(x, Tensor)]
            for place, x in zip(found, again, strict=True):
                if place.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
                    place.copy_(x)


def _bytes(x: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


class _Graph:
    recording: Recording

    def replay(self):
        self.recording.replay()
        graphs["replayed"] += 1


@contextlib.contextmanager
def _graph(graph, **options):
    global _recording
    waited("device")
    _recording = graph.recording = Recording()
    try:
        yield
    finally:
        _recording = None
        graph.recording.end()
    graphs["recorded"] += 1


def _in_mode(method):
    """Modes belong to a thread: those that the package starts need theirs."""

    def there(*args):
        with _Mode():
            return method(*args)

    return there


def _without_gradients(accumulate):
    """The engine of gradients asks for the device's driver: steps of training have none here, and change nothing."""

    def forward_only(self, parts):
        with (
            mock.patch.object(torch, "enable_grad", torch.no_grad),
            mock.patch.object(Tensor, "backward", lambda loss: None),
        ):
            return accumulate(self, parts)

    return forward_only


def _follows(to):
    """A parameter's class has to follow its device."""

    def swapping(*args, **kwargs):
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return to(*args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    return swapping


def _made(tensor):
    """``torch.tensor`` copies to its device below everything that could be overridden."""

    def made(data, *, device=None, **options):
        return tensor(data, **options) if device is None else tensor(data, **options).to(device)

    return made


def _at_once(op):
    """The column loop in one step: thousands of small operators would take seconds here."""

    def done(*args, **kwargs):
        inside = tree_map(_inside, (args, kwargs))
        found = op(*inside[0], **inside[1]) if _recording is None else _recording.take(op, *inside)
        return tree_map(lambda x: OnDevice(x) if isinstance(x, Tensor) else x, found)

    return done


@contextlib.contextmanager
def present(memory: int = 10**11):
    """The device is there inside the ``with`` block, with ``memory`` bytes free; yields :data:`waits`, emptied."""
    _device_constructors()  # torch remembers them at first use, and that must not be the replaced torch.tensor
    stream = _Stream()
    there = dict(
        _lazy_init=lambda: None,
        is_available=lambda: True,
        current_device=lambda: 0,
        Stream=_Stream,
        Event=_Event,
        CUDAGraph=_Graph,
        graph=_graph,
        graph_pool_handle=tuple,
        current_stream=lambda device=None: stream,
        stream=lambda stream: contextlib.nullcontext(),
        device=lambda device: contextlib.nullcontext(),
        mem_get_info=lambda device=None: (memory, memory),
        synchronize=lambda device=None: waited("device"),
        empty_cache=lambda: None,
        reset_peak_memory_stats=lambda device=None: None,
        **dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated"), lambda device=None: 0),
    )
    replaced = [
        *((torch.cuda, name, value) for name, value in there.items()),
        (Tensor, "is_pinned", lambda x, device=None: _is_pinned(x)),
        (Tensor, "pin_memory", _pin),
        (Tensor, "record_stream", lambda x, stream: None),
        (reference, "obs_sweep", _at_once(reference.obs_sweep)),
        (OnDevice, "requires_grad_", lambda x, on=True: x),
        (Pass, "_run", _in_mode(Pass._run)),
        (Arrivals, "_copy", _in_mode(Arrivals._copy)),
        (TrainedWindow, "accumulate", _without_gradients(TrainedWindow.accumulate)),
        (nn.Module, "to", _follows(nn.Module.to)),
        (torch, "tensor", _made(torch.tensor)),
    ]
    waits.clear()
    graphs.clear()
    with contextlib.ExitStack() as held:
        for owner, name, value in replaced:
            held.enter_context(mock.patch.object(owner, name, value, create=True))
        held.enter_context(_Mode())
        yield waits
    _pinned.clear()
