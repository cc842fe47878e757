"""The child process of an engine: what must happen there before SGLang starts, and what it leaves.

A rank spawns one for each of its engine's tensor-parallel ranks (engine.py).
"""

import gc
import os
import signal
from pathlib import Path

import torch

if not torch.cuda.is_available():
    from backends.cpu import sglang as cpu_sglang

from sglang.srt.managers.load_snapshot import shm_path_for

from common.errors import EngineDied
from common.process_groups import listen_on_loopback
from common.processes import end_with_parent, ignore_end_signals


def run_scheduler(*args, **kwargs) -> None:
    """Entry point of the engine's child process, in place of SGLang's: what must happen there
    before SGLang starts.
    """
    # SGLang asks for the same, but only later, and a parent that is killed before would not be
    # noticed
    end_with_parent()
    ignore_end_signals()
    os.environ.pop(
        "TORCHELASTIC_USE_AGENT_STORE", None
    )  # else the child's TCPStore waits for torchrun's agent for ever
    if not torch.cuda.is_available():
        cpu_sglang.patch_sglang()
    os.environ["GLOO_SOCKET_IFNAME"] = (
        "lo"  # all ranks of an engine are on this machine, however many machines the run has
    )
    listen_on_loopback()
    _load_block_scales_of_llama()
    from sglang.srt.managers.scheduler import run_scheduler_process

    gc.collect()
    # As in run.init_distributed: else all requests stand still for half a second now and then
    gc.freeze()
    run_scheduler_process(*args, **kwargs)


def _load_block_scales_of_llama() -> None:
    """SGLang's Llama (0.5.14 and 0.5.21) looks for the scales of block FP8 as weight_scale, holds
    them as weight_scale_inv, and drops them with a warning.

    While it loads, let it find them under the name it looks for. The read-back gate is what
    noticed: no byte of them had been written.
    """
    from sglang.srt.models.llama import LlamaForCausalLM

    stock = LlamaForCausalLM.load_weights

    def load_weights(self, weights):
        named_parameters = self.named_parameters
        self.named_parameters = lambda: [
            (name.replace(".weight_scale_inv", ".weight_scale"), parameter)
            for name, parameter in named_parameters()
        ]
        try:
            return stock(self, weights)
        finally:
            del self.named_parameters

    LlamaForCausalLM.load_weights = load_weights


def engine_files(port_args) -> list[Path]:
    """Return what SGLang leaves of an engine: the files of its sockets, and, as the last, its load
    snapshot in /dev/shm.
    """
    values = [value for value in vars(port_args).values() if isinstance(value, str)]
    files = [Path(v.removeprefix("ipc://")) for v in values if v.startswith("ipc://")]
    return [*files, Path(shm_path_for(port_args.instance_id))]


def died_at_start(exit_codes: list[int | None]) -> EngineDied:
    """Return what to raise when a process of this rank's engine ended before it was ready."""
    how = ", ".join(
        f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        for code in exit_codes
        if code is not None
    )
    killed = -signal.SIGKILL in exit_codes
    why = "for want of memory, see dmesg, or by hand" if killed else "its error is printed above"
    return EngineDied(
        f"rank {os.environ.get('RANK', '0')}: a process of the SGLang engine ended {how} while it "
        f"started: {why}"
    )
