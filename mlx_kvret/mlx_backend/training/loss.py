"""What gates are trained to minimise: ``mean(KL(teacher || student), CE) + λ·capacity`` (arXiv 2605.09649).

The MLX form of :mod:`cuda_backend.training.loss`. All functions return sums; the caller divides by counts
over the whole batch, so that a batch gives the same gradient in one piece or in several.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .blocks import after, with_gradient

# elements of one chunk of logits: 32 MB in float32
CHUNK_ELEMENTS = 1 << 23

Head = Callable[[mx.array], mx.array]


def distillation(
    head: Head,
    student: mx.array,
    teacher: mx.array,
    target: mx.array,
    vocabulary: int,
    elements: int | None = None,
) -> mx.array:
    """Sums over tokens of KL(teacher || student) and of the student's next-token cross-entropy, (2,) in nats.

    Logits exist for one chunk of tokens at a time, in both passes.

    Args:
        head: final hidden states (n, hidden) to logits (n, vocabulary).
        student: (N, hidden) with a gradient; ``teacher`` (N, hidden); ``target`` (N,) next tokens.
        vocabulary: size of the vocabulary.
        elements: most logits in a chunk, CHUNK_ELEMENTS unless given.
    """
    step = max(1, (elements or CHUNK_ELEMENTS) // vocabulary)
    chunks = [slice(start, start + step) for start in range(0, len(target), step)]

    def forward(student: mx.array) -> mx.array:
        sums = mx.zeros(2)
        for chunk in chunks:
            mine, theirs = (after(x[chunk], sums) for x in (student, teacher))
            given, wanted = _log_softmax(head(mine)), _log_softmax(head(theirs))
            kl = (mx.exp(wanted) * (wanted - given)).sum()
            sums = sums + mx.stack([kl, -mx.take_along_axis(given, target[chunk, None], -1).sum()])
        return sums

    def backward(student: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
        """With softmaxes p and q of student and teacher, logits have the gradients p - q and p - target."""
        found: list[mx.array] = []
        for chunk in chunks:
            mine, theirs = (after(x[chunk], found[-1] if found else None) for x in (student, teacher))
            logits = head(mine)
            p, q = (mx.softmax(x.astype(mx.float32), -1) for x in (logits, head(theirs)))
            right = mx.arange(vocabulary) == target[chunk, None]
            of_logits = gradient[0] * (p - q) + gradient[1] * (p - right)
            found += mx.vjp(head, [mine], [of_logits.astype(logits.dtype)])[1]
        return mx.concatenate(found) if found else mx.zeros_like(student)

    return with_gradient(forward, backward)(student)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, -1, keepdims=True)


def capacity(size: mx.array, position: mx.array, budget: int, scope: str, slack: float = 0.0) -> mx.array:
    """Sum of the hinge on the soft cache size over positions from M of a document on.

    With N = L·H heads, global: ``max(0, (Σ_heads S_t - M·N) / max(t·N - M·N, 1) - slack)``. Per head: the
    mean over heads of the same with N = 1.

    Args:
        size: S (B, N, T) from :func:`.soft_size.soft_size`.
        position: t (B, T), 0-based within the document; negative where padded.
        budget: M.
        scope: ``"global"`` or ``"head"``.
        slack: share of what lies between M and the full cache that costs nothing.
    """
    heads = 1
    if scope == "global":
        size, heads = size.sum(1, keepdims=True), size.shape[1]
    room = mx.maximum((position - budget) * heads, 1)[:, None]
    excess = mx.maximum((size - budget * heads) / room - slack, 0)
    return (excess.mean(1) * (position >= budget)).sum()
