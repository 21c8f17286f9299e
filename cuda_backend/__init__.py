"""The torch backend: the rooms of ``mlx_kvret/mlx_backend`` under the same names, for CUDA and CPU."""
