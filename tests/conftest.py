"""One thread: on tiny matrices more of them only wait for one another, and sums would depend on how many there are."""

import os

# Read by torch when it is first imported, here and in the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
