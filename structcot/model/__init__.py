"""The decoder that is trained: its shape, its weights, its adapters."""
