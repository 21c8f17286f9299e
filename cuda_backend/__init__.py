"""The torch backend: the rooms of ``mlx_kvret/mlx_backend`` under the same names, for CUDA and CPU."""

if __name__ == "cuda_backend":
    from mlx_kvret.core.checkout import known_as

    known_as(__name__)
