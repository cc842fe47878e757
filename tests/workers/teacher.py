"""A student and a teacher of another size or family at parallel layouts; run by test_distill.py.

    torchrun --nproc-per-node N teacher.py OUT_FOLDER CASES_FILE

CASES_FILE holds as JSON {name: {"splits": [tp, ep, pp, cp], "student": folder, "teacher": folder}}.
Rank 0 writes OUT_FOLDER/report.json, {name: samples with old_logprobs and ref_logprobs}. Every
rank must have the same.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

from groups import drop_megatron
from backends.huggingface.config import read_config
from common import distributed
from common.settings import TrainSettings
from data.sample import Sample
from harness import exits
import train_step

import numpy as np
import torch.distributed as dist


def scored(case: dict) -> list[dict]:
    """Return samples with the log-probs of student and teacher, at one layout."""
    tp, ep, pp, cp = case["splits"]
    splits = dict(tp=tp, ep=ep, pp=pp, cp=cp)
    settings = TrainSettings(
        **splits, train_dtype="fp32", reference=case["teacher"], microbatch_tokens=24
    )
    trainer = train_step.build_trainer(
        case["student"],
        settings,
        read_config(case["student"]),
        steps=2,
        seed=1,
        temperature=0.7,
        max_response_tokens=8,
        with_reference=True,
    )
    samples = [
        Sample(
            [5 + i, 6, 7][: 1 + i % 3],
            response_ids=[(3 * i + 5 * j) % 97 for j in range(1 + 2 * i % 7)],
            loss_mask=[1] * (1 + 2 * i % 7),
        )
        for i in range(9)
    ]
    train_step.add_logprobs(trainer, train_step.pack(trainer, samples))
    names = ("prompt_ids", "response_ids", "old_logprobs", "ref_logprobs")
    return [{name: np.array(getattr(s, name)).tolist() for name in names} for s in samples]


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    distributed.init_distributed()
    report = {}
    for name, case in cases.items():
        drop_megatron()
        report[name] = scored(case)
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, report[name])
        assert all(one == everyone[0] for one in everyone), name
    if dist.get_rank() == 0:
        (out / "report.json").write_text(json.dumps(report), encoding="utf-8")


if __name__ == "__main__":
    exits.run_main(main)
