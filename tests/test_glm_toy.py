"""toy/glm: GLM-4.5's architecture, small enough to learn on two cores. Made by toy/make_toy.py."""

import json

import pytest
import torch
from backends.huggingface.config import read_config
from backends.huggingface.folder import HFWeights, check_model_folder
from backends.huggingface.fp8 import fp8_weights, linear_modules
from conftest import ROOT, metrics_of, torchrun


GLM = ROOT / "toy" / "glm"


def test_it_is_a_small_mixture_of_experts():
    config = read_config(GLM)
    check_model_folder(GLM, config, None, stop=())
    assert config["architectures"] == ["Glm4MoeForCausalLM"]
    assert (config["num_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["first_k_dense_replace"] == config["n_shared_experts"] == 1
    assert sum(path.stat().st_size for path in GLM.iterdir()) < 6 * 2**20


def test_experts_and_attention_are_held_in_fp8():
    config = read_config(GLM)
    fp8 = fp8_weights(config, rollout_dtype="fp8", engine_tp=1)
    assert len(fp8) == len(linear_modules(config))


def test_the_correction_bias_has_been_trained():
    """It stays in fp32, as GLM-4.5's does, and differs from expert to expert."""
    held = HFWeights(GLM)
    biases = [name for name in held.file_of if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for name in biases:
        bias = held.slice(name, None, 0, 0)
        assert bias.dtype == torch.float32 and bias.unique().numel() > 2


@pytest.mark.complete
@pytest.mark.parametrize("ranks, flags", [(1, []), (2, ["--ep", "2"])])
def test_it_learns(tmp_path, ranks, flags):
    given = ["--model", GLM, "--steps", "40", "--name", "glm", "--export", *flags]
    torchrun(ROOT / "loop_sync.py", *given, ranks=ranks, cwd=tmp_path)
    rows = metrics_of(tmp_path / "runs" / "glm")
    assert 0.2 < rows[0]["held_out"] < 0.55 and rows[-1]["held_out"] > 0.8


@pytest.mark.complete
def test_a_dump_trains_with_the_experts_that_the_engine_took(tmp_path):
    """--save-rollouts and --load-rollouts keep them; a dump without them is refused."""
    given = ["--model", GLM, "--steps", "2", "--prompts-per-step", "4", "--eval-samples", "16"]
    given += ["--export", "--routing-replay", "rollout", "--name"]
    torchrun(ROOT / "loop_sync.py", *given, "a", "--save-rollouts", ranks=1, cwd=tmp_path)
    dumps = tmp_path / "runs" / "a" / "rollouts"
    loaded = ["--load-rollouts", dumps]
    torchrun(ROOT / "loop_sync.py", *given, "b", *loaded, ranks=1, cwd=tmp_path)
    first, again = (metrics_of(tmp_path / "runs" / name)[1:] for name in "ab")
    same = ("loss", "grad_norm", "mismatch_k3", "route_mismatch")
    assert [[row[name] for name in same] for row in first] == [
        [row[name] for name in same] for row in again
    ]
    assert 0 < first[0]["route_mismatch"] < 0.2
    file = dumps / "step-000002.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    bare = [json.dumps(line | {"routed_experts": ""}) + "\n" for line in lines]
    file.write_text("".join(bare), encoding="utf-8")
    refused = torchrun(
        ROOT / "loop_sync.py", *given, "c", *loaded, ranks=1, cwd=tmp_path, check=False
    )
    assert "use a dump of a run with --routing-replay" in refused.stderr


@pytest.mark.complete
def test_replay_in_the_asynchronous_loop(tmp_path):
    """On two trainers, with groups that continue over weight updates, and a resumed run."""
    given = ["--model", GLM, "--routing-replay", "rollout", "--ep", "2", "--name", "async"]
    given += ["--prompts-per-step", "4", "--eval-samples", "16", "--export", "--save-every", "3"]
    for more in (["--steps", "3"], ["--steps", "6", "--resume"]):
        torchrun(ROOT / "loop_async.py", *given, *more, ranks=3, cwd=tmp_path)
    rows = [row for row in metrics_of(tmp_path / "runs" / "async") if "loss" in row]
    assert len(rows) == 6
    assert all(0 < row["route_mismatch"] < 0.2 for row in rows)
