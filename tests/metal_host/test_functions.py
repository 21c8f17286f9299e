"""The shim's part of Metal's standard library, function by function, against numpy."""

import mlx.core as mx
import numpy as np
import pytest

from metal_host import EMULATED, KernelError, check, installed

LANES = 32


def run(body, inputs, outputs, threads=LANES, header="", template=(), **options):
    """One threadgroup; inputs and outputs by name (outputs: dtype of a row of `threads` values)."""
    with installed():
        kernel = mx.fast.metal_kernel(
            name="f",
            input_names=list(inputs),
            output_names=list(outputs),
            source=body,
            header=header,
            **options,
        )
        return kernel(
            inputs=list(inputs.values()),
            output_shapes=[(threads,)] * len(outputs),
            output_dtypes=list(outputs.values()),
            grid=(threads, 1, 1),
            threadgroup=(threads, 1, 1),
            template=list(template),
        )


X = np.random.default_rng(2).standard_normal(LANES).astype(np.float32)
I = np.arange(LANES)  # noqa: E741
SIMDGROUP = {
    "simd_sum(v)": np.full(LANES, X.sum()),
    "simd_product(v)": np.full(LANES, X.prod()),
    "simd_max(v)": np.full(LANES, X.max()),
    "simd_min(v)": np.full(LANES, X.min()),
    "simd_prefix_inclusive_sum(v)": np.cumsum(X),
    "simd_prefix_exclusive_sum(v)": np.cumsum(X) - X,
    "simd_prefix_inclusive_product(v)": np.cumprod(X),
    "simd_broadcast(v, 5)": np.full(LANES, X[5]),
    "simd_broadcast_first(v)": np.full(LANES, X[0]),
    "simd_shuffle(v, ushort((i * 7) % 32))": X[I * 7 % 32],
    "simd_shuffle_xor(v, 4)": X[I ^ 4],
    "simd_shuffle_down(v, 3)": np.where(I + 3 < 32, X[(I + 3) % 32], X),
    "simd_shuffle_up(v, 3)": np.where(I >= 3, X[I - 3], X),
    "simd_shuffle_rotate_down(v, 3)": X[(I + 3) % 32],
    "simd_shuffle_rotate_up(v, 3)": X[(I - 3) % 32],
    "simd_shuffle_and_fill_up(v, 2.0f * v, 3)": np.where(I >= 3, X[I - 3], 2 * X[(I + 29) % 32]),
    "float(ulong(simd_ballot(v > 0.0f)))": np.full(LANES, np.float32(np.sum((X > 0) * 2.0**I))),
    "simd_any(v > 1.5f) ? 1.0f : 0.0f": np.full(LANES, float((X > 1.5).any())),
    "simd_all(v > -9.0f) ? 1.0f : 0.0f": np.ones(LANES),
    "float(simd_or(1u << i) == 0xffffffffu && simd_and(i) == 0u && simd_xor(i) == 0u)": np.ones(LANES),
}


def all_of(table):
    """Every expression of the table in one kernel, one output each."""
    names = [f"out{k}" for k in range(len(table))]
    stores = (f"{name}[i] = {expression};" for name, expression in zip(names, table, strict=True))
    body = "\n".join(["const uint i = thread_index_in_simdgroup; const float v = x[i];", *stores])
    return run(body, {"x": mx.array(X)}, dict.fromkeys(names, mx.float32))


def wanted(table):
    return [mx.array(np.asarray(values, np.float32)) for values in table.values()]


def test_simdgroup_functions():
    check(lambda: all_of(SIMDGROUP), lambda: wanted(SIMDGROUP), 1e-5)


def test_simdgroup_functions_on_a_partly_filled_simdgroup():
    body = "const uint i = thread_index_in_threadgroup; out[i] = simd_sum(x[i]);"
    x = mx.arange(40, dtype=mx.float32)
    got = run(body, {"x": x}, {"out": mx.float32}, threads=40)[0]
    assert got.tolist() == [sum(range(32))] * 32 + [sum(range(32, 40))] * 8


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_arithmetic_rounds_to_its_own_type(dtype):
    a, b = (mx.array(X * s).astype(dtype) for s in (1.7, 0.3))
    body = "const uint i = thread_index_in_simdgroup; T p = a[i] * b[i]; out[i] = p + a[i] - b[i];"
    check(
        lambda: run(body, {"a": a, "b": b}, {"out": dtype}, template=[("T", dtype)]),
        lambda: [a * b + a - b],
    )


FLOATS = {
    "exp(v)": np.exp(X),
    "exp2(v)": np.exp2(X),
    "log(abs(v))": np.log(np.abs(X)),
    "log2(fabs(v))": np.log2(np.abs(X)),
    "metal::precise::rsqrt(abs(v))": np.abs(X) ** -0.5,
    "fast::tanh(v)": np.tanh(X),
    "sin(v) * cos(v)": np.sin(X) * np.cos(X),
    "floor(v) + ceil(v) + trunc(v)": np.floor(X) + np.ceil(X) + np.trunc(X),
    "pow(abs(v), 1.5f)": np.abs(X) ** 1.5,
    "clamp(v, -0.5f, 0.5f)": np.clip(X, -0.5, 0.5),
    "saturate(v) + sign(v)": np.clip(X, 0, 1) + np.sign(X),
    "select(1.0f, 2.0f, v > 0)": np.where(X > 0, 2, 1),
    "max(v, NAN) + min(NAN, v)": 2 * X,
    "fma(v, v, v)": X * X + X,
    "mix(v, 2.0f, 0.25f)": X * 0.75 + 0.5,
    "as_type<float>(as_type<uint>(v) ^ 0x80000000u)": -X,
    "isnan(v) || isinf(v) ? 1.0f : 0.0f": np.zeros(LANES),
    "dot(float4(v, 2.0f, v, 1.0f), float4(1.0f))": 2 * X + 3,
    "length(float2(v, v))": np.abs(X) * np.sqrt(2),
    "float4(float2(v, 1.0f), half2(half(2.0f))).wzyx.y": np.full(LANES, 2.0),
    "vec<float, 4>(v).x + metal::float3(v, 0.0f, v).z": 2 * X,
    "any(float2(v, 0.0f) > float2(0.0f)) ? 1.0f : 0.0f": (X > 0).astype(np.float32),
    "1.0 / 3.0 * v": X / 3,
    "float(popcount(uint(i)) + clz(1u + i) + ctz(8u))": [
        bin(i).count("1") + 32 - int(i + 1).bit_length() + 3 for i in I
    ],
    "float(extract_bits(uint(i), 1, 2)) + float(mulhi(0x80000000u, i))": (I >> 1 & 3) + I // 2,
    "float(Limits<half>::finite_max) * 0.0f + v": X,
    "float(simd_sum(bfloat(1.0f + 0.0f * v)))": np.full(LANES, 32),
    "float(bfloat(v))": np.array(mx.array(X).astype(mx.bfloat16).astype(mx.float32)),
}


def test_mathematical_functions():
    check(lambda: all_of(FLOATS), lambda: wanted(FLOATS), 1e-5)


def test_vectors_in_memory():
    body = """
    const uint i = thread_index_in_simdgroup;
    const float4 wide = ((const device float4*)x)[i % 8];
    const float3 three = *(const device packed_float3*)(x + i % 8 + 1);
    threadgroup half4 shared[8];
    if (i < 8) shared[i] = half4(wide * 0.5f);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bfloat4 b = bfloat4(wide);
    uint2 bits = as_type<uint2>(shared[i % 8]);
    out[i] = wide.x + three.z + float(shared[(i + 1) % 8].w) + float(b.y) + float(bits.x & 1u);
    """
    wide = X.reshape(8, 4)
    j = I % 8
    half = (wide * 0.5).astype(np.float16)
    b = np.array(mx.array(wide).astype(mx.bfloat16).astype(mx.float32))
    wanted = wide[j, 0] + X[j + 3] + half[(j + 1) % 8, 3] + b[j, 1] + (half[j, 0].view(np.uint16) & 1)
    check(
        lambda: run(body, {"x": mx.array(X)}, {"out": mx.float32}),
        lambda: [mx.array(wanted.astype(np.float32))],
        1e-5,
    )


def test_constant_tables_structs_and_loops_over_them():
    header = """
    constant float table[4] = {1.0f, 10.0f, 100.0f, 1000.0f};
    struct Range { uint begin, end; };
    inline float total(Range r, const threadgroup float* values) {
      float sum = 0.0f;
      for (uint i = r.begin; i < r.end; i++) sum += values[i] * table[i % 4];
      return sum;
    }
    """
    body = """
    threadgroup float values[8];
    const uint i = thread_index_in_simdgroup;
    if (i < 8) values[i] = x[i];
    simdgroup_barrier(mem_flags::mem_threadgroup);
    Range r = {i % 8, 8};
    out[i] = total(r, values);
    """
    weighted = X[:8] * np.array([1, 10, 100, 1000] * 2)
    wanted = np.array([weighted[i % 8 :].sum() for i in I], np.float32)
    check(
        lambda: run(body, {"x": mx.array(X)}, {"out": mx.float32}, header=header),
        lambda: [mx.array(wanted)],
        1e-5,
    )


def test_64_bit_maximum_in_device_memory():
    body = """
    const ulong value = ulong(x[thread_index_in_simdgroup]) << 33;
    atomic_max_explicit((device atomic_ulong*)out, value, memory_order_relaxed);
    """

    def call():
        with installed():
            kernel = mx.fast.metal_kernel(name="top", input_names=["x"], output_names=["out"], source=body)
        size = {"grid": (LANES, 1, 1), "threadgroup": (LANES, 1, 1)}
        return kernel(
            inputs=[mx.array(I)], output_shapes=[(1,)], output_dtypes=[mx.uint64], init_value=0, **size
        )

    check(call, lambda: [mx.array([31 << 33], dtype=mx.uint64)])


def test_atomics():
    header = """
    #define RELAXED memory_order_relaxed
    inline void add(device atomic<float>* sum, float v) { atomic_fetch_add_explicit(sum, v, RELAXED); }
    """
    body = """
    const uint i = thread_index_in_threadgroup;
    threadgroup atomic_int low, high;
    threadgroup atomic_uint bits;
    if (i == 0) {
      atomic_store_explicit(&low, 1000, RELAXED);
      atomic_store_explicit(&high, -1000, RELAXED);
      atomic_store_explicit(&bits, 0u, RELAXED);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_min_explicit(&low, int(i) - 5, RELAXED);
    atomic_fetch_max_explicit(&high, int(i), RELAXED);
    atomic_fetch_or_explicit(&bits, 1u << (i % 32u), RELAXED);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    add(&out[0], x[i % 32u]);
    if (i == 0) {
      uint all = 0xffffffffu;
      const bool same = atomic_compare_exchange_weak_explicit(&bits, &all, 7u, RELAXED, RELAXED);
      atomic_store_explicit(&out[1], float(atomic_load_explicit(&low, RELAXED)), RELAXED);
      atomic_store_explicit(&out[2], float(atomic_load_explicit(&high, RELAXED)), RELAXED);
      atomic_store_explicit(&out[3], same ? float(atomic_load_explicit(&bits, RELAXED)) : 0.0f, RELAXED);
    }
    """

    def call():
        with installed():
            kernel = mx.fast.metal_kernel(
                name="atomics",
                input_names=["x"],
                output_names=["out"],
                source=body,
                header=header,
                atomic_outputs=True,
            )
        return kernel(
            inputs=[mx.array(X)],
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
            init_value=0,
        )

    check(call, lambda: [mx.array([2 * float(X.sum()), -5.0, 63.0, 7.0])], 1e-5)


REFUSED = {
    "simdgroup function for 64-bit types": "simd_sum(ulong(i))",
    "no simdgroup function for bool": "simd_max(v > 0.0f)",
    "atomic<float> in device memory only": "f(&shared_float)",
    "no such operation for this atomic type": "g(&shared_bool)",
    "no member named 'atan3'": "metal::atan3(v)",
    "call to 'max' is ambiguous": "max(v, 1)",
    "as_type between types of different size": "as_type<ushort>(v)",
}
REFUSED_HEADER = """
#define RELAXED memory_order_relaxed
inline float f(threadgroup atomic<float>* p) { return atomic_load_explicit(p, RELAXED); }
inline float g(threadgroup atomic<bool>* p) { return atomic_fetch_and_explicit(p, true, RELAXED); }
"""


@pytest.mark.skipif(not EMULATED, reason="Apple's compiler words it differently")
@pytest.mark.parametrize("message", REFUSED)
def test_what_metal_lacks_is_refused(message):
    body = f"""
    threadgroup atomic<float> shared_float;
    threadgroup atomic<bool> shared_bool;
    const uint i = thread_index_in_simdgroup;
    const float v = x[i];
    out[i] = float({REFUSED[message]});"""
    with pytest.raises(KernelError, match=message) as error:
        run(body, {"x": mx.array(X)}, {"out": mx.float32}, header=REFUSED_HEADER)
    assert error.value.found_by == "types"
