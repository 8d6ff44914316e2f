"""The cache daemon: an SSD of log records between virtual machines and the store."""
