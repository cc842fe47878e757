"""loop_sync.py that prints of every weight update whether it sent everything.

Run under torchrun by test_delta_runs.py, with the flags of loop_sync.py.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import weight_sync

stock = weight_sync.send_weights


def send_weights(weights, engine, *, version, verify=False):
    sent = stock(weights, engine, version=version, verify=verify)
    print(f"sent version {version}, full {sent['sync_full']}", flush=True)
    return sent


weight_sync.send_weights = send_weights

import loop_sync
from harness import checks, exits, flags

if __name__ == "__main__":
    settings = flags.parse_or_exit(loop_sync.Settings, checks.check_flags)
    exits.run_main(lambda: loop_sync.main(settings))
