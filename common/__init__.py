"""What every folder may use: errors, settings, processes, process groups, time."""

import os

# At its import numpy would start a thread for each core, for products that nothing here leaves to
# it. A process with threads is not forked; see spares.py.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
