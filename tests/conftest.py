"""Shared by all tests: import paths, small models, and engines that are started once.

Starting an engine costs about twenty seconds of imports, so the tests of one file share theirs (module-scoped fixtures) and so do all ranks of a
torchrun worker script in tests/workers/.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch

if not torch.cuda.is_available():
    import cpu  # noqa: F401  before transformers
import transformers

SMALL = dict(
    vocab_size=96, hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256
)  # fmt: skip
FAMILIES = {
    "qwen3": (transformers.Qwen3Config, dict(head_dim=64, tie_word_embeddings=False)),
    "qwen2": (transformers.Qwen2Config, dict(tie_word_embeddings=True)),
    "llama": (transformers.LlamaConfig, dict(tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 50000.0})),
}


def write_model(folder: Path, family: str, *, dtype=torch.float32, **changes) -> Path:
    """A random model of a family as a Hugging Face folder, with the toy's tokenizer. Norms and biases are random too, so that a lost one shows."""
    config_class, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**{**SMALL, **fields, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
    model.to(dtype).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(ROOT / "toy").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """One small fp32 model of each family."""
    return {family: write_model(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def torchrun(*arguments, ranks: int, timeout: int = 600, cwd: Path = ROOT, check: bool = True) -> subprocess.CompletedProcess:
    """Run a script under torchrun with this interpreter; standalone picks a free port. Output is captured as text."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


@pytest.fixture(scope="session")
def one_rank():
    """A default process group of one rank in the test process itself, as torchrun would make it."""
    import run

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ["MASTER_PORT"] = str(store.port)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield run
    torch.distributed.destroy_process_group()


@pytest.fixture
def fresh_megatron(one_rank):
    """Megatron's parallel state is global to a process: drop what an earlier test has set up."""
    from megatron.core import parallel_state as mpu

    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
