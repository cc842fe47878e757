"""The inference engine: SGLang's Engine in this process, with token ids in and out.

This process runs SGLang's tokenizer manager. Each engine rank's scheduler runs with the model in a
child process. The engine's event loop has a thread of its own: generation goes on while the main
thread trains or waits, and signals stay the main thread's. What is `async` below runs on that loop;
call() brings its result to the main thread.

A weight update never needs an idle engine. Running requests are paused in place and go on with the
new weights, on the keys and values they have cached. The engine reports for each token the version
that sampled it. New requests never read what older weights have cached: every request's cache key
(SGLang's extra_key) carries the version it started with. So nothing has to be flushed.

SGLang 0.5.14 (torch 2.11) and 0.5.21 differ. Code that tells them apart stands in this folder only.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import importlib.util
import logging
import os
import sys
import threading
import time
from multiprocessing import resource_tracker

import torch
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.entrypoints import engine as sglang_engine
from sglang.srt.managers import io_struct
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import MultiprocessingSerializer

from backends.routed_experts import pack_reported
from backends.sglang.buckets import NO_CHANGES, Named, pack, phase
from backends.sglang.gpu import check_released, held_bytes, memory_saver_libraries
from backends.sglang.process import died_at_start, engine_files, run_scheduler, started_in_spares
from common.errors import EngineDied, engine_died
from common.processes import end_signals_blocked, kill_with_children, main_module_hidden
from common.timeline import Timeline

# 0.5.21 reports the weight versions of a response as spans. For 0.5.14, tokens are counted as they
# arrive.
REPORTS_VERSIONS = importlib.util.find_spec("sglang.srt.utils.weight_versions") is not None
# 0.5.21's ServerArgs is a struct of msgspec, 0.5.14's a dataclass.
SERVER_FIELDS = tuple(
    getattr(ServerArgs, "__struct_fields__", None) or ServerArgs.__dataclass_fields__
)
BUCKETS = "backends.sglang.buckets"  # where SGLang finds the loaders, by name
LOOP_ENDS_WITHIN_S = 5.0
# So soon SIGQUIT reports an engine's death: SGLang's SubprocessWatchdog looks every second.
SIGQUIT_WITHIN_S = 3.0


class Engine(sglang_engine.Engine):
    """SGLang's Engine. version: of its weights, at first -1. requests: running or queued."""

    run_scheduler_process_func = staticmethod(run_scheduler)
    holds_weights = True
    _starting: "Engine"  # SGLang launches by methods of the class, which find it here

    def __init__(self, config: dict, answer_timeout_s: float = 3600.0, **server_args):
        """Start the engine, without weights. Raises EngineDied if one of its processes ends.

        config: config.json of its model. answer_timeout_s: an engine that takes longer for a
        request, or for a part of an update, counts as dead.
        """
        # It reports that it installs its SIGQUIT handler as if that were an error.
        logging.getLogger("sglang.srt.entrypoints.engine").addFilter(
            lambda record: "SIGQUIT handler" not in record.getMessage()
        )
        Engine._starting, self.files, self.processes = self, [], set()
        asyncio.set_event_loop(asyncio.new_event_loop())  # else it takes another engine's
        try:
            with main_module_hidden():
                super().__init__(weight_version="-1", **server_args)
        except BaseException as error:
            exit_codes = [process.exitcode for process in self.processes]
            self.shutdown()
            if any(code is not None for code in exit_codes) and isinstance(error, Exception):
                raise died_at_start(exit_codes) from error
            raise
        self.config, self.version, self.answer_timeout_s = config, -1, answer_timeout_s
        self.timeline = Timeline()
        self.requests, self._paused, self._released = 0, False, False
        self._update_bytes = self._weight_bytes = 0  # held of this update; of the largest
        self._last_part, self.last_phase = None, ("start", ["no weights yet"])
        # The loop's thread and the judges' threads share the interpreter with the main thread,
        # which other ranks wait for in collectives. So it must get its turn often.
        sys.setswitchinterval(5e-4)
        self._death = self.loop.create_future()
        for process in self.processes:
            self.loop.add_reader(process.sentinel, self._on_end_of, process)
        self._thread = threading.Thread(
            target=self.loop.run_forever, name="sglang-event-loop", daemon=True
        )
        self._thread.start()

    @classmethod
    def _launch_detokenizer_subprocesses(cls, *args, **kwargs):
        # Tokens come back as tokens: there is nothing to detokenize, and no process is needed.
        return [], []

    @classmethod
    def _launch_scheduler_processes(cls, server_args, port_args, *args, **kwargs):
        cls._starting.files = engine_files(port_args)
        # Should this rank be killed, the tracker outlives it, and frees the shared memory.
        resource_tracker.register(f"/{cls._starting.files[-1].name}", "shared_memory")
        spares = started_in_spares(cls._starting.processes)
        with end_signals_blocked(), memory_saver_libraries(), spares:
            return super()._launch_scheduler_processes(server_args, port_args, *args, **kwargs)

    def call(self, coroutine):
        """Run a coroutine on the engine's loop and wait for its result.

        Raises EngineDied if a process of the engine ends first.
        """
        return asyncio.run_coroutine_threadsafe(self._while_alive(coroutine), self.loop).result()

    async def _while_alive(self, coroutine):
        work = asyncio.ensure_future(coroutine)  # what needs no engine ends in its first turn
        await asyncio.wait([work, self._death], return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        work.cancel()
        raise engine_died()

    def _on_end_of(self, process) -> None:
        """Let call() raise when one of the engine's processes has ended."""
        # A little later: SIGQUIT comes first, and interrupts the main thread wherever it is.
        self.loop.remove_reader(process.sentinel)
        self.loop.call_later(SIGQUIT_WITHIN_S, self.note_death)

    def note_death(self) -> None:
        """Let every later call() raise EngineDied; on the engine's loop."""
        if not self._death.done():
            self._death.set_result(None)

    def shutdown(self):
        """End the engine's child processes, event loop and files. A second call does nothing."""
        # Stock code kills all child processes: W&B, judges, multiprocessing's resource tracker too.
        stock = sglang_engine.kill_process_tree
        sglang_engine.kill_process_tree = lambda *_, **__: kill_with_children(self.processes)
        try:
            super().shutdown()
        finally:
            sglang_engine.kill_process_tree = stock
            for file in self.files:
                file.unlink(missing_ok=True)
            if self.files:
                resource_tracker.unregister(f"/{self.files[-1].name}", "shared_memory")
            self.files = []
        # Without a loop the engine died while it was being started.
        if hasattr(self, "loop") and self.loop.is_running():
            cancelled = asyncio.run_coroutine_threadsafe(self._cancel_tasks(), self.loop)
            concurrent.futures.wait([cancelled], timeout=2 * LOOP_ENDS_WITHIN_S)
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(LOOP_ENDS_WITHIN_S)

    @staticmethod
    async def _cancel_tasks() -> None:
        """Cancel what waits on the loop: Python prints an error for each task pending at exit."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LOOP_ENDS_WITHIN_S)

    # --- generation

    async def generate(
        self,
        prompts_ids: list[list[int]],
        sampling: dict | list[dict],
        *,
        request_ids: list[str] | None = None,
        cache: str = "",
        keep: bool = True,
    ) -> list[dict]:
        """Return one response per prompt, in order, as SGLang's dicts.

        They hold output_ids, meta_info, weight_versions, one per token, and routed_experts, bytes
        as in a Sample; b"" unless the engine was started to report them.

        cache: calls share cached prefixes if they have the same cache name and weight version.
        keep: leave the requests in the cache, for prompts that go on from them.
        """
        self._count_requests(len(prompts_ids))
        try:
            counts = collections.Counter(map(tuple, prompts_ids))
            shared = [list(ids) for ids, count in counts.items() if count > 1]
            if shared:
                # Compute a prompt that several requests have once: a request for no token at all
                # comes before them and leaves it in the cache.
                none = {"max_new_tokens": 0}
                prefill = io_struct.GenerateReqInput(input_ids=shared, sampling_params=none)
                await self._ask(prefill, cache)
            request = io_struct.GenerateReqInput(
                input_ids=prompts_ids,
                sampling_params=sampling,
                rid=request_ids,
                # So SGLang's warm-up asks not to be kept; see process._keep_chunks.
                bootstrap_host=None if keep or not REPORTS_VERSIONS else FAKE_BOOTSTRAP_HOST,
                return_logprob=True,
                return_routed_experts=self.server_args.enable_return_routed_experts,
                stream=not REPORTS_VERSIONS,
            )
            outputs = await self._ask(request, cache)
        finally:
            self._count_requests(-len(prompts_ids))
        for output in outputs:
            reported = output["meta_info"].pop("routed_experts", None)
            output["routed_experts"] = pack_reported(reported, self.config) if reported else b""
            if REPORTS_VERSIONS:
                spans = output["meta_info"]["weight_versions"]
                versions = [[int(one["version"])] * (one["end"] - one["start"]) for one in spans]
                output["weight_versions"] = sum(versions, [])
        return outputs

    async def _ask(self, request, cache: str) -> list[dict]:
        """Return the outputs of a batch of requests, when all are done."""
        # The sender of an update does not wait for its end; the next request does.
        await self._settled()
        request.extra_key = f"{self.version} {cache}"
        n = len(request.input_ids)
        stream = self.tokenizer_manager.generate_request(request, None)
        async with self._patience(f"{n} requests"):
            return await (self._count_versions(stream, n) if request.stream else anext(stream))

    @contextlib.asynccontextmanager
    async def _patience(self, what: str):
        """Raise EngineDied after answer_timeout_s: an engine that hangs reports nothing itself."""
        try:
            async with asyncio.timeout(self.answer_timeout_s):
                yield
        except TimeoutError as error:
            rule = f"within --answer-timeout-s {self.answer_timeout_s:g}"
            raise EngineDied(
                f"rank {os.environ['RANK']}: the engine has not finished {what} {rule}: it hangs,"
                " or needs more time"
            ) from error

    async def _count_versions(self, stream, n: int) -> list[dict]:
        """Return the outputs of a stream, with weight versions by the time of arrival.

        Replies come in order: a token that arrives before an update's reply was sampled before it.
        """
        outputs, versions = [None] * n, [[] for _ in range(n)]
        async for output in stream:
            i = output["index"]
            outputs[i] = output
            versions[i] += [self.version] * (len(output["output_ids"]) - len(versions[i]))
        for output, output_versions in zip(outputs, versions):
            output["weight_versions"] = output_versions
        return outputs

    async def abort(self, request_ids: list[str]) -> None:
        """Stop these requests. Each returns what it has, with finish reason abort."""
        for request_id in request_ids:
            self.tokenizer_manager.abort_request(request_id)

    async def drain(self) -> None:
        """Wait until no request is running or queued."""
        while self.requests:
            await asyncio.sleep(0.002)

    def _count_requests(self, change: int) -> None:
        self.requests += change
        self._mark()

    def _mark(self) -> None:
        self.timeline.switch_to("sync" if self._paused else "rollout" if self.requests else "wait")

    # --- weights
    #
    # The parts of an update run on the event loop, one after another, while the caller prepares the
    # next. What a part raises is raised by the next load() or settle().

    def settle(self) -> None:
        """Wait until all parts of updates so far are done. Raises what one of them raised."""
        self.call(self._settled())

    async def _settled(self) -> None:
        if self._last_part is not None:
            await asyncio.wrap_future(self._last_part)

    def _enqueue(self, part, name: str, about: list[str]) -> None:
        """Run a part of an update after the previous one. about: its tensors, for error notes."""
        previous, self.last_phase = self._last_part, (name, about)

        async def after_previous():
            if previous is not None:
                await asyncio.wrap_future(previous)
            with phase(name, about):
                async with self._patience(name):
                    await part()

        self._last_part = asyncio.run_coroutine_threadsafe(after_previous(), self.loop)

    def release_memory(self) -> None:
        """Give back the GPU memory of weights and cache; the next update takes it again.

        For a GPU that engine and trainer share. Nothing may be running. Raises RuntimeError if less
        came back for the weights than they took. Elsewhere it does nothing: on a CPU the system
        takes memory that is not used.
        """
        if not self.server_args.enable_memory_saver:
            return
        # The last answer arrives before the scheduler knows that it is idle, and SGLang asserts
        # that it is.
        deadline = time.time() + 60
        while not self.call(self.tokenizer_manager.flush_cache()).success:
            if time.time() > deadline:
                raise RuntimeError(
                    "the engine is still busy after 60 s: its memory can only be released when"
                    " nothing is running"
                )
            time.sleep(0.01)
        for tag in ("kv_cache", "weights"):
            free_before, _ = torch.cuda.mem_get_info()
            request = io_struct.ReleaseMemoryOccupationReqInput(tags=[tag])
            self.call(self.tokenizer_manager.release_memory_occupation(request, None))
            freed = torch.cuda.mem_get_info()[0] - free_before
        self._released = True
        # Of an engine on several GPUs this sees the first.
        check_released(freed, of=self._weight_bytes // self.server_args.tp_size)

    async def _resume_memory(self, tag: str) -> None:
        request = io_struct.ResumeMemoryOccupationReqInput(tags=[tag])
        await self.tokenizer_manager.resume_memory_occupation(request, None)

    def begin_update(self) -> None:
        """Pause running requests in place and open an update."""
        self._enqueue(self._begin, "begin of update", [f"after version {self.version}"])

    async def _begin(self) -> None:
        """Pause generation and open an update, for new weights or for verification."""
        request = io_struct.PauseGenerationReqInput(mode="in_place")
        await self.tokenizer_manager.pause_generation(request)
        if self._released:  # only the weights; the cache when the trainer's buckets are gone
            await self._resume_memory("weights")
        # 0.5.21 refuses an update without it; 0.5.14 does not have it.
        if hasattr(self.tokenizer_manager, "begin_weight_update"):
            request = io_struct.BeginWeightUpdateReqInput()
            outcome = await self.tokenizer_manager.begin_weight_update(request, None)
            self._must(outcome, "begin_weight_update")
        # Only now: the scheduler answers between two forward passes, and generates until then.
        self._paused = True
        self._mark()

    def load(self, named: list[Named], *, version: int, base: int | None = None) -> None:
        """Load tensors of this version, after waiting for those given before.

        They are full Hugging Face tensors, or changes since the version `base` (backends/delta.py),
        and travel as one message, in memory shared with the engine. base: -1 where all is sent and
        changes will follow, None where none ever will.
        """
        has = self.server_args
        if has.enable_memory_saver and not has.enable_weights_cpu_backup and base not in (None, -1):
            raise RuntimeError("changes came for an engine whose memory keeps no weights")
        if self.last_phase[0] == "load":
            self.settle()
        header, flat = pack(named)
        header = torch.frombuffer(bytearray(header), dtype=torch.uint8)
        versions = torch.tensor([NO_CHANGES if base is None else base, version])
        message = [("header", header), ("bytes", flat), ("versions", versions)]
        loader = f"{BUCKETS}.load_bucket"
        names = [name for name, _ in named]
        self._update_bytes += sum(held_bytes(*pair) for pair in named)
        self._enqueue(lambda: self._update(message, loader, version), "load", names)

    def end_update(self, version: int) -> None:
        """Finish the update and let requests go on: from then on the engine has this version."""
        self._weight_bytes = max(self._weight_bytes, self._update_bytes)
        self._update_bytes = 0

        async def part():
            if version <= self.version:
                raise RuntimeError(
                    f"weight version {version} does not follow {self.version}: versions must grow"
                )
            await self._close_update()
            if self._released:
                await self._resume_memory("kv_cache")
                self._released = False
            self.version = version
            await self._continue()

        self._enqueue(part, "end of update", [f"version {version}"])

    def compare(self, named: list[Named]) -> torch.Tensor:
        """Return buckets.compare_loader's report about tensors: int64 [engine tp, tensors, 3].

        The engine's weights stay as they are.
        """
        shape = (self.server_args.tp_size, len(named), 3)
        report = torch.full(shape, -1, dtype=torch.int64, device=named[0][1].device)
        message, loader = [*named, ("report", report)], f"{BUCKETS}.compare_loader"

        async def parts():
            await self._begin()
            await self._update(message, loader, None)
            await self._close_update()
            await self._continue()

        self._enqueue(parts, "read back", [name for name, _ in named])
        self.settle()
        report = report.cpu()
        if silent := [rank for rank, rows in enumerate(report) if (rows < 0).any()]:
            raise RuntimeError(f"read-back failed: engine ranks {silent} have compared nothing")
        return report

    async def _continue(self) -> None:
        await self.tokenizer_manager.continue_generation(io_struct.ContinueGenerationReqInput())
        self._paused = False
        self._mark()

    async def _update(self, payload, load_format: str, version: int | None) -> None:
        ranks = range(self.server_args.tp_size)
        request = io_struct.UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[MultiprocessingSerializer.serialize(payload) for _ in ranks],
            load_format=load_format,
            flush_cache=False,
            weight_version=None if version is None else str(version),
        )
        outcome = await self.tokenizer_manager.update_weights_from_tensor(request, None)
        self._must(outcome, "update_weights_from_tensor")

    async def _close_update(self) -> None:
        if hasattr(self.tokenizer_manager, "end_weight_update"):
            request = io_struct.EndWeightUpdateReqInput()
            outcome = await self.tokenizer_manager.end_weight_update(request, None)
            self._must(outcome, "end_weight_update")

    @staticmethod
    def _must(outcome: tuple[bool, str], what: str) -> None:
        """Raise RuntimeError if SGLang refused a part of an update: (False, message).

        SGLang would go on. Here it ends the run, because weights may be half updated.
        """
        success, message = outcome[0], outcome[1]
        if not success:
            raise RuntimeError(
                f"SGLang refused {what}: {message}. The engine's weights are not usable."
            )
