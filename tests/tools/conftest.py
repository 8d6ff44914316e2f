"""Fixtures for the tests of commands."""

from store_rig import forebay, store

__all__ = ["forebay", "store"]
