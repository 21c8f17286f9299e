"""Capture, launch, counting and the harness's own errors."""

import mlx.core as mx
import numpy as np
import pytest

from metal_host import EMULATED, KernelError, ToolchainError, build, check, count, installed
from metal_host import example_kernels as examples

emulated_only = pytest.mark.skipif(not EMULATED, reason="about the emulator")

WHERE = """
const uint3 g = thread_position_in_grid, t = thread_position_in_threadgroup, b = threadgroup_position_in_grid;
const uint3 n = threads_per_grid, s = threads_per_threadgroup;
const uint at = (g.z * n.y + g.y) * n.x + g.x;
out[at * 4 + 0] = int(b.x + 10 * b.y + 100 * b.z);
out[at * 4 + 1] = int(t.x + 10 * t.y + 100 * t.z);
out[at * 4 + 2] = int(s.x + 10 * s.y + 100 * s.z);
out[at * 4 + 3] = int(thread_index_in_threadgroup * 10 + threadgroups_per_grid.x);
"""


def simple(source, inputs, shape, grid, threadgroup=(32, 1, 1), dtype=mx.float32, **options):
    with installed():
        names = [f"x{i}" for i in range(len(inputs))]
        kernel = mx.fast.metal_kernel(
            name="simple", input_names=names, output_names=["out"], source=source, **options
        )
        return kernel(
            inputs=inputs, output_shapes=[shape], output_dtypes=[dtype], grid=grid, threadgroup=threadgroup
        )[0]


def test_a_thread_knows_its_place_in_a_grid_with_ragged_edges():
    grid, full = (7, 5, 3), (4, 2, 2)
    got = simple(WHERE, [mx.zeros(1)], (3, 5, 7, 4), grid, full, mx.int32)
    wanted = np.zeros((3, 5, 7, 4), np.int32)
    for z, y, x in np.ndindex(3, 5, 7):
        p = np.array([x, y, z])
        b, t = p // full, p % full
        s = np.minimum(full, grid - b * full)
        index = (t[2] * s[1] + t[1]) * s[0] + t[0]
        wanted[z, y, x] = [
            b @ (1, 10, 100),
            t @ (1, 10, 100),
            s @ (1, 10, 100),
            index * 10 + 2,
        ]
    assert (np.array(got) == wanted).all()


@pytest.mark.parametrize("size", [0, 1, 7, 8, 100], ids="{} elements".format)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int8, mx.uint16, mx.int64, mx.bool_], ids=str)
def test_inputs_of_every_size_and_type(size, dtype):
    """Below 8 elements MLX makes an input `constant`."""
    x = mx.arange(max(size, 1)).astype(dtype)[:size]
    total = "float s = 0.0f; for (int i = 0; i < x0_shape[0]; i++) s += float(x0[i]);"
    source = total + " out[thread_position_in_grid.x] = s;"
    assert simple(source, [x], (1,), (1, 1, 1)).item() == float(mx.sum(x.astype(mx.float32)).item())


def test_scalars_and_python_numbers():
    source = "out[thread_position_in_grid.x] = float(x0) + x1 + float(x2);"
    got = simple(source, [3, mx.array(0.5), mx.array(2, dtype=mx.int8)], (1,), (1, 1, 1))
    assert got.item() == 5.5


def test_strides_reach_the_kernel_unchanged():
    x = mx.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[1:, :, ::2]
    location = "elem_to_loc(i, x0_shape, x0_strides, x0_ndim)"
    source = f"const uint i = thread_position_in_grid.x; out[i] = x0[{location}];"
    got = simple(source, [x], x.shape, (x.size, 1, 1), dtype=mx.int32, ensure_row_contiguous=False)
    assert (got == x).all().item()


@emulated_only
def test_counts_are_exact():
    lengths = [40, 0, 1]
    example = examples.attention(lengths)
    traffic = count(example.call)
    (launch,) = traffic.launches
    kept, size, heads = sum(lengths), 64, 2  # query heads per KV head
    half = 2
    for name in ("keys", "values"):
        assert traffic.total("loaded", name) == heads * kept * size * half
        assert traffic.total("loaded_distinct", name) == kept * size * half
    assert traffic.total("stored", "out") == traffic.total("stored_distinct", "out") == 6 * size * half
    assert traffic.total("loaded", "out") == traffic.total("stored", "keys") == 0
    assert traffic.barriers == 6  # one per threadgroup
    simdgroups = 4
    assert traffic.simdgroup_ops == heads * kept + 2 * simdgroups * 6
    assert traffic.threadgroup_memory == 16 + 16 + simdgroups * size * 4
    assert launch.work("keys", "values").tolist() == [
        n * size * half * 2 for n in lengths for _ in range(heads)
    ]


@emulated_only
def test_a_byte_loaded_by_all_threads_counts_once_per_threadgroup():
    source = "out[thread_position_in_grid.x] = x0[0] + x0[thread_index_in_threadgroup];"
    traffic = count(lambda: simple(source, [mx.zeros(64)], (128,), (128, 1, 1), (64, 1, 1)))
    assert traffic.total("loaded", "x0") == 128 * 2 * 4
    assert traffic.total("loaded_per_threadgroup", "x0") == 2 * 64 * 4
    assert traffic.total("loaded_distinct", "x0") == 64 * 4


@emulated_only
@pytest.mark.parametrize(
    "grid,threadgroup,message",
    [((0, 1, 1), (32, 1, 1), "empty"), ((2048, 1, 1), (2048, 1, 1), "2048 threads; Metal allows 1024")],
)
def test_impossible_launches(grid, threadgroup, message):
    with pytest.raises(KernelError, match=message):
        simple("out[0] = x0[0];", [mx.zeros(8)], (1,), grid, threadgroup)


@emulated_only
def test_more_buffers_than_metal_allows():
    with pytest.raises(KernelError, match="33 buffers; Metal allows 31"):
        simple("out[0] = x0[0];", [mx.zeros(8)] * 32, (1,), (1, 1, 1))


@emulated_only
@pytest.mark.parametrize(
    "got,wanted", [(1.0, np.inf), (-np.inf, np.inf), (np.inf, 1.0), (np.nan, 1.0), (1.0, np.nan)]
)
def test_no_tolerance_between_finite_and_not(got, wanted):
    def call():
        return simple("out[0] = x0[0];", [mx.full(8, got)], (1,), (1, 1, 1))

    with pytest.raises(KernelError, match="differ from the twin"):
        check(call, lambda: mx.full(1, wanted), 0.1, passes=["run"])
    check(call, lambda: mx.full(1, got), passes=["run"])


@emulated_only
def test_a_call_that_launches_nothing_proves_nothing():
    for prove in (count, lambda call: check(call, call)):
        with pytest.raises(KernelError, match="launched no kernel"):
            prove(lambda: mx.zeros(3))


@emulated_only
def test_the_signature_that_mlx_gets_wrong():
    with installed():
        source = "a[0] = x_shape[0]; b[0] = x[0];"  # two outputs, a shape, no attribute
        kernel = mx.fast.metal_kernel(name="two", input_names=["x"], output_names=["a", "b"], source=source)
    one = (1, 1, 1)
    call = {"output_shapes": [(1,)] * 2, "output_dtypes": [mx.float32] * 2, "grid": one, "threadgroup": one}
    with pytest.raises(KernelError, match="mentions a thread attribute"):
        kernel(inputs=[mx.zeros(9)], **call)


@emulated_only
def test_a_kernel_that_hangs_is_stopped(monkeypatch):
    monkeypatch.setattr("metal_host.launch.TIMEOUT", 1)
    source = "volatile float never = x0[0]; while (never == 0.0f) {} out[0] = never;"
    with pytest.raises(KernelError, match="did not end within 1 s"):
        check(lambda: simple(source, [mx.zeros(8)], (1,), (1, 1, 1)), lambda: mx.zeros(1))


@emulated_only
def test_a_report_names_the_line():
    source = "const uint i = thread_position_in_grid.x;\n\nout[i] = x0[i + 1];"
    for passes, message in (
        (["asan"], "heap-buffer-overflow.*"),
        (["tsan"], "outside x0: at byte 32 of 32 "),
    ):
        with pytest.raises(KernelError, match=f"{message}at kernel.metal:3"):
            check(lambda: simple(source, [mx.zeros(8)], (8,), (8, 1, 1)), lambda: mx.zeros(8), passes=passes)


@emulated_only
def test_kernels_inside_compiled_functions_and_gradients_of_custom_functions():
    kernel_call = examples.row_sum()

    @mx.compile
    def twice(x):
        kernel_call.inputs["x"] = x
        return 2 * kernel_call.call()[0]

    x = kernel_call.inputs["x"]
    with installed():
        assert mx.allclose(twice(x), 2 * x.sum(axis=1), atol=1e-4).item()
    assert type(mx.fast.metal_kernel).__name__ == "nb_func"


@emulated_only
def test_missing_clang_is_an_error_that_names_the_packages(monkeypatch):
    build.compiler.cache_clear()
    monkeypatch.setattr("shutil.which", lambda _: None)
    monkeypatch.delenv("METAL_HOST_CXX", raising=False)
    with pytest.raises(ToolchainError, match="apt-get install clang-19 libclang-rt-19-dev"):
        build.compiler()
    build.compiler.cache_clear()
