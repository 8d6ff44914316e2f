"""Lets the tests of the store use the index in memory that the simulator has."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "sim"))
