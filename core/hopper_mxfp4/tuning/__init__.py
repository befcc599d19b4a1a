"""What was measured of kernels: tables of FlashInfer's tactics, and the cards they are for."""
