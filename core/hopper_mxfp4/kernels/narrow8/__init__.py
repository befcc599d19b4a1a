"""The `narrow8` kernel: narrow with 8-bit activations, on the tiles-e5m2 layout."""
