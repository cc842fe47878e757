"""One run of bench/density.py, which starts it: loop_sync.py, with every update measured.

    python bench/density_run.py WHAT FILE EVERY FLAGS_OF_THE_LOOP …

WHAT: density or lag, or "density spread" or "lag spread", which spread the main weights first.
Writes to FILE a JSON list with a row for each step; every EVERY steps the row has measurements.
bench/density.py says what they mean. One rank: then shards and main weights are whole tensors.

Shape letters: N output features (rows), K input features (columns), n and k blocks along them.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import torch

from fp8_quant import BLOCK, dequantize_blockwise, quantize_blockwise

KINDS = ("codes", "scales", "other", "bf16", "ue8m0 codes", "ue8m0 scales")
OF_CODES = ("in moved blocks", "sign of 0")
WAYS = ("fp32", "bf16", "fp8")
PAIRS = (("bf16", "fp32"), ("fp8", "bf16"), ("fp8", "fp32"))


def worker(what: str, file: str, every: str, arguments: list[str]) -> None:
    """Run the loop's own main(), and write to the file what each step's update changed."""
    from harness import checks, exits, flags
    import reward
    import train_step
    import weight_sync

    if "--prompts" in arguments:  # another model than the toy
        reward.REWARDS["exact"] = lambda sample: float(sum(sample.response_ids) % 2)
    stock_update, stock_path, paths = train_step.update_policy, weight_sync.open_path, []
    measure, rows = Shares() if "density" in what else Lag(), []

    def open_path(run, trainer):
        paths.append(stock_path(run, trainer))
        return paths[-1]

    def update_policy(trainer, batches, loss_settings):
        if not rows:
            if "spread" in what:
                spread_main_weights(trainer)
            measure.start(trainer, paths[0], batches, settings)
        metrics = stock_update(trainer, batches, loss_settings)
        row = {"step": len(rows) + 1, "grad_norm": metrics.get("grad_norm", 0.0)}
        if row["step"] % int(every) == 0:
            row |= measure.step(trainer, paths[0])
        rows.append(row)
        Path(file).write_text(json.dumps(rows), encoding="utf-8")
        return metrics

    train_step.update_policy, weight_sync.open_path = update_policy, open_path
    sys.argv = ["loop_sync.py", *arguments]
    import loop_sync

    settings = flags.parse_or_exit(loop_sync.Settings, checks.check_flags)
    exits.run_main(lambda: loop_sync.main(settings))


class Shares:
    """Counts, after each step, what differs from the step before."""

    def start(self, trainer, path, batches, settings) -> None:
        self.before, self.about = hand_off_bits(path), {}
        for kind in ("bf16", "other"):
            values = torch.cat([x.flatten() for (k, _), x in self.before.items() if k == kind])
            values = values.view(torch.bfloat16)
            self.about |= {f"{kind} zeros": float((values == 0).float().mean())}
            self.about |= {f"{kind} rms": math.sqrt(float(values.float().square().mean()))}

    def step(self, trainer, path) -> dict:
        """Return the shares that changed, by the names of the table, and what they are shares of.

        about: root mean square and share of zeros of the BF16 values at step 0.
        """
        after, total, changed = hand_off_bits(path), Counter(), Counter()
        for (kind, name), bits in after.items():
            before = self.before[kind, name]
            differs = bits != before
            total[kind] += differs.numel()
            changed[kind] += int(differs.sum())
            if kind == "codes":
                moved = after["scales", name] != self.before["scales", name]
                changed["in moved blocks"] += int((differs & per_element(moved, bits.shape)).sum())
                changed["sign of 0"] += int((differs & ((bits | before) & 0x7F == 0)).sum())
        self.before = after
        shares = {kind: changed[kind] / total[kind] for kind in KINDS}
        shares |= {kind: ratio(changed[kind], changed["codes"]) for kind in OF_CODES}
        return {"shares": shares, "total": total, "about": self.about}


def hand_off_bits(path) -> dict[tuple[str, str], torch.Tensor]:
    """Return what a hand-off sends, and its variants, as integers: {(kind, name): tensor}.

    kind: of KINDS. Copies; codes uint8 [N, K], scales int32 [n, k], BF16 values int16.
    """
    from backends.delta import as_integers
    from weight_sync import shards_in_model_order

    found = {}

    def keep(kind: str, name: str, tensor: torch.Tensor) -> None:
        found[kind, name] = as_integers(tensor.clone(memory_format=torch.contiguous_format))

    for shard in shards_in_model_order(path, quantize=True):
        (name,) = shard.names  # one rank: no other rank's experts
        if name.endswith("_scale_inv"):
            keep("scales", name.removesuffix("_scale_inv"), shard.local)
        else:
            keep("codes" if name in path.fp8 else "other", name, shard.local)
    for shard in shards_in_model_order(path, quantize=False):
        (name,) = shard.names
        if name in path.fp8:
            codes, scales = quantize_ue8m0(shard.local)
            for kind, tensor in (("bf16", shard.local), ("ue8m0 codes", codes)):
                keep(kind, name, tensor)
            keep("ue8m0 scales", name, scales)
    return found


def quantize_ue8m0(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a BF16 matrix with scales 2^ceil(log2(amax / 448)) of 128 x 128 blocks.

    Returns (codes [N, K] float8_e4m3fn, scales [n, k] float32), as quantize_blockwise does.
    """
    _, exact_nk = quantize_blockwise(weight_NK)
    mantissa_nk, exponent_nk = torch.frexp(exact_nk)  # exact: mantissa x 2^exponent, in [0.5, 1)
    exponent_nk = exponent_nk - (mantissa_nk == 0.5).int()
    scale_nk = torch.ldexp(torch.ones_like(exact_nk), exponent_nk)
    scaled_NK = weight_NK.float() / per_element(scale_nk, weight_NK.shape)
    return scaled_NK.to(torch.float8_e4m3fn), scale_nk


def per_element(block_nk: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return each block's value at each of its elements, [N, K]."""
    of_rows_Nk = block_nk.repeat_interleave(BLOCK, 0)[: shape[0]]
    return of_rows_Nk.repeat_interleave(BLOCK, 1)[:, : shape[1]]


class Lag:
    """Compares how far the fp32, BF16 and FP8 weights and policies have moved since step 0."""

    def start(self, trainer, path, batches, settings) -> None:
        """Build the model that computes in fp32, and keep weights and log-probs of step 0."""
        from backends.megatron.model import load_model

        fp32 = replace(settings.train, train_dtype="fp32")
        self.model, _, _ = load_model(settings.run.model, fp32, path.config)
        self.model.requires_grad_(False)
        self.in_fp32 = replace(trainer, settings=fp32)
        self.microbatches = [one for batch in batches for one in batch.microbatches]
        self.weights_0 = {
            name: {way: tensor.clone() for way, tensor in ways.items()}
            for name, ways in self.quantized(trainer, path)
        }
        self.logprobs_0 = self.logprobs(trainer, path)

    def step(self, trainer, path) -> dict[str, float]:
        """Return what bench/density.py prints of this step."""
        return self.moved_weights(trainer, path) | self.moved_logprobs(trainer, path)

    def moved_weights(self, trainer, path) -> dict[str, float]:
        """Compare the three movements of the weights that are handed over in FP8."""
        dots, changed, total = Counter(), Counter(), 0
        for name, ways in self.quantized(trainer, path):
            start = self.weights_0[name]
            moved = {way: ways[way] - start[way] for way in WAYS}
            for x, y in (*PAIRS, *zip(WAYS, WAYS)):
                dots[x, y] += float((moved[x] * moved[y]).sum(dtype=torch.float64))
            total += moved["bf16"].numel()
            changed["bf16"] += int((moved["bf16"] != 0).sum())
            changed["codes"] += int((ways["codes"] != start["codes"]).sum())
        row = {"moved": math.sqrt(dots["fp32", "fp32"] / total)}  # root mean square
        row |= {f"{kind} differ": changed[kind] / total for kind in ("bf16", "codes")}
        for x, y in PAIRS:
            row[f"follow {x}/{y}"] = ratio(dots[x, y], dots[y, y])
            row[f"norm {x}/{y}"] = math.sqrt(ratio(dots[x, x], dots[y, y]))
        return row

    def moved_logprobs(self, trainer, path) -> dict[str, float]:
        """Compare the three changes of the fixed tokens' log-probs."""
        logprobs, start = self.logprobs(trainer, path), self.logprobs_0
        shifts = {way: logprobs[way] - start[way] for way in WAYS}
        row = {f"|shift| {way}": float(shift.abs().mean()) for way, shift in shifts.items()}
        for x, y in PAIRS:
            mine, theirs = (shifts[way] - shifts[way].mean() for way in (x, y))
            both, own, its = (float(p.sum()) for p in (mine * theirs, mine**2, theirs**2))
            row[f"slope {x}/{y}"] = ratio(both, its)
            row[f"r {x}/{y}"] = ratio(both, math.sqrt(own * its))
        # What FP8 itself costs, to compare the shifts with.
        cost = float((start["fp8"] - start["bf16"]).abs().mean())
        return row | {"tokens": len(start["fp8"]), "|fp8 - bf16| at 0": cost}

    def quantized(self, trainer, path) -> Iterator[tuple[str, dict]]:
        """Yield (name, {"fp32", "bf16", "fp8": float32 [N, K], "codes": uint8}) of FP8 weights."""
        for _, parts in all_parts(trainer, path):
            yield from ((name, ways) for name, ways in parts if "codes" in ways)

    def logprobs(self, trainer, path) -> dict:
        """Return {way: float64 [tokens]}, the log-probs of the response tokens."""
        from backends.huggingface.names import parameters_of, stack_parts
        from train_step import compute_logprobs

        found, groups = {}, path.config["num_key_value_heads"]
        targets = dict(parameters_of(self.model))
        for way in WAYS:
            with torch.no_grad():
                for name, parts in all_parts(trainer, path):
                    tensors = [ways.get(way, ways["bf16"]) for _, ways in parts]
                    targets[name].copy_(stack_parts(tensors, groups=groups))
            of_each = compute_logprobs(self.in_fp32, self.microbatches, model=self.model)
            kept = [x[batch.mask_T > 0] for x, batch in zip(of_each, self.microbatches)]
            found[way] = torch.cat(kept).double()
        return found


def spread_main_weights(trainer) -> None:
    """Move each fp32 main weight to a random place among those that round to its BF16 value."""
    for parameter in trainer.gpt.parameters():
        bits = parameter.detach().flatten().view(torch.int16)
        here, toward_0, away = ((bits + step).view(torch.bfloat16).float() for step in (0, -1, 1))
        place = (here + toward_0) / 2 + torch.rand(here.shape) * (away - toward_0) / 2
        # An edge may round to the neighbour, and below 0 there are only the bits of a NaN.
        stays = place.bfloat16() == parameter.flatten()
        parameter.main_param.copy_(torch.where(stays, place, here))


def all_parts(trainer, path) -> Iterator[tuple[str, list]]:
    """Yield (Megatron name, [(Hugging Face name, {way: tensor})]) of every parameter.

    The ways are fp32 and bf16; of a weight that is handed over in FP8 also fp8 and codes (uint8).
    Tensors are float32 unless said.
    """
    from backends.huggingface.names import parameters_of, rule_of, split_stacked

    stacked = dict(head_dim=path.config["head_dim"], groups=path.config["num_key_value_heads"])
    for megatron_name, parameter in parameters_of(trainer.gpt):
        names = rule_of(megatron_name).hf
        main = parameter.main_param.detach().view(parameter.shape)
        both = [split_stacked(x, len(names), **stacked) for x in (main, parameter.detach())]
        parts = []
        for name, fp32, bf16 in zip(names, *both):
            ways = {"fp32": fp32, "bf16": bf16.float()}
            if name in path.fp8:
                codes, scales = quantize_blockwise(bf16)
                ways["fp8"] = dequantize_blockwise(codes, scales, dtype=torch.float32)
                ways["codes"] = codes.view(torch.uint8)
            parts.append((name, ways))
        yield megatron_name, parts


def ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


if __name__ == "__main__":
    worker(*sys.argv[1:4], sys.argv[4:])
