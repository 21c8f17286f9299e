"""What gates are trained to minimise: ``mean(KL(teacher || student), CE) + λ·capacity`` (arXiv 2605.09649).

All functions return sums; the caller divides by counts over the whole batch, so that a batch gives the same
gradient in one piece, in several, or spread over processes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import kl_div, log_softmax, nll_loss
from torch.utils.checkpoint import checkpoint

# elements of one chunk of logits: 256 MB in float32
CHUNK_ELEMENTS = 1 << 26

Head = Callable[[torch.Tensor], torch.Tensor]


def distillation(
    head: Head,
    student: torch.Tensor,
    teacher: torch.Tensor,
    target: torch.Tensor,
    vocabulary: int,
    elements: int = CHUNK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens of KL(teacher || student) and of the student's next-token cross-entropy, in nats.

    Logits exist for one chunk of tokens at a time, in both passes.

    Args:
        head: final hidden states (n, hidden) to logits (n, vocabulary).
        student: (N, hidden) with a gradient; ``teacher`` (N, hidden); ``target`` (N,) next tokens.
        vocabulary: size of the vocabulary.
        elements: most logits in a chunk.
    """
    step = max(1, elements // vocabulary)
    sums = [student.new_zeros(2, dtype=torch.float32)]
    for start in range(0, len(target), step):
        chunk = slice(start, start + step)
        parts = checkpoint(
            _parts, head, student[chunk], teacher[chunk], target[chunk],
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
        sums.append(parts)
    kl, ce = torch.stack(sums).sum(0)
    return kl, ce


def _parts(head: Head, student: torch.Tensor, teacher: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    given = log_softmax(head(student).float(), -1)
    with torch.no_grad():
        wanted = log_softmax(head(teacher).float(), -1)
    kl = kl_div(given, wanted, log_target=True, reduction="sum")
    return torch.stack([kl, nll_loss(given, target, reduction="sum")])


def capacity(
    size: torch.Tensor, position: torch.Tensor, budget: int, scope: str, slack: float = 0.0
) -> torch.Tensor:
    """Sum of the hinge on the soft cache size over :func:`active` positions.

    With N = L·H heads, global: ``max(0, (Σ_heads S_t - M·N) / max(t·N - M·N, 1) - slack)``. Per head: the
    mean over heads of the same with N = 1.

    Args:
        size: S (B, N, T) from :func:`cuda_backend.kernels.soft_size.soft_size`.
        position: t (B, T), 0-based within the document; negative where padded.
        budget: M.
        scope: ``"global"`` or ``"head"``.
        slack: share of what lies between M and the full cache that costs nothing.
    """
    if scope == "global":
        size, heads = size.sum(1, keepdim=True), size.shape[1]
    else:
        heads = 1
    room = ((position - budget) * heads).clamp(min=1)[:, None]
    excess = ((size - budget * heads) / room - slack).clamp(min=0)
    return (excess.mean(1) * active(position, budget)).sum()


def active(position: torch.Tensor, budget: int) -> torch.Tensor:
    """Where the cache can be over its budget at all: from position M of a document on."""
    return position >= budget
