"""PPO on the tiny model in processes that say where they are and can be killed there.

They are forked from a server that has imported everything, so that one costs a second and not ten.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.conftest import ROOT
from tests.tiny import make_reward_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from multiprocessing.connection import Connection
    from pathlib import Path


def deepspeed_environment(stage: str) -> dict[str, str]:
    environment = {"USE_CPU": "false", "USE_DEEPSPEED": "true", "MIXED_PRECISION": "no", "DEEPSPEED_ZERO_STAGE": stage}
    return {"CUDA_VISIBLE_DEVICES": "-1"} | {f"ACCELERATE_{name}": value for name, value in environment.items()}


PHASES = ("rollout", "score", "update", "save")
PATIENCE = 120
LAYOUTS: dict[str, dict[str, str]] = {
    "ddp": {},
    "zero1": deepspeed_environment("1"),
    "zero2": deepspeed_environment("2"),
    "zero3": deepspeed_environment("3")
    | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "true", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"},
}
"""What `accelerate launch` sets for launch/cpu_ddp.yaml and the like."""
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "alignment.stages.ppo",
        "trl.models.utils",
        "transformers.models.llama",
        "deepspeed.runtime.zero.muon.muon_optimizer",
    ]
)


def make_parents(folder: Path, tiny_model: Path) -> Path:
    """What tests/tiny_pipeline/ppo.yaml starts from, without training."""
    shutil.copytree(tiny_model, folder / "rejection_sampling_sft")
    for seed, name in enumerate(("safety_reward_model", "helpfulness_reward_model")):
        make_reward_model(tiny_model, folder / name, seed=seed)
    return folder


def ppo_words(parents: Path, output: Path, *overrides: str) -> list[str]:
    words = ["--config", str(ROOT / "tests" / "tiny_pipeline" / "ppo.yaml")]
    return [*words, "--run_dir", str(parents), "--output_dir", str(output), *overrides]


def history(folder: Path) -> list[dict[str, float]]:
    """The metrics of a run without its times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


@dataclass
class Stage:
    """A running stage, one process."""

    process: Any
    reports: Connection
    phases: list[str] = field(default_factory=list)
    """Those that were begun and read so far; all of them after `end`."""

    def wait_for(self, phase: str, *, times: int = 1) -> None:
        """Until it has begun a phase for the n-th time; EOFError when it ends before."""
        while self.phases.count(phase) < times:
            if not self.reports.poll(PATIENCE):
                raise TimeoutError(f"the stage did not come to {phase}")
            self.phases.append(self.reports.recv())

    def end(self) -> int:
        """Its exit code; below 0 the signal that ended it."""
        self.process.join(PATIENCE)
        with contextlib.suppress(EOFError):
            while self.reports.poll():
                self.phases.append(self.reports.recv())
        return self.process.exitcode


def start(words: Sequence[str], **environment: str) -> Stage:
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_run, args=(list(words), environment, sender))
    process.start()
    sender.close()
    return Stage(process, receiver)


def start_ranks(words: Sequence[str], count: int, **environment: str) -> list[Stage]:
    """So many ranks on the CPU, as a launcher starts them."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    size = str(count)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [start(words, RANK=str(rank), LOCAL_RANK=str(rank), **shared, **environment) for rank in range(count)]


def end_all(stages: Sequence[Stage]) -> list[int]:
    return [stage.end() for stage in stages]


def _run(words: list[str], environment: Mapping[str, str], reports: Connection) -> None:
    os.environ.update({"ACCELERATE_USE_CPU": "true", **environment})
    os.chdir(ROOT)
    from alignment import ppo_state
    from alignment.__main__ import main
    from alignment.stages import ppo

    def announced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            reports.send(name)
            return function(*args, **kwargs)

        return call

    ppo.collect_rollout = announced("rollout", ppo.collect_rollout)
    ppo.score_all = announced("score", ppo.score_all)
    ppo.update = announced("update", ppo.update)
    ppo_state.write_checkpoint = announced("save", ppo_state.write_checkpoint)
    sys.exit(main(words))
