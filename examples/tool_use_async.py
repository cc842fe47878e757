"""examples/tool_use.py under the asynchronous loop: the same function makes the conversations.

torchrun --nproc-per-node 2 examples/tool_use_async.py
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import tool_settings
from common.settings import InFlightSettings
from harness import checks, flags


@dataclass(frozen=True)
class Settings(tool_settings.Settings):
    in_flight: InFlightSettings = InFlightSettings()


# A wrong flag is refused here: the imports below take half a minute.
if __name__ == "__main__":
    settings = flags.parse_or_exit(Settings, checks.check_flags, tool_settings.check_tool_flags)

import loop_async
import tool_use
from harness.exits import run_main


def main(settings: Settings) -> None:
    tool_use.main(settings, loop_async, "tool-async")


if __name__ == "__main__":
    run_main(lambda: main(settings))
