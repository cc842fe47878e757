"""torchrun worker of test_process_groups.py: a loop whose ranks have 2 s for what no flag limits.

    torchrun --nproc-per-node 2 impatient.py loop_sync.py FLAGS
"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import process_groups

process_groups.UNLIMITED_WORK_S = 2.0
del sys.argv[0]
runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
