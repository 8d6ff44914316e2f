"""The commands, one per file: `add` declares it, `run` does it and returns the exit code."""
