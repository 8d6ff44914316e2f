"""Makes the modules in tests/ (layout tables, ...) importable from every test: pytest puts this folder on the path."""
