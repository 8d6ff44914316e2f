"""Where the tests with guests find what the bench has too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "bench"))  # service_manager
