"""Bytes: every on-disk record is declared here, once."""
