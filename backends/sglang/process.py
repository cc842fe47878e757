"""The child process of an engine: what happens there before SGLang starts, and what it leaves.

A rank starts one for each tensor-parallel rank of its engine (engine.py). Those that it could fork
at its start are spares (common/spares.py): copies of the rank, with what backends/cpu has replaced
for Megatron too. All others are spawned, on a GPU every one.
"""

import contextlib
import gc
import multiprocessing
import os
import pkgutil
import signal
import types
from collections.abc import Iterator
from pathlib import Path

import torch

if not torch.cuda.is_available():
    from backends.cpu import sglang as cpu_sglang

from sglang.srt.entrypoints import engine as sglang_engine
from sglang.srt.managers.load_snapshot import shm_path_for

from backends.huggingface.fields import FAMILIES
from common.errors import EngineDied
from common.process_groups import listen_on_loopback
from common.processes import end_with_parent, ignore_end_signals
from common.spares import of_spare, spares


def run_scheduler(*args, **kwargs) -> None:
    """Prepare this child process, then run SGLang's scheduler in it. Its entry point."""
    # SGLang asks for the same, but only later: it would not notice a parent that is killed before.
    end_with_parent()
    ignore_end_signals()
    # Else the child's TCPStore waits for torchrun's agent for ever.
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    if not torch.cuda.is_available():
        cpu_sglang.patch_sglang()
    # SGLang refuses GPUs of which one has 10 % less free memory than another. Trainers on them may
    # hold pipeline stages of different sizes.
    os.environ["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
    # All ranks of an engine are on this machine, however many machines the run has.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    listen_on_loopback()
    _import_few_models()
    _load_block_scales_of_llama()
    _keep_chunks()
    from sglang.srt.managers.scheduler import run_scheduler_process

    # As in common.distributed.init_distributed: else all requests stand still for half a second now
    # and then.
    gc.collect()
    gc.freeze()
    run_scheduler_process(*args, **kwargs)


@contextlib.contextmanager
def started_in_spares(started: set[multiprocessing.Process]) -> Iterator[None]:
    """Let SGLang start schedulers in spare processes, as long as there are any.

    Adds all processes that it has started to `started`, also if it fails.
    """
    before = set(multiprocessing.active_children()) - {process for process, _ in spares}
    stock = sglang_engine.mp
    if spares:
        sglang_engine.mp = types.SimpleNamespace(**{**vars(multiprocessing), "Process": of_spare})
    try:
        yield
    finally:
        sglang_engine.mp = stock
        started |= set(multiprocessing.active_children()) - before


def _import_few_models() -> None:
    """Let SGLang import the families that read_config accepts, and not its 240 others.

    That saves a second of each start, and 40 MB.
    """
    from sglang.srt import models

    names = {name for _, name, _ in pkgutil.iter_modules(models.__path__)}
    os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", ",".join(sorted(names - set(FAMILIES))))


def _keep_chunks() -> None:
    """Let a long prompt go on behind its first chunk where Engine.generate was told keep=False.

    SGLang remembers in the prefix cache how far a prompt has been computed. Version 0.5.21 skips
    that for such a request, computes the first chunk over and over, and runs out of memory.
    """
    from sglang.srt.managers.scheduler import Scheduler

    def stash_chunked_request(self, req):
        self.tree_cache.cache_unfinished_req(req, chunked=True)

    Scheduler.stash_chunked_request = stash_chunked_request


def _load_block_scales_of_llama() -> None:
    """Let SGLang's Llama load the scales of block FP8.

    Versions 0.5.14 and 0.5.21 hold them as weight_scale_inv, look for them as weight_scale, and
    drop them with a warning. Verification noticed: no byte of them had been written. So while it
    loads, its parameters bear the name that it looks for.
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
    """Return the files that SGLang leaves of an engine: its sockets, then its load snapshot.

    The load snapshot, in /dev/shm, is the last.
    """
    addresses = [value for value in vars(port_args).values() if isinstance(value, str)]
    sockets = [
        Path(address.removeprefix("ipc://"))
        for address in addresses
        if address.startswith("ipc://")
    ]
    return [*sockets, Path(shm_path_for(port_args.instance_id))]


def died_at_start(exit_codes: list[int | None]) -> EngineDied:
    """Return what to raise when a process of this rank's engine ended before it was ready."""
    ends = []
    for code in exit_codes:
        if code is not None:
            ends.append(
                f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            )
    killed = -signal.SIGKILL in exit_codes
    why = "for want of memory, see dmesg, or by hand" if killed else "its error is printed above"
    return EngineDied(
        f"rank {os.environ.get('RANK', '0')}: a process of the SGLang engine ended"
        f" {', '.join(ends)} while it started: {why}"
    )
