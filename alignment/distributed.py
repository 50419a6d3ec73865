"""What the launcher started: processes, DeepSpeed, and a clean end. The only module that knows DeepSpeed."""

from __future__ import annotations

import contextlib
import copy
import os
import weakref
from collections.abc import Generator, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator

T = TypeVar("T")

PATIENCE = timedelta(hours=6)
"""How long processes wait for one another: while the main one scores or saves, the others are not stuck."""
_ENGINE_TAG = "engine"
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def world_size() -> int:
    """Processes of this run, as the launcher says (1 without a launcher)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether a launcher has said how many processes there are."""
    return "WORLD_SIZE" in os.environ


def process_index() -> int:
    return int(os.environ.get("RANK", "0"))


def is_main_process() -> bool:
    return process_index() == 0


def on_cpu() -> bool:
    import torch

    return not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true"}


def device() -> str:
    """The accelerator of this process."""
    return "cpu" if on_cpu() else f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def ddp_backend() -> str | None:
    """gloo on the CPU. accelerate leaves it open under DeepSpeed there, and every rank then believes it is alone."""
    return "gloo" if on_cpu() and world_size() > 1 else None


def uses_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() in {"1", "true"}


def launched_under_zero3() -> bool:
    """Whether the launch file asks for ZeRO-3, by its own keys or by DeepSpeed's file; known before anything loads."""
    if not uses_deepspeed():
        return False
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file == "none":
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    from accelerate.utils import HfDeepSpeedConfig

    return HfDeepSpeedConfig(file).is_zero3()


def prepare_deepspeed_ops() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective at run time; gloo carries everything on the CPU."""
    if uses_deepspeed() and on_cpu():
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_accelerator(*, gradient_accumulation_steps: int = 1) -> Accelerator:
    """An Accelerator whose world has the size that the launcher promised (checked)."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    prepare_deepspeed_ops()
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend=ddp_backend() or "nccl", timeout=PATIENCE)],
        cpu=on_cpu() and not uses_deepspeed(),
        gradient_accumulation_steps=gradient_accumulation_steps,
    )
    check_world_size(accelerator.num_processes)
    return accelerator


def check_world_size(num_processes: int) -> None:
    if num_processes != world_size():
        raise RuntimeError(
            f"the launcher started {world_size()} processes but the process group has {num_processes}; "
            "gradients would not be shared; check the accelerate config and the backend"
        )


def layout() -> dict[str, int]:
    """How the work is spread, as accelerate set it up: processes and ZeRO stage (0 without DeepSpeed)."""
    from accelerate.state import AcceleratorState, is_initialized
    from accelerate.utils import DistributedType

    stage = 0
    if is_initialized():
        state = AcceleratorState()
        if state.distributed_type == DistributedType.DEEPSPEED:
            assert state.deepspeed_plugin is not None
            stage = int(state.deepspeed_plugin.zero_stage)
    return {"num_processes": world_size(), "zero_stage": stage}


@contextlib.contextmanager
def whole_weights() -> Generator[None]:
    """Models loaded inside are whole on every process that loads them, also under ZeRO-3."""
    with _loading_under(None):
        yield


@contextlib.contextmanager
def sharded_weights(dtype: torch.dtype) -> Generator[None]:
    """Models loaded inside, by all processes together, are shared out among them: for `frozen_engine`."""
    if layout()["zero_stage"] != 3:
        raise RuntimeError("ZeRO-3 alone shares weights out; launch with launch/zero3.yaml or the like")
    from accelerate.utils import HfDeepSpeedConfig

    with _loading_under(HfDeepSpeedConfig(_frozen_config(dtype))):
        yield


@contextlib.contextmanager
def _loading_under(config: Any) -> Generator[None]:
    """Inside, transformers takes `config` for DeepSpeed's settings (None: it loads as without DeepSpeed)."""
    from transformers.integrations import deepspeed as integration

    before = integration._hf_deepspeed_config_weak_ref  # pyright: ignore[reportPrivateUsage]
    reference: Any = None if config is None else weakref.ref(config)
    integration._hf_deepspeed_config_weak_ref = reference  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = before  # pyright: ignore[reportPrivateUsage]


def frozen_engine(model: Any) -> Any:
    """A ZeRO-3 engine without optimizer around a model from `sharded_weights` that is only read.

    Each process holds a part of the weights, and a layer at a time is whole: all of them call it equally often.
    """
    import deepspeed

    config = _frozen_config(next(model.parameters()).dtype)
    # Norms and biases stay whole, as in transformers' own engines: they are small and would be slow to fetch.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 10 * model.config.get_text_config().hidden_size
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    _frozen_engines.append(engine)
    return engine


_frozen_engines: list[Any] = []
"""What `close` has to destroy, beside the engine that trains."""


def _frozen_config(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings of a model that is only read; where the launch keeps weights in host memory, so do these."""
    import torch
    from accelerate.state import AcceleratorState

    zero: dict[str, Any] = {"stage": 3}
    plugin = AcceleratorState().deepspeed_plugin
    offload = None if plugin is None else plugin.deepspeed_config["zero_optimization"].get("offload_param")
    if offload is not None:
        zero["offload_param"] = offload
    return {
        "train_micro_batch_size_per_gpu": 1,  # asked for by DeepSpeed; without an optimizer it means nothing
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }


@contextlib.contextmanager
def gathered(parameters: Iterable[Any], *, read_only: bool = False) -> Generator[None]:
    """Parameters that ZeRO-3 shares out are whole inside, and changes made by the main process are kept.

    `read_only`: there are none, so that none need be sent to the others.
    """
    shared = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not shared:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(shared, modifier_rank=None if read_only else 0):
        yield


def share(n: int, *, process: int, processes: int) -> list[int]:
    """This process's positions of n: every one is somebody's, and all have as many, if need be the last one twice."""
    own = list(range(process, n, processes))
    return own if len(own) == -(-n // processes) else [*own, n - 1]


def from_all(value: T) -> list[T]:
    """The value of every process, by rank; all of them call it together."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def most_of_all(number: int) -> int:
    """The largest number that a process has; all of them call it together."""
    return max(from_all(number))


def save_engine(engine: Any, folder: Path, *, only_trained: bool) -> None:
    """DeepSpeed's own files of a training state; `only_trained` leaves frozen weights out."""
    engine.save_checkpoint(str(folder), tag=_ENGINE_TAG, exclude_frozen_parameters=only_trained)


def load_engine(engine: Any, folder: Path, *, only_trained: bool, universal: bool = False) -> None:
    """Go back to what `save_engine` wrote, or `convert_engine`, which is universal.

    A pickle that holds more than tensors and DeepSpeed's own records is refused.
    """
    engine._config.load_universal_checkpoint = universal  # read when it loads, and a recipe cannot know
    settings = [{key: group[key] for key in group.keys() - {"params"}} for group in engine.optimizer.param_groups]
    with _weights_only():
        path, _ = engine.load_checkpoint(str(folder), tag=_ENGINE_TAG, load_module_strict=not only_trained)
    if path is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")
    if universal:
        # ZeRO-3 gives all groups the settings of the first, and all parameters one and the same counter of steps.
        for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
            group.update(own)
        for state in engine.basic_optimizer.state.values():
            state |= {"step": copy.deepcopy(state["step"])} if "step" in state else {}


def convert_engine(folder: Path, target: Path) -> None:
    """DeepSpeed's universal form of what `save_engine` wrote: any number of processes and any ZeRO stage reads it."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 4, "num_merge_workers": 2, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": str(folder / _ENGINE_TAG), "output_folder": str(target / _ENGINE_TAG)}
    with _weights_only():
        ds_to_universal.main(Namespace(**folders, **options, inject_missing_state=True))


@contextlib.contextmanager
def _weights_only() -> Generator[None]:
    """torch.load as if every call said `weights_only=True`; DeepSpeed's say False."""
    import torch
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        os.environ.pop(_FORCE) if before is None else os.environ.__setitem__(_FORCE, before)


def barrier() -> None:
    """Wait for all processes; nothing to do for one."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def close(accelerator: Any, engine: Any = None) -> None:
    """End a run so that no rank aborts at exit: wait, destroy the engines, then the process group."""
    accelerator.wait_for_everyone()
    while _frozen_engines:
        _frozen_engines.pop().destroy()
    if hasattr(engine, "destroy"):
        engine.destroy()
    elif hasattr(engine, "reducer"):
        # DDP's part of the process group: left to the garbage collector, it waits for threads of gloo under Python's
        # lock, which these may wait for.
        engine.reducer = engine.logger = engine.process_group = None
    accelerator.end_training()
