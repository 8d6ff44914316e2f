"""What every other package builds on: units, errors, checksums, extents, frames."""

import os

# No linear algebra here: numpy's library would start a thread per processor, each of which spins for a while.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
