"""Shared ground: units, errors, checksums, extents and the frame format."""
