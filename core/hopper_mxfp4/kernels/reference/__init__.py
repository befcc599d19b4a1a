"""The `reference` kernel: float32 on dequantised weights, and the definition it computes."""
