"""Decisions: pure code; requests and completions go in, commands and replies come out."""
