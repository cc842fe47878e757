"""torchrun worker of test_process_groups.py: loop_sync.py with 2 s for what no flag limits.

    torchrun --nproc-per-node 2 impatient.py FLAGS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import loop_sync
import process_groups
import run

if __name__ == "__main__":
    process_groups.UNLIMITED_WORK_S = 2.0
    run.run_main(loop_sync.main)
