"""The protocol between store, cache and tools; the store owns it."""
