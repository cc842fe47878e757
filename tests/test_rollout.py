"""rollout.py without an engine: settings that cannot work. Prompt data is tested in test_prompts.py, generation in test_engine.py."""

import pytest

from hf_config import read_config
from rollout import RolloutSettings, check_rollout_settings
from run import BadInput


@pytest.mark.parametrize("changes, message", [
    (dict(temperature=0.0), "--temperature 0.0 must be above 0"),
    (dict(prompts_per_step=3), "not divisible by the 2 engines"),
    (dict(engine_tp=3), "--engine-tp 3 does not divide the 2 ranks"),
    (dict(samples_per_prompt=1), "at least 2"),
    (dict(max_response_tokens=256), "context, 256"),
    (dict(eval_samples=0), "--eval-samples 0"),
    (dict(eval_samples=10**20), "--eval-samples 100000000000000000000 must lie between 1 and 100,000"),
    (dict(eval_samples_per_prompt=0), "--eval-samples-per-prompt 0"),
    (dict(sglang=("mem_fraction_sttic=0.5",)), "nearest is mem_fraction_static"),
    (dict(sglang=("dtype=half",)), "is not a field"),
    (dict(sglang=("log_level",)), "key=value"),
])  # fmt: skip
def test_settings_that_cannot_work(models, changes, message):
    with pytest.raises(BadInput, match=message):
        check_rollout_settings(RolloutSettings(**changes), read_config(models["qwen3"]), world_size=2)
