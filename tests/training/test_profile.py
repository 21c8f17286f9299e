"""What is reported of trained gates, against loops over documents."""

import numpy as np
import pytest
import torch

from mlx_kvret.cuda_backend.kernels.soft_size import soft_size
from mlx_kvret.cuda_backend.training.student import Student
from mlx_kvret.training.packing import Batch
from mlx_kvret.training.profile import profile

from .test_student import gates_for
from .tiny_models import tiny_model


def test_profile():
    student = Student(tiny_model("llama"))
    gates = gates_for(student, 1.0)
    lengths = [[7, 4], [12]]
    batch = Batch(*(np.zeros((2, 12), np.int64) for _ in range(3)), np.zeros((2, 12), bool))
    batch.ids[:] = np.random.default_rng(0).integers(99, size=(2, 12))
    batch.starts[0, 7:11], batch.starts[0, 11] = 7, 11
    batch.position[:] = np.arange(12) - batch.starts
    batch.position[0, 11] = -1

    ids, starts = torch.from_numpy(batch.ids), torch.from_numpy(batch.starts)
    said = student.learn(ids, starts, gates).log_beta.detach()
    log_beta = said.double().numpy()
    sizes, retained = np.zeros(4), [[] for _ in range(12)]
    for row, documents in enumerate(lengths):
        begin = 0
        for n in documents:
            own = log_beta[row, :, begin : begin + n]
            for t in range(n):
                sizes += np.exp(own[:, : t + 1] * (t - np.arange(t + 1))).sum(1)
                retained[t].append(np.exp(own[:, t] * (n - 1 - t)).mean())
            begin += n
    found = profile(said.numpy(), soft_size(said, starts).numpy(), batch.position, student.layers)
    assert np.array(found["soft_size"]).flatten() == pytest.approx(sizes / 23, rel=1e-5)
    assert found["position"] == list(range(12))
    assert found["retained"] == pytest.approx([np.mean(values) for values in retained], rel=1e-5)
