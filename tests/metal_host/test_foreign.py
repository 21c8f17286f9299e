"""Real kernels that nobody here wrote: the example in MLX's docstring and every custom kernel inside mlx-lm,
each compared with what it replaces, in plain MLX."""

import math
import textwrap

import mlx.core as mx
import mlx.nn as nn
import pytest

from metal_host import EMULATED, KernelError, check, installed
from metal_host.foreign import pretended_gpu, with_emulated_kernels


def uniform(*shape, dtype=mx.float32, low=-1.0, high=1.0):
    return mx.random.uniform(low, high, shape).astype(dtype)


@pytest.fixture(autouse=True)
def seed():
    mx.random.seed(4)


def rms(x, eps):
    x = x.astype(mx.float32)
    return x * mx.rsqrt((x * x).mean(axis=-1, keepdims=True) + eps)


def test_the_example_in_mlx_s_docstring():
    code = mx.fast.metal_kernel.__doc__.split("code-block:: python")[1].split("Returns:")[0]
    with installed():
        exec(
            textwrap.dedent(code.replace("verbose=True", "verbose=False")), {"mx": mx}
        )  # it asserts by itself


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_expert_routing(dtype):
    kernel = with_emulated_kernels("mlx_lm.kernels.expert_routing").expert_routing
    logits, bias = uniform(5, 45, dtype=dtype, low=-4, high=4), uniform(45)
    logits[:, 7] = logits[:, 40]  # ties: the smaller expert first
    bias[7] = bias[40] = 0.9
    how = {"top_k": 6, "multiplier": 1.5, "score_eps": 1e-6, "route_scale": 2.5}

    def twin():
        score = mx.sigmoid(logits.astype(mx.float32) * 1.5)
        chosen = mx.argsort(-(score + bias), axis=-1)[:, :6].astype(mx.uint32)
        weight = mx.take_along_axis(score, chosen, axis=-1)
        return chosen, weight / (weight.sum(axis=-1, keepdims=True) + 1e-6) * 2.5

    check(lambda: kernel(logits, bias, **how), twin, 1e-6)


@pytest.mark.parametrize("dtype,tol", [(mx.float32, 1e-5), (mx.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("post_weight", [False, True])
def test_norm_add_norm(dtype, tol, post_weight):
    module = with_emulated_kernels("mlx_lm.kernels.norm_add_norm")
    branch, stream, alpha, beta = uniform(3, 600, dtype=dtype), uniform(3, 600), uniform(600), uniform(600)
    post = uniform(600, dtype=dtype) if post_weight else None
    norm = nn.RMSNorm(600, eps=1e-5)
    norm.weight = uniform(600)

    def twin():
        b = branch if post is None else branch * post
        new = alpha * stream + beta * rms(b, 1e-6).astype(dtype)
        return new, (rms(new, 1e-5) * norm.weight).astype(dtype)

    how = {"alpha": alpha, "beta": beta, "post_weight": post, "post_eps": 1e-6}
    check(lambda: module.norm_add_norm(branch, stream, next_norm=norm, **how), twin, tol)
    check(lambda: module.norm_add_norm(branch, stream, next_norm=None, **how)[0], lambda: twin()[0], tol)
    check(
        lambda: module.pre_norm(stream, norm, dtype=dtype),
        lambda: (rms(stream, 1e-5) * norm.weight).astype(dtype),
        tol,
    )


def test_post_expert_norm_combine():
    kernel = with_emulated_kernels("mlx_lm.kernels.post_expert_norm_combine").post_expert_norm_combine
    experts, weights, w = uniform(3, 4, 520), uniform(3, 4), uniform(520)
    check(
        lambda: kernel(experts, weights, norm_weight=w, eps=1e-5),
        lambda: (rms(experts * w, 1e-5) * weights[..., None]).sum(axis=-2),
        1e-5,
    )


HEADS = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 80, "eps": 1e-6, "query_scale": 0.25}


def test_qk_norm():
    kernel = with_emulated_kernels("mlx_lm.kernels.qk_norm").qk_norm
    qkvg = uniform(2, 3, 12 * 80)

    def twin():
        heads = rms(qkvg[..., : 6 * 80].reshape(2, 3, 6, 80), 1e-6)
        return heads[..., :4, :] * 0.25, heads[..., 4:, :]

    check(lambda: kernel(qkvg, **HEADS), twin, 1e-5)


@pytest.mark.parametrize("offset", [9, mx.array([3, 70])], ids=["one offset", "offset per row"])
def test_qk_norm_rope(offset):
    kernel = with_emulated_kernels("mlx_lm.kernels.qk_norm_rope").qk_norm_rope
    qkvg = uniform(2, 3, 12 * 80)

    def twin():
        heads = rms(qkvg[..., : 6 * 80].reshape(2, 3, 6, 80), 1e-6)
        rotate = {"traditional": True, "base": 1e4, "scale": 1.0, "offset": offset}
        turned = mx.fast.rope(heads.transpose(0, 2, 1, 3), 80, **rotate).transpose(0, 2, 1, 3)
        return turned[..., :4, :] * 0.25, turned[..., 4:, :]

    check(lambda: kernel(qkvg, rope_base=1e4, offset=offset, **HEADS), twin, 1e-4)


@pytest.mark.parametrize("dtype,tol", [(mx.float32, 1e-6), (mx.float16, 1e-3)], ids=str)
def test_rms_norm_sigmoid_gate_on_strided_inputs(dtype, tol):
    kernel = with_emulated_kernels("mlx_lm.kernels.rms_norm_sigmoid_gate").rms_norm_sigmoid_gate
    x = uniform(2, 3, 5, 48, dtype=dtype).transpose(0, 2, 1, 3)  # (B, H, L, D), as attention returns it
    gate = uniform(2, 3, 3 * 5 * 48, dtype=dtype)[..., 240:480]

    def twin():
        g = mx.sigmoid(gate.astype(mx.float32)).reshape(2, 3, 5, 48).transpose(0, 2, 1, 3)
        return (rms(x, 1e-6) * g).transpose(0, 2, 1, 3).reshape(2, 3, 240).astype(dtype)

    check(lambda: kernel(x, gate, eps=1e-6), twin, tol)


@pytest.mark.parametrize("inverted", [False, True])
def test_bitlinear(inverted):
    module = with_emulated_kernels("mlx_lm.models.bitlinear_layers")
    layer = module.BitLinear(256, 24, bias=False, invert_weight_scales=inverted)
    ternary, x = mx.random.randint(-1, 2, (24, 256)), uniform(3, 256)
    parts = (ternary + 1).reshape(4, 6, 256).astype(mx.uint8)
    layer.weight = parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6
    layer.weight_scale = mx.array([0.7])
    scale = 1 / 0.7 if inverted else 0.7
    check(lambda: layer(x), lambda: x @ ternary.T.astype(mx.float32) * scale, 1e-4)


def test_ssm():
    module = with_emulated_kernels("mlx_lm.models.ssm")
    x, B, C = uniform(2, 1, 4, 16), uniform(2, 1, 2, 64), uniform(2, 1, 2, 64)
    A_log, D, dt, dt_bias, state = uniform(4), uniform(4), uniform(2, 1, 4), uniform(4), uniform(2, 4, 16, 64)
    how = (x, A_log, B, C, D, dt, dt_bias, state, (0.001, 100.0))
    check(lambda: module.ssm_update_kernel(*how), lambda: module.ssm_attn(*how), 1e-5)


def test_wkv7():
    module = with_emulated_kernels("mlx_lm.models.rwkv7")
    r, w, k, v, a, b = (uniform(2, 3, 2, 64) for _ in range(6))
    state = uniform(2, 2, 64, 64)

    def twin():
        now, ys = state, []
        for t in range(3):
            y, now = module._wkv7_step_ops(*(z[:, t] for z in (r, w, k, v, a, b)), now)
            ys.append(y.squeeze(-1))
        return mx.stack(ys, axis=1), now

    check(lambda: module.wkv7_kernel(r, w, k, v, a, b, state), twin, 1e-4)


@pytest.mark.parametrize(
    "variant", ["simd_sum", "explicit tree", "packed", "vector gate", "mask", "vector gate, mask"]
)
def test_gated_delta(variant):
    module = with_emulated_kernels("mlx_lm.models.gated_delta")
    q, k, v = uniform(2, 3, 2, 128) * 0.1, uniform(2, 3, 2, 128) * 0.1, uniform(2, 3, 4, 16)
    g = uniform(2, 3, 4, *([128] if "vector" in variant else []), low=0.5)
    beta, state = uniform(2, 3, 4, low=0.0), uniform(2, 4, 16, 128)
    mask = mx.array([[True, True, True], [False, True, True]]) if "mask" in variant else None
    kernels = {"explicit tree": module.gated_delta_kernel_xtree, "packed": module.gated_delta_kernel}
    kernel = kernels.get(variant, module.gated_delta_kernel_unpacked)

    def twin():
        y, now = module.gated_delta_ops(q, k, v, g, beta, state, mask)
        return (y if mask is None else mx.where(mask[..., None, None], y, 0)), now

    def call():
        return kernel(q, k, v, g, beta, state, mask)

    check(call, twin, 1e-5, passes=("asan", "run"))
    if mask is None:
        check(call, twin, 1e-5, passes=("tsan",))
    elif EMULATED:  # all lanes store the same zero for a masked token
        with pytest.raises(KernelError, match="race on y"):
            check(call, twin, 1e-5, passes=("tsan",))


def test_attention_over_residual_blocks():
    module = with_emulated_kernels("mlx_lm.models.kimi_k3")
    raw, partial, w = uniform(3, 2, 5, 700), uniform(2, 5, 700), uniform(700)
    blocks = module.ResidualBlocks(eps=1e-6)
    for block in raw:
        blocks.append(block)

    def call():
        with pretended_gpu():
            return module._attn_res_mix(blocks, partial, w, 1e-6)

    check(call, lambda: module._attn_res_mix(blocks, partial, w, 1e-6, use_kernel=False), 1e-5)


def test_sinkhorn():
    module = with_emulated_kernels("mlx_lm.models.deepseek_v41")
    comb, eps = uniform(2, 37, 4, 4, low=0.1), mx.array([1e-6])

    def call():
        with pretended_gpu():
            return module._sinkhorn(comb, iters=5, eps=eps)

    def twin():
        m = comb / (comb.sum(axis=-2, keepdims=True) + eps)
        for _ in range(4):
            m = m / (m.sum(axis=-1, keepdims=True) + eps)
            m = m / (m.sum(axis=-2, keepdims=True) + eps)
        return m

    check(call, twin, 1e-5)


def _kl(q, p):
    log_q, log_p = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (q, p))
    return (mx.exp(log_p) * (log_p - log_q)).sum(axis=-1)


def _js(q, p):
    both = [x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (q, p)]
    middle = mx.logaddexp(*both) - math.log(2)
    return sum((mx.exp(x) * (x - middle)).sum(axis=-1) for x in both) / 2


def _losses_and_gradients(kl, js):
    mx.random.seed(4)
    q, p = uniform(2, 5000, low=-4, high=4), uniform(2, 5000, low=-4, high=4)
    return [f(q, p) for f in (kl, js)] + [mx.grad(lambda q, f=f: f(q, p).sum())(q) for f in (kl, js)]


def _kernel_losses(amend=None):
    module = with_emulated_kernels("mlx_lm.tuner.losses", amend)

    def call():
        with pretended_gpu():
            return _losses_and_gradients(module.kl_div_loss, module.js_div_loss)

    return call


def _with_the_missing_barrier(source):
    barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    source = source.replace("// Share the sum_exp", barrier + "// Share the sum_exp")
    return source.replace("mem_flags::mem_none", "mem_flags::mem_threadgroup")


@pytest.mark.skipif(not EMULATED, reason="the GPU doesn't report races")
def test_kl_and_js_losses_overwrite_maxima_that_others_still_read():
    with pytest.raises(KernelError, match="race on shared"):
        check(_kernel_losses(), lambda: _losses_and_gradients(_kl, _js), 1e-4, passes=["tsan"])


@pytest.mark.skipif(not EMULATED, reason="the GPU's kernels can't be amended")
def test_kl_and_js_losses_with_a_barrier_between():
    check(_kernel_losses(_with_the_missing_barrier), lambda: _losses_and_gradients(_kl, _js), 1e-4)
