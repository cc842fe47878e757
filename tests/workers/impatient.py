"""torchrun worker of test_process_groups.py: loop_sync.py with 2 s for what no flag limits.

torchrun --nproc-per-node 2 impatient.py FLAGS
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from common import process_groups
from harness import checks, exits, flags
import loop_sync

if __name__ == "__main__":
    process_groups.UNLIMITED_WORK_S = 2.0
    settings = flags.parse_or_exit(loop_sync.Settings, checks.check_flags)
    exits.run_main(lambda: loop_sync.main(settings))
