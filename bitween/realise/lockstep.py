"""Many runs of a model that wait for each other before every layer: each layer is dealt with once all inputs are there.

Where hidden states alone carry a model from block to block, blocks run one at a time. Any other module runs as a whole,
and a layer can be quantized on what the quantized layers before it give only while the run stands before that layer. So
every example gets a run of its own, in a thread that stops before the layer; one run moves at a time, so nothing ever
happens at once. Each example passes through the model once, whatever the number of layers.

A module that keeps something of its own between two layers (`self.x = ...`) would mix the runs up. `Lockstep.safe`
tells by comparing with runs one after the other; `step_by_step` does the same work without any run waiting, and passes
through the model once a layer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from bitween.model.replay import Stop

__all__ = ["Inputs", "Lockstep", "step_by_step"]

_THREADS = 256  # of torch's own, over all runs: each thread of ours that multiplies has workers of its own

# {number of the run: what the layer reads there}
Inputs = Mapping[int, torch.Tensor]


class _Run:
    """One example on its way through a model, in a thread that moves only when it is told to."""

    def __init__(self, number: int, work: Callable[[], Any], threads: int):
        self.number, self.work = number, work
        self.at: str | None = None  # the layer before which it stands; None when it has ended
        self.input: torch.Tensor | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.given_up = False
        self._threads = threads
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, daemon=True)

    def start(self) -> None:
        self.thread.start()
        self._stands.acquire()

    def advance(self) -> None:
        """Move on to the next stop, or the end."""
        self.at = self.input = None
        self._go.release()
        self._stands.acquire()

    def wait_before(self, name: str, x: torch.Tensor) -> None:
        """Called in the run's own thread."""
        self.at, self.input = name, x
        self._stands.release()
        self._go.acquire()
        if self.given_up:
            raise Stop

    def end(self) -> None:
        """Let a run that stands somewhere end there."""
        if self.thread.is_alive():
            self.given_up = True
            self._go.release()
            self.thread.join()

    def _main(self) -> None:
        try:
            torch.set_num_threads(self._threads)  # of this thread alone
            with torch.no_grad():
                self.output = self.work()
        except Stop:
            pass
        except BaseException as error:  # told in the thread that waits
            self.error = error
        finally:
            self.at = self.input = None
            self._stands.release()


class Lockstep:
    """Runs of one or more models that stop before the layers named.

    Parameters
    ----------
    models : modules that share their names; usually one under change, and the one that it came from
    names : of the layers, each with all modules that are this layer: {layer: (module names)}
    """

    def __init__(self, models: Sequence[nn.Module], names: Mapping[str, Sequence[str]]):
        self.models, self.names = models, names

    def run(self, works: Sequence[Callable[[], Any]], deal: Callable[[str, Inputs], None]) -> list[Any]:
        """Run all works, and call `deal(layer, inputs)` once for every layer that a run reaches.

        Works numbered alike are done alike for any number of them; when `deal` returns, the runs that stood before
        the layer go on through it.

        Returns
        -------
        What each work returned.
        """
        threads = max(1, min(torch.get_num_threads(), _THREADS // max(1, len(works))))
        runs = [_Run(i, work, threads) for i, work in enumerate(works)]
        by_thread: dict[int, _Run] = {}
        dealt: set[str] = set()
        places = {name: i for i, name in enumerate(self.names)}

        def stop_before(name: str) -> Callable:
            def hook(_module, args, kwargs):
                run = by_thread.get(threading.get_ident())
                if run is not None and name not in dealt:
                    run.wait_before(name, (args or tuple(kwargs.values()))[0].detach())

            return hook

        with ExitStack() as undo:
            for model in self.models:
                for name, uses in self.names.items():
                    for module in {id(m): m for m in map(model.get_submodule, uses)}.values():
                        undo.callback(
                            module.register_forward_pre_hook(stop_before(name), with_kwargs=True, prepend=True).remove
                        )
            try:
                for run in runs:
                    work = run.work
                    run.work = lambda run=run, work=work: self._as(by_thread, run, work)
                    run.start()
                    self._raise(run)
                while standing := [run for run in runs if run.at is not None]:
                    name = min((run.at for run in standing), key=places.__getitem__)
                    here = [run for run in standing if run.at == name]
                    deal(name, {run.number: run.input for run in here})
                    dealt.add(name)
                    for run in here:
                        run.advance()
                        self._raise(run)
            finally:
                for run in runs:
                    run.end()
        return [run.output for run in runs]

    def safe(self, works: Sequence[Callable[[], Any]], same: Callable[[Any, Any], bool]) -> bool:
        """Whether runs that wait for each other give what they give one after the other."""
        with torch.no_grad():
            alone = [work() for work in works]
        try:
            together = self.run(works, lambda _name, _inputs: None)
        except Exception:  # a module that notes where it is, and finds itself elsewhere
            return False
        return all(same(a, b) for a, b in zip(alone, together, strict=True))

    @staticmethod
    def _as(by_thread: dict[int, _Run], run: _Run, work: Callable[[], Any]) -> Any:
        by_thread[threading.get_ident()] = run
        try:
            return work()
        finally:
            by_thread.pop(threading.get_ident(), None)

    @staticmethod
    def _raise(run: _Run) -> None:
        if run.error is not None:
            raise run.error


def step_by_step(
    models: Sequence[nn.Module],
    names: Mapping[str, Sequence[str]],
    works: Sequence[Callable[[], Any]],
    deal: Callable[[str, Inputs], None],
    order: Iterable[str],
) -> None:
    """The same as `Lockstep.run`, with one run after the other up to each layer: as many passes as there are layers."""
    for name in order:
        found: dict[int, torch.Tensor] = {}
        current: list[int] = []

        def hook(_module, args, kwargs, found=found, current=current):
            found[current[-1]] = (args or tuple(kwargs.values()))[0].detach()
            raise Stop

        with ExitStack() as undo, torch.no_grad():
            for model in models:
                for module in {id(m): m for m in map(model.get_submodule, names[name])}.values():
                    undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True).remove)
            for i, work in enumerate(works):
                current.append(i)
                try:
                    work()
                except Stop:
                    continue
        if found:
            deal(name, found)
