"""A trainer's state in files, by megatron-core's dist_checkpointing: any layout reads any other's.

Patches at the end mend how megatron-core 0.16.1 restores torch's Adam, and its writer processes.
Everywhere here a trainer is a train_step.Trainer.
"""

import queue
import signal
from pathlib import Path

from megatron.core import dist_checkpointing
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from backends.megatron.layout import Layout
from backends.megatron.lora import sharded_adapters
from common.processes import signal_when_parent_ends


def save_state(trainer, folder: Path) -> None:
    """Write weights, FP32 main weights, Adam state and schedule. Collective over the trainers.

    Of a model with LoRA they are those of the adapters alone. Raises CheckpointException, among
    others, when they cannot be written.
    """
    state = _sharded_state(trainer)
    dist_checkpointing.save(state, str(folder), validate_access_integrity=False)


def load_state(trainer, folder: Path) -> None:
    """Fill a trainer from what save_state wrote. Collective over the trainers.

    Learning rate and schedule, weight decay and Adam's constants stay those of the trainer.
    """
    own_settings = []  # of each parameter group; loading would replace them
    for group in trainer.optimizer.param_groups:
        own = {name: value for name, value in group.items() if name not in ("params", "step")}
        own_settings.append(own)
    state = _sharded_state(trainer, is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    _fill(trainer.gpt, loaded["model"])
    trainer.optimizer.load_state_dict(loaded["optimizer"])
    for group, settings in zip(trainer.optimizer.param_groups, own_settings, strict=True):
        group.update(settings)
    trainer.scheduler.step(loaded["scheduler"]["num_steps"])


def load_weights(gpt: GPTModel, config: dict, layout: Layout, folder: Path) -> None:
    """Fill a model alone from what save_state wrote in any layout. Collective over its ranks.

    config: config.json, checked.
    """
    metadata = {"dp_cp_group": mpu.get_data_parallel_group(with_context_parallel=True)}
    state = {"model": _sharded_model(gpt, config, layout, metadata)}
    loaded = dist_checkpointing.load(state, str(folder), validate_access_integrity=False)
    _fill(gpt, loaded["model"])


def _sharded_model(gpt: GPTModel, config: dict, layout: Layout, metadata: dict) -> dict:
    """Return what of a model is saved: all of it, or LoRA's adapters alone."""
    if hasattr(gpt, "adapters"):
        return sharded_adapters(gpt, config, layout)
    return gpt.sharded_state_dict(metadata=metadata)


def _fill(gpt: GPTModel, loaded: dict) -> None:
    missing, unknown = gpt.load_state_dict(loaded, strict=not hasattr(gpt, "adapters"))
    if wrong := [name for name in [*unknown, *missing] if ".lora_" in name]:
        raise ValueError(f"the checkpoint and this model have other adapters: {', '.join(wrong)}")


def _sharded_state(trainer, *, is_loading: bool = False) -> dict:
    metadata = {
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gather over gloo, to the first data-parallel rank only. Otherwise every GPU would hold the
        # FP32 state of all data-parallel ranks, beside an engine that has its memory back.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "dp_cp_group": trainer.dp_cp_group,
    }
    _give_steps_to_idle_optimizers(trainer.optimizer.chained_optimizers)
    model = _sharded_model(trainer.gpt, trainer.config, trainer.layout, metadata)
    about = dict(is_loading=is_loading, metadata=metadata)
    optimizer = trainer.optimizer.sharded_state_dict(model, **about)
    return {"model": model, "optimizer": optimizer, "scheduler": trainer.scheduler.state_dict()}


def _give_steps_to_idle_optimizers(optimizers: list) -> None:
    """Let an optimizer without parameters say how many steps there were.

    With --ep experts have an optimizer of their own. A pipeline stage of dense layers alone has it
    too, and nothing in it. megatron-core asks torch's Adam of each for its step, which Adam keeps
    with the parameters. It stores what the first rank says.
    """
    adams = [chained.optimizer for chained in optimizers]
    steps = [state["step"] for adam in adams for state in adam.state.values() if "step" in state]
    for adam in adams:
        if steps and not any(group["params"] for group in adam.param_groups):
            adam.state["no parameter"] = {"step": steps[0].clone()}


# --- patches of megatron-core -------------------------------------------------------------------

_stock_set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def _set_states(self, model_param, tensors):
    """Give each parameter a step of its own.

    Apex and Transformer Engine keep Adam's step as a number of the parameter group, and so does
    megatron-core. torch keeps a tensor for each parameter. The loader gives all parameters the same
    tensor, which would then be counted up once for every parameter.
    """
    group, place = self.model_param_group_index_map[model_param]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
    if "step" in state:
        state["step"] = state["step"].clone()
        tensors = {**tensors, "step": state["step"]}
    _stock_set_states(self, model_param, tensors)


DistributedOptimizer._set_main_param_and_optimizer_states = _set_states
# megatron-core keeps what its writers return in a process of its own, for saves that go on in the
# background. That process would outlive a rank that is killed.
filesystem_async._results_queue = queue.Queue()

_stock_write = filesystem_async.FileSystemWriterAsync.write_preloaded_data


def _write(*args, **kwargs) -> None:
    """End the process that megatron-core forks for each file when its rank ends.

    It would wait for ever for a rank that was killed.
    """
    signal_when_parent_ends(signal.SIGKILL)
    _stock_write(*args, **kwargs)


filesystem_async.FileSystemWriterAsync.write_preloaded_data = staticmethod(_write)
