"""The trainer and the hand-off at every parallel layout: data, tensor, expert, pipeline and context
parallelism, for every family.

What must hold, and why it matters:
- logits and log-probs equal transformers' on the same weights: the mapping, the packing and the
  temperature are right;
- handed-over bytes equal quantize(full tensor of the file): the engine cannot tell how the trainer
  was split;
- the exported folder holds the very bytes that were loaded: nothing is lost on the way in or out;
- loss and gradient norm of a batch do not depend on ranks or micro-batches: normalisation is
  global.

fp32 throughout, so that tolerances are tight. The models have 97 tokens: tensor parallelism must
pad the vocabulary. The padding may not show in logits, bytes, files or losses, with tied embeddings
(qwen2) and without. Not covered here: engines (test_engine.py).
"""

import json

import pytest
import torch
import transformers
from conftest import torchrun, write_model
from safetensors.torch import load_file

LAYOUTS = {
    "one rank": (1, 1, 1, 1, 1),
    "dp 2": (2, 1, 1, 1, 1),
    "tp 2": (2, 2, 1, 1, 1),
    "ep 2": (2, 1, 2, 1, 1),
    "tp 2 ep 2": (2, 2, 2, 1, 1),
    "pp 2": (2, 1, 1, 2, 1),
    "cp 2": (2, 1, 1, 1, 2),
    "cp 2 ep 2": (2, 1, 2, 1, 2),
    "tp 2 pp 2": (4, 2, 1, 2, 1),
    "pp 2 ep 2": (4, 1, 2, 2, 1),
    "tp 2 cp 2": (4, 2, 1, 1, 2),
}  # ranks, tp, ep, pp, cp
FAMILIES = {
    "qwen3": 1,
    "qwen2": 1,
    "llama": 1,
    "qwen3_moe": 2,
    "glm4_moe": 2,
}  # and the largest ep that is tested
CASES = [
    (layout, family)
    for layout, (_, _, ep, _, _) in LAYOUTS.items()
    for family in FAMILIES
    if ep <= FAMILIES[family]
]


@pytest.fixture(scope="module")
def reports(models, tmp_path_factory):
    """Of each layout: {family: [each rank's report]}, and the folder of its exported models.

    All layouts of one number of ranks share a start of the ranks.
    """
    # At tp 4 every shard of q, k and v is cut inside a block, and is gathered before it is
    # quantized. It needs four key-value heads.
    heads = dict(num_attention_heads=8, num_key_value_heads=4)
    wide = tmp_path_factory.mktemp("wide")
    wide = {family: str(write_model(wide / family, family, **heads)) for family in FAMILIES}
    cases = {ranks: {} for ranks in (1, 2, 4)}
    for layout, (ranks, *splits) in LAYOUTS.items():
        folders = {family: str(models[family]) for family in FAMILIES if (layout, family) in CASES}
        cases[ranks][layout] = dict(splits=splits, folders=folders, trains=True)
    cases[4]["tp 4"] = dict(splits=[4, 1, 1, 1], folders=wide, trains=False)
    found = {}
    for ranks, layouts in cases.items():
        out = tmp_path_factory.mktemp("layouts")
        (out / "cases.json").write_text(json.dumps(layouts), encoding="utf-8")
        torchrun("tests/workers/layout.py", out, out / "cases.json", ranks=ranks, timeout=1800)
        measured = json.loads((out / "report.json").read_text(encoding="utf-8"))
        found |= {layout: (report, out / layout) for layout, report in measured.items()}
    return found


@pytest.mark.parametrize("layout, family", CASES)
class TestEachLayout:
    def test_logits_equal_transformers(self, reports, layout, family):
        ranks = reports[layout][0][family]
        assert (
            0 < max(rank["errors"]["logits"] for rank in ranks) < 1e-5
            and max(rank["errors"]["logprobs"] for rank in ranks) < 2e-5
        )

    def test_bytes_equal_quantized_full_tensors(self, reports, layout, family):
        # At tp 2, o_proj, gate, up and down are quantized as shards; k and v (64 rows each) are
        # gathered first.
        assert [rank["hand_off_errors"] for rank in reports[layout][0][family]] == [[]] * LAYOUTS[
            layout
        ][0]

    def test_export_returns_the_loaded_weights(self, reports, models, layout, family):
        source, exported = (
            load_file(models[family] / "model.safetensors"),
            load_file(reports[layout][1] / family / "model.safetensors"),
        )
        assert source.keys() == exported.keys()
        assert all(
            torch.equal(source[name].to(exported[name].dtype), exported[name]) for name in source
        )
        assert (
            json.loads((reports[layout][1] / family / "config.json").read_text(encoding="utf-8"))[
                "dtype"
            ]
            == "bfloat16"
        )
        transformers.AutoModelForCausalLM.from_pretrained(reports[layout][1] / family)

    @pytest.mark.parametrize("microbatch_tokens", [4096, 64])
    def test_same_loss_and_gradient_as_one_rank(self, reports, layout, family, microbatch_tokens):
        expected = reports["one rank"][0][family][0]["steps_4096"]
        for rank in reports[layout][0][family]:
            for step, reference in zip(rank[f"steps_{microbatch_tokens}"], expected):
                for metric, value in reference.items():
                    # approx_kl is a difference of nearly equal numbers, and 0 at the first step.
                    assert step[metric] == pytest.approx(value, rel=1e-5, abs=1e-6), metric


@pytest.mark.parametrize("layout, family", CASES)
def test_bf16_differs_by_its_rounding(reports, layout, family):
    """BF16 keeps 8 bits, and every split rounds other sums: the gradient norm moves by under 2 %,
    the loss by under 0.02. A lost factor of 2 would show.
    """
    expected = reports["one rank"][0][family][0]["step_bf16"]
    for rank in reports[layout][0][family]:
        step = rank["step_bf16"]
        assert step["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.02) and step[
            "loss"
        ] == pytest.approx(expected["loss"], abs=0.02)
        assert step["tokens"] == expected["tokens"] and step["logprob_shift"] == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_four_tensor_parallel_ranks(reports, family):
    ranks = reports["tp 4"][0][family]
    assert max(rank["errors"]["logits"] for rank in ranks) < 1e-5
    assert [rank["hand_off_errors"] for rank in ranks] == [[]] * 4


@pytest.mark.parametrize("family, tp, other_tp", [("qwen3", 2, 1), ("qwen2", 1, 2)])
def test_a_padded_vocabulary_goes_through_a_checkpoint(models, tmp_path, family, tp, other_tp):
    """97 rows at tp 1, 98 at tp 2: a run goes on at the other size as it would have at its own.

    qwen2's embeddings are tied.
    """
    torchrun("tests/workers/padded_checkpoint.py", tmp_path, models[family], tp, other_tp, ranks=2)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["differ"] == []
    assert report["rows"] == 97
    assert report["got"] == pytest.approx(report["expected"], rel=1e-5, abs=1e-6)


def test_the_first_update_starts_from_ratio_one(reports):
    # logprobs come from a training pass, old_logprobs from a forward pass before it: the same
    # numbers to the last bit.
    for layout, family in CASES:
        for steps in ("steps_4096", "steps_64"):
            assert all(
                step["logprob_shift"] == 0.0 and step["ratio"] == 1.0
                for step in reports[layout][0][family][0][steps]
            )
