"""Which samples a data-parallel rank computes, and which of them together in a micro-batch."""

UNITS_PER_RANK = 4  # with fewer, ranks would have very different amounts of tokens


def microbatch_plan(
    trainer, samples: list, *, share_prompts: bool = False
) -> list[list[list[int]]]:
    """Return plan[data-parallel rank][micro-batch] = indices of samples.

    share_prompts: keep samples of one prompt together. They count as if each had its own prompt:
    attention holds the prompt's keys once for each.
    """
    cp = trainer.settings.cp
    budget, dp = trainer.settings.microbatch_tokens * cp, trainer.dp_group.size()
    lengths = [len(sample.prompt_ids) + len(sample.response_ids) for sample in samples]
    lengths = [padded_length(length, cp) for length in lengths]
    units = [[i] for i in range(len(samples))]
    if share_prompts:
        units = _units(samples, lengths, at_most=budget, at_least=UNITS_PER_RANK * dp)
    of_units = [sum(lengths[i] for i in unit) for unit in units]
    try:
        plan = plan_microbatches(of_units, microbatch_tokens=budget, dp=dp)
    except ValueError as error:
        sample = samples[lengths.index(max(lengths))]
        raise ValueError(f"sample {sample.index} of group {sample.group}: {error}") from None
    return [[[i for u in bin for i in units[u]] for bin in rank] for rank in plan]


def _units(samples: list, lengths: list[int], *, at_most: int, at_least: int) -> list[list[int]]:
    """Return parts of a plan, as indices of samples: each of one prompt, in few parts.

    at_most: tokens of a part, if it has several samples. at_least: how many parts, if there are
    samples enough; fewer could not be dealt evenly.
    """
    of_prompt = {}
    for i, sample in enumerate(samples):
        of_prompt.setdefault(tuple(sample.prompt_ids), []).append(i)
    units = []
    for indices in of_prompt.values():
        parts = min(len(indices), -(-at_least // len(of_prompt)))
        while True:
            split = [indices[k::parts] for k in range(parts)]
            largest = max(sum(lengths[i] for i in part) for part in split)
            if largest <= at_most or parts == len(indices):
                break
            parts += 1
        units += split
    return units


def plan_microbatches(
    lengths: list[int], *, microbatch_tokens: int, dp: int
) -> list[list[list[int]]]:
    """Plan the micro-batches of each data-parallel rank: plan[rank][micro-batch] = indices.

    Every rank gets the same number of micro-batches, because collectives inside the model must pair
    up. There are as few as the token budget allows. A micro-batch may be exactly full. It may be
    empty if there are fewer samples than micro-batches.

    lengths: tokens of each sample, or of each unit of several. Raises ValueError if one is above
    the budget.
    """
    if (longest := max(lengths, default=0)) > microbatch_tokens:
        raise ValueError(
            f"a sample has {longest} tokens, and a micro-batch holds at most {microbatch_tokens},"
            " --microbatch-tokens times --cp: raise --microbatch-tokens"
        )
    fewest = dp * max(1, -(-sum(lengths) // (dp * microbatch_tokens)))
    # This ends: with len(lengths) bins more, each sample has a bin of its own.
    for n_bins in range(fewest, fewest + len(lengths) + dp, dp):
        bins, loads = _fill_bins(lengths, n_bins)
        if max(loads) <= microbatch_tokens:
            break
    # Ranks take bins in turn, the fullest first, so that they compute together for about as long.
    by_load = sorted(range(n_bins), key=lambda i: -loads[i])
    return [[bins[i] for i in by_load[rank::dp]] for rank in range(dp)]


def _fill_bins(lengths: list[int], n_bins: int) -> tuple[list[list[int]], list[int]]:
    """Return the samples of each bin, by index, and its tokens.

    The longest sample goes first, each into the bin that holds least. So bins are about equally
    full, and in a bin samples of about one length follow each other.
    """
    bins, loads = [[] for _ in range(n_bins)], [0] * n_bins
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        lightest = loads.index(min(loads))
        bins[lightest].append(i)
        loads[lightest] += lengths[i]
    return bins, loads


def padded_length(length: int, cp: int) -> int:
    """Return the length of a sequence in a micro-batch: with cp > 1 a multiple of 2 cp (zigzag)."""
    return length if cp == 1 else -(-length // (2 * cp)) * 2 * cp
