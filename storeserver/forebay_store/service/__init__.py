"""I/O: thin asynchronous shells around the engine."""
