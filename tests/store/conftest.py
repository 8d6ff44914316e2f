"""Lets the tests of the store use the simulator's index in memory and the misbehaving clients of the wire's tests."""

import sys
from pathlib import Path

for _folder in ("sim", "wire"):
    sys.path.append(str(Path(__file__).parent.parent / _folder))
