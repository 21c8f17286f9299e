"""Pictures: how they are given, positions, modalities, vision-language models on MLX."""
