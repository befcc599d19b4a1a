"""The `narrow` kernel: our own, for few tokens an expert, on the tiles layout."""
