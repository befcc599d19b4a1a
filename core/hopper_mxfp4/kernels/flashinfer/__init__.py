"""The `flashinfer` kernel: how FlashInfer is called, its layout, and what of it is safe."""
