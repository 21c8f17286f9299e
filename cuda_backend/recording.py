"""How a decoding step is recorded: in a CUDA graph, or by a stand-in for the CPU, which calls it again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mlx_kvret.errors import UnsupportedFeatureError

from .kernels.dispatch import enabled

_here = threading.local()
Work = Callable[[], None]

_ASKS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::is_nonzero"}
_ASKS |= {"aten::_unique2", "aten::unique_dim", "aten::repeat_interleave"}


def watched() -> bool:
    """Whether work is looked at operation by operation in this thread, which nothing compiled shows."""
    return bool(getattr(_here, "watched", False))


class Recorder(Protocol):
    """Records ``work`` once and repeats it on the same memory. What fails leaves nothing to repeat."""

    def record(self, work: Work, prepare: Work) -> None:
        """``prepare`` comes before each of the runs that this takes, and is not recorded."""

    def repeat(self, work: Work) -> None: ...


class Graph:
    """A CUDA graph; graphs of one ``pool`` share what they need in between, and run one after the other."""

    def __init__(self, pool: Any = None, device: torch.device | None = None) -> None:
        self._pool, self._device = pool, device
        self._graph: Any = None

    def record(self, work: Work, prepare: Work) -> None:
        with torch.cuda.device(self._device):
            self._record(work, prepare)

    def _record(self, work: Work, prepare: Work) -> None:
        # first runs on another stream, for what libraries allocate once, and to see what no graph can repeat
        stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(before)
        with torch.cuda.stream(stream):
            prepare()
            work()
            prepare()
            with Watched():
                work()
        before.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        how: dict[str, Any] = {"pool": self._pool, "capture_error_mode": "thread_local"}
        with _restored(), torch.cuda.graph(graph, **how):
            work()
        self._graph = graph

    def repeat(self, work: Work) -> None:
        with torch.cuda.device(self._device):
            self._graph.replay()


class Called:
    """The stand-in for a graph where there is no GPU: the same fixed memory, and every repetition a call."""

    def record(self, work: Work, prepare: Work) -> None:
        prepare()
        work()
        prepare()
        with Watched():
            work()

    def repeat(self, work: Work) -> None:
        work()


def recorder(device: torch.device) -> Callable[[], Recorder] | None:
    """What makes recorders for a device, or None where steps are not worth recording."""
    if not enabled(device):
        return None
    pool = torch.cuda.graph_pool_handle()
    return lambda: Graph(pool, device)


class Watched(TorchDispatchMode):
    """Refuses work that waits for its device, which no graph can repeat.

    Raises:
        UnsupportedFeatureError: names the operation.
    """

    def __enter__(self) -> Any:
        _here.watched = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        _here.watched = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        masks = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in _ASKS or masks or _crosses(name, args, kwargs):
            raise UnsupportedFeatureError(f"the model waits for its device in every step ({name})")
        return func(*args, **kwargs)


def _crosses(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation copies between the host and a GPU, whose memory a graph would read again later."""
    held = [a for a in args[:2] if isinstance(a, torch.Tensor)]
    if name == "aten::copy_":
        return len({a.device.type for a in held}) > 1
    target = kwargs.get("device")
    copies = name == "aten::_to_copy" and target is not None and bool(held)
    return copies and torch.device(target).type != held[0].device.type


@contextmanager
def _restored() -> Iterator[None]:
    """A capture that fails leaves neither its stream nor its random numbers behind."""
    stream = torch.cuda.current_stream()
    try:
        yield
    except BaseException:
        torch.cuda.set_stream(stream)
        random = torch.cuda.default_generators[stream.device_index]
        # a copy that no capture has a hold on
        random.graphsafe_set_state(random.clone_state())
        raise
