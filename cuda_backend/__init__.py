"""The torch wing: the rooms of ``mlx_kvret`` under the same names, for CUDA and CPU."""
