"""Refuse a choice of loss, correction and KL whose parts do not fit, and values out of range.

Most rules are entries of the tables in losses.py: `only` and the bounds of PolicyLoss, Correction
and KLEstimator. A new algorithm gets its checks from its entry.
"""

import math
from collections.abc import Iterator
from typing import Any

from common.errors import all_problems, flag_of
from losses import CORRECTIONS, KL_ESTIMATORS, POLICY_LOSSES, LossSettings


@all_problems
def check_loss_settings(settings: LossSettings) -> None:
    """Refuse a choice from the tables whose parts do not fit, and values out of range."""
    yield from _unsupported_values("policy_loss", POLICY_LOSSES, settings)
    if settings.kl_coef:
        yield from _unsupported_values("kl_estimator", KL_ESTIMATORS, settings)
    own = {name: name for name in ("clip_low", "clip_high", "tau_pos", "tau_neg")}
    yield from _bounds_without_effect("policy_loss", POLICY_LOSSES, own, settings)
    yield from _bounds_without_effect(
        "correction", CORRECTIONS, {"correction_low": "low", "correction_high": "high"}, settings
    )

    # In the comparisons below nan is false, so that it is refused. None is no bound.
    clips = settings.clips
    low, high = clips["clip_low"], clips["clip_high"]
    if not ((low is None or 0 < low <= 1) and (high is None or high > 0)):
        yield f"--clip-low {low} must lie in (0, 1], --clip-high {high} must be positive"
    pos, neg = clips.get("tau_pos", 1.0), clips.get("tau_neg", 1.0)
    if not (0 < pos < math.inf and 0 < neg < math.inf):
        yield f"--tau-pos {pos} and --tau-neg {neg} must be positive and finite"
    if settings.dual_clip and not settings.dual_clip > 1:
        yield f"--dual-clip {settings.dual_clip} must be above 1, or 0 for none"
    low, high = settings.correction_bounds.values()
    if not ((low is None or 0 <= low <= 1) and (high is None or high >= 1)):
        given = f"--correction-low {low} and --correction-high {high}"
        yield f"{given} must satisfy 0 <= low <= 1 <= high"
    if settings.old_logprobs == "rollout" and settings.correction != "none":
        why = "between the engine's log-probs and themselves there is nothing to correct"
        given = f"--old-logprobs rollout and --correction {settings.correction}"
        yield f"{given} do not fit: {why}: use --correction none, or --old-logprobs trainer"
    if not (0 <= settings.kl_coef < math.inf and 0 <= settings.entropy_coef < math.inf):
        given = f"--kl-coef {settings.kl_coef} and --entropy-coef {settings.entropy_coef}"
        yield f"{given} must be finite and must not be negative"
    unset = (LossSettings.kl_estimator, LossSettings.kl_in)
    if not settings.kl_coef and (settings.kl_estimator, settings.kl_in) != unset:
        given = f"--kl-estimator {settings.kl_estimator} --kl-in {settings.kl_in}"
        yield f"{given} has no effect without --kl-coef: set one, or leave it out"


def _unsupported_values(name: str, table: dict[str, Any], settings: LossSettings) -> Iterator[str]:
    """Yield the settings whose values the choice from this table does not support.

    name: the setting that chooses from the table.
    """
    choice = getattr(settings, name)
    for other, supported in table[choice].only.items():
        given = getattr(settings, other)
        if given in supported:
            continue
        fix = f"use {flag_of(other)} {' or '.join(map(str, supported))}"
        # Choices that would support the given value.
        instead = [key for key, entry in table.items() if given in entry.only.get(other, (given,))]
        if instead:
            fix += f", or {flag_of(name)} {' or '.join(instead)}"
        yield f"{flag_of(name)} {choice} and {flag_of(other)} {given} do not fit: {fix}"


def _bounds_without_effect(
    name: str, table: dict[str, Any], bounds: dict[str, str], settings: LossSettings
) -> Iterator[str]:
    """Yield the bounds that are set although the choice from this table has none.

    name: the setting that chooses from the table. bounds: {setting: its field in the table}.
    """
    choice = getattr(settings, name)
    for bound, field in bounds.items():
        value = getattr(settings, bound)
        if value is not None and getattr(table[choice], field) is None:
            why = f"{flag_of(name)} {choice} has no such bound"
            yield f"{flag_of(bound)} {value} has no effect: {why}; leave it out"
