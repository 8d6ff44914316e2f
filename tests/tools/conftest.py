"""Fixtures for the tests of commands."""

from fake_peer import serve
from store_rig import forebay, store

__all__ = ["forebay", "serve", "store"]
