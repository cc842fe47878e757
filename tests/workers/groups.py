"""Measures many cases in one process: Megatron's groups between two layouts, and one report."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from megatron.core import parallel_state as mpu


def drop_megatron() -> None:
    """Forget Megatron's parallel state and its process groups. The default group stays.

    A gloo group has threads that wake a hundred times a second for as long as anything refers to
    it. Megatron makes some twenty groups for a layout, and a trained model is not always freed. So
    trainers of one layout are to share its groups: with a thousand such threads nothing else runs.
    """
    if not mpu.model_parallel_is_initialized():
        return
    mpu.destroy_model_parallel()
    for group in list(c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    gc.collect()  # trainers are circles of references, and hold groups


def report_cases(out: Path, cases: dict[str, dict], measure: Callable[[str, str, dict], dict]):
    """Write out/report.json: {layout: {family: [what each rank has measured]}}. Collective.

    cases: {layout: {"folders": {family: model folder}, …}}. measure(layout, family, case) measures
    one model at one layout.
    """
    report = {}
    for layout, case in cases.items():
        drop_megatron()
        report[layout] = {}
        for family in case["folders"]:
            report[layout][family] = [None] * dist.get_world_size()
            dist.all_gather_object(report[layout][family], measure(layout, family, case))
    if dist.get_rank() == 0:
        (out / "report.json").write_text(json.dumps(report), encoding="utf-8")
