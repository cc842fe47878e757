"""examples/distill.py under the asynchronous loop: the teacher judges answers of older weights too.

torchrun --nproc-per-node 2 examples/distill_async.py --teacher runs/NAME/model-bf16
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import distill_settings
from common.settings import InFlightSettings
from harness import checks, flags


@dataclass(frozen=True)
class Settings(distill_settings.Settings):
    in_flight: InFlightSettings = InFlightSettings()


# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(
        Settings, checks.check_flags, distill_settings.check_distill_flags
    )

import loop_async
import distill
from harness.exits import run_main


def main(settings: Settings) -> None:
    """Run the asynchronous loop with a teacher."""
    distill.main(settings, loop_async, "distill-async")


if __name__ == "__main__":
    run_main(lambda: main(settings))
