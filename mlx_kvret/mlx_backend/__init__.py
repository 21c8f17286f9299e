"""The MLX backend: the rooms of ``cuda_backend`` under the same names, for Apple Silicon and the CPU."""
