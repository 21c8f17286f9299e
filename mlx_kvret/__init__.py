"""KV cache eviction by learned retention gates."""
