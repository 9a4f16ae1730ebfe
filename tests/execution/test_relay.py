"""Passes that take turns: who moves when, what belongs to each thread, and how they end."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode

from pyprune.execution.relay import Abandoned, Pass

CPU = torch.device("cpu")


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pyprune-pass"]


def passes(told: list, *lengths: int) -> list[Pass]:
    found = []
    for k, steps in enumerate(lengths):
        holder: list[Pass] = []

        def work(steps=steps, k=k, holder=holder):
            for step in range(steps):
                told.append((k, step))
                holder[0].wait()
            return k

        holder.append(Pass(work, CPU))
        found += holder
    return found


def test_one_moves_at_a_time_in_the_order_asked():
    told: list = []
    one, other = passes(told, 2, 1)
    for which in (one, other, one):
        which.step()
    assert told == [(0, 0), (1, 0), (0, 1)] and not one.done and not other.done
    one.step()
    other.step()
    assert (one.done, one.result, other.done, other.result) == (True, 0, True, 1)
    assert not threads()


class Doubling(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out * 2 if func is torch.add else out


def test_modes_gradients_and_context_belong_to_each_pass():
    setting = contextvars.ContextVar("setting", default="none")
    token = setting.set("outer")
    seen = {}

    def work(name, mode, grad):
        with torch.set_grad_enabled(grad), mode:
            running[name].wait()
            seen[name] = (
                float(torch.add(torch.ones(()), 1)),
                torch.is_grad_enabled(),
                setting.get(),
                torch.get_num_threads(),
            )

    running = {
        "plain": Pass(lambda: work("plain", torch.overrides.BaseTorchFunctionMode(), True), CPU),
        "mode": Pass(lambda: work("mode", Doubling(), False), CPU),
    }
    setting.reset(token)
    threads_here = torch.get_num_threads()
    for each in (*running.values(), *running.values()):
        each.step()
    assert seen == {"plain": (2.0, True, "outer", threads_here), "mode": (4.0, False, "outer", threads_here)}
    assert torch.is_grad_enabled() and float(torch.add(torch.ones(()), 1)) == 2.0


def test_an_exception_comes_out_of_the_step_and_the_thread_is_gone():
    def work():
        raise KeyError("inside")

    one = Pass(work, CPU)
    with pytest.raises(KeyError, match="inside"):
        one.step()
    assert one.done and not threads()


def test_an_abandoned_pass_ends_where_it_stands():
    told: list = []
    one, never = passes(told, 3, 3)
    one.step()
    one.abandon()
    never.abandon()  # it has not begun
    assert told == [(0, 0)] and one.done and one.result is None and not threads()


def test_what_a_pass_cleans_up_is_cleaned_up_when_it_is_abandoned():
    told = []

    def work():
        try:
            one.wait()
        except Abandoned:
            told.append("abandoned")
            raise
        finally:
            told.append("closed")

    one = Pass(work, CPU)
    one.step()
    one.abandon()
    assert told == ["abandoned", "closed"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_pass_computes_on_its_maker_s_device_and_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        one = Pass(lambda: (torch.cuda.current_device(), torch.cuda.current_stream()), torch.device("cuda", 0))
    one.step()
    assert one.result == (0, stream)
