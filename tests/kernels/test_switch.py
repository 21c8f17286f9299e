"""Which path is taken, and what happens where there is no kernel or it cannot be built."""

import warnings

import mlx.core as mx
import pytest
from metal_host import EMULATED, installed

from mlx_kvret.errors import ConfigError, KernelError
from mlx_kvret.mlx_backend import attention, kernels
from mlx_kvret.mlx_backend.kernels import decode_attention, score_select
from mlx_kvret.mlx_backend.kernels.launch import Kernel

from .cases import batch_with, uniform, view_with


@pytest.fixture
def choose(monkeypatch):
    kernels._warn.cache_clear()
    return lambda choice: monkeypatch.setenv(kernels.VARIABLE, choice)


def test_auto_is_metal_where_there_is_one(choose, monkeypatch):
    choose("auto")
    assert kernels.status().path == ("reference" if EMULATED else "metal")
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M9"})
    assert str(kernels.status()) == "metal (Apple M9 has Metal)"
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert str(kernels.status()) == "reference (MLX's default device is the CPU)"


@pytest.mark.parametrize("choice", ["metal", "reference"])
def test_a_choice_is_followed(choose, choice):
    choose(choice)
    assert str(kernels.status()) == f"{choice} (MLX_KVRET_KERNELS={choice})"


def test_another_choice_is_refused(choose):
    choose("fast")
    with pytest.raises(
        ConfigError, match=r"MLX_KVRET_KERNELS is 'fast'; expected one of auto, metal, reference"
    ):
        kernels.status()


@pytest.mark.parametrize(
    ("size", "types", "message"),
    [
        (24, (mx.float32,) * 3, "no attention kernel for heads of 24"),
        (64, (mx.float16, mx.float32, mx.float32), "no attention kernel for float16 with float32"),
    ],
)
def test_without_a_kernel_the_reference_serves_and_warns_once(choose, size, types, message):
    view = view_with([5, 0], 3, size, size, types[1])
    queries = uniform(1, 4, 2, size, dtype=types[0])
    choose("reference")
    expected = attention.attend(queries, view, 0.3)
    choose("metal")
    with pytest.warns(UserWarning, match=message):
        assert mx.array_equal(attention.attend(queries, view, 0.3), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.attend(queries, view, 0.3)


def test_a_kernel_that_cannot_be_built_says_which(monkeypatch):
    def broken(**options):
        def kernel(**call):
            raise RuntimeError(
                "[metal::Device] Unable to build metal library from source\nerror: no such type"
            )

        return kernel

    monkeypatch.setattr(mx.fast, "metal_kernel", broken)
    with pytest.raises(
        KernelError, match=r"(?s)cannot build .*/head_counts\.metal for int32, .*BINS=6.*no such type"
    ):
        score_select.head_counts(mx.zeros((1, 20), mx.int32), 5)


@pytest.mark.parametrize(
    "error",
    [
        ValueError(
            "Thread group size (1024) is greater than the maximum allowed threads per threadgroup (640)"
        ),
        RuntimeError("[metal::Device] Unable to build metal library from source\nerror: no such type"),
    ],
    ids=["threads", "source"],
)
def test_a_refused_kernel_gives_way_to_the_reference(monkeypatch, choose, error):
    calls, words = [], f"refused {type(error).__name__}"

    def kernel(**call):
        calls.append(call)
        raise type(error)(f"{error} {words}")

    view = view_with([5, 0], 3, 64, 64)
    queries = uniform(1, 4, 1, 64)
    choose("reference")
    expected = attention.attend(queries, view, 0.3)
    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **options: kernel)
    choose("metal")
    with pytest.raises(KernelError, match=words):
        attention.attend(queries, view, 0.3)
    choose("auto")
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.enabled", lambda: True)
    with pytest.warns(UserWarning, match=f"(?s){words}.*using the slower reference"):
        assert mx.array_equal(attention.attend(queries, view, 0.3), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mx.array_equal(attention.attend(queries, view, 0.3), expected)
    with pytest.warns(UserWarning, match="(?s)head_counts.*using the slower reference"):
        pool = view_with([5, 0], 3, 64, 64).pool
    assert pool.lookup.on_host().tolist() == view.pool.lookup.on_host().tolist()
    # what was refused is not tried again
    assert len(calls) <= 3


def test_other_errors_stay_what_they_are(monkeypatch):
    def kernel(**call):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mx.fast, "metal_kernel", lambda **options: kernel)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        score_select.head_counts(mx.zeros((1, 20), mx.int32), 5)
    assert not isinstance(caught.value, KernelError)


@pytest.mark.skipif(not EMULATED, reason="there is Metal")
def test_metal_without_metal_says_what_to_set():
    with pytest.raises(
        KernelError, match="needs Metal and this MLX has none; set MLX_KVRET_KERNELS=reference"
    ):
        score_select.head_counts(mx.zeros((1, 20), mx.int32), 5)


@pytest.mark.skipif(not EMULATED, reason="counts what is handed to the emulator")
def test_another_number_of_rows_is_the_same_kernel():
    sources = set()
    for rows in (1, 2, 3, 5):
        view = batch_with([[4, 9]] * rows, [2] * rows, 32)
        with installed():
            decode_attention._launches.cache_clear()
            decode_attention._attend._made.clear()
            decode_attention.decode_attention(uniform(rows, 4, 1, 32), view, 0.3, True, None)
            (made,) = decode_attention._attend._made.values()
            sources |= {build.kernel.source for build in made.builds.values()}
    assert len(sources) == 1


@pytest.mark.skipif(not EMULATED, reason="counts what is handed to the emulator")
def test_a_kernel_is_made_once():
    kernel = Kernel("head_counts", ["owner"], ["counts"], atomic=True)
    with installed():
        for bins in (3, 3, 4):
            kernel(
                [mx.zeros((1, 9), mx.int32)],
                [((1, bins), mx.int32)],
                (1, 1, 1),
                32,
                0,
                S=1,
                BLOCK=9,
                BINS=bins,
            )
        (made,) = kernel._made.values()
    assert len(made.builds) == 2
