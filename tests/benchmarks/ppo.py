"""Samples per second of PPO against the PPOTrainer of TRL 1.12, the last release that has one.

`python -m tests.benchmarks.ppo --peer-env runs/trl-1.12 --source hh_harmless --prompts 16 --new-tokens 48`

TRL works in an environment of its own, made in `--peer-env` when it is not there, with the versions of
`constraints.txt` for everything but TRL. All arms are loaded at once and take turns iteration by iteration; while one
works the others are stopped. They have the same model, reward model, prompts in the same batches, and settings; full
tuning. Nothing is asserted about time: the ratio of TRL's seconds to ours is what counts. Scores of answers that were
cut off are not read at the same place (ours behind the end of turn, TRL's at the last token), so compare how they rise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.recipe import PpoRecipe
    from reward.conversation import Prompt
    from reward.render import Renderer

ROOT = Path(__file__).parents[2]
TRL = "trl==1.12.0"
TRL_ARM = "trl"
ARMS = {"shared trunk": "shared", "separate critic": "separate"}
"""Ours -> `ppo.value_trunk`."""
PHASES = ("sampling", "scoring", "log-probabilities", "update")


@dataclass
class Worker:
    """A process with an arm in it, stopped unless it is its turn."""

    name: str
    process: subprocess.Popen[str]
    log: Path
    turns: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    def wait_until_loaded(self) -> None:
        self._reply()

    def take_turn(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.turns.append(self._reply())
        return self.turns[-1]

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            shown = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-20:])
            raise SystemExit(f"{self.name} ended early:\n{shown}")
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)


def main() -> None:
    arguments = parse_arguments()
    peer = peer_python(arguments.peer_env)
    with tempfile.TemporaryDirectory() as folder:
        jobs = write_jobs(arguments, Path(folder))
        with started(jobs, peer, Path(folder)) as workers:
            for number in range(arguments.iterations):
                shift = number % len(workers)  # another arm goes first in each round
                for worker in [*workers[shift:], *workers[:shift]]:
                    print(f"iteration {number + 1}, {worker.name}: {worker.take_turn()['seconds']:.1f} s", flush=True)
    result = summary(workers, arguments)
    show(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def peer_python(folder: Path) -> Path:
    """The interpreter of TRL's environment, which is made on first use."""
    python, ready = folder / "bin" / "python", folder / f".{TRL}"
    if ready.exists():
        return python.absolute()
    constraints = folder / "constraints.txt"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    constraints.write_text("".join(line for line in pinned if not line.startswith("trl==")), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "-q", "-c", str(constraints)]
    subprocess.run([*install, "torch"], check=True)  # first: with it present nothing pulls another build
    subprocess.run([*install, TRL], check=True)
    ready.touch()
    return python.absolute()


@contextmanager
def started(jobs: dict[str, Path], peer: Path, folder: Path) -> Generator[list[Worker]]:
    """A loaded and stopped worker per arm; all are ended at the end."""
    workers: list[Worker] = []
    try:
        for name, job in jobs.items():
            log = folder / f"{job.stem}.log"
            python, module = (peer, "ppo_trl") if name == TRL_ARM else (Path(sys.executable), "ppo_ours")
            with log.open("w", encoding="utf-8") as errors:
                process = subprocess.Popen(
                    [str(python), "-m", f"tests.benchmarks.{module}", str(job)],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                )
            workers.append(Worker(name, process, log))
            workers[-1].wait_until_loaded()
        yield workers
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.wait()


def write_jobs(arguments: Any, folder: Path) -> dict[str, Path]:
    """What each arm is told: ours a recipe, TRL the same settings under its names and the same prompts as ids."""
    from alignment.generate import fitting_prompts
    from alignment.policy import load_tokenizer, resolve_model
    from alignment.recipe import Data, PpoRecipe, Source
    from alignment.sources import load_prompts
    from reward.render import Renderer

    model = resolve_model(arguments.model)
    tokenizer = load_tokenizer(model)
    renderer = Renderer(tokenizer)
    loaded = load_prompts(Data(sources=[Source(name=name) for name in arguments.source]), seed=arguments.seed).records
    prompts, _ = fitting_prompts(loaded, renderer, max_length=arguments.max_prompt_tokens)
    needed = arguments.prompts * arguments.iterations
    if len(prompts) < needed:
        raise SystemExit(f"{len(prompts)} prompts fit --max-prompt-tokens, {needed} are needed; name another --source")
    prompts = prompts[:needed]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in prompts), encoding="utf-8")
    reward_model = arguments.reward_model or random_reward_model(model, folder / "reward_model", arguments)
    jobs: dict[str, dict[str, Any]] = {}
    for arm in arguments.arms:
        recipe = recipe_of(arm, arguments, model=model, reward_model=str(reward_model), prompts=path, folder=folder)
        jobs[arm] = {"recipe": recipe}
    checked = [PpoRecipe.model_validate(job["recipe"]) for job in jobs.values()]
    trl = trl_job(arguments, prompts, renderer, recipe=checked[0], model=model, folder=folder)
    jobs[TRL_ARM] = trl | {"reward_model": str(reward_model), "value_model": str(reward_model)}
    return job_files(jobs, folder)


def job_files(jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, Path]:
    files = {name: folder / f"{name.replace(' ', '_')}.json" for name in jobs}
    for name, job in jobs.items():
        files[name].write_text(json.dumps(job), encoding="utf-8")
    return files


def recipe_of(
    arm: str, arguments: Any, *, model: str, reward_model: str, prompts: Path, folder: Path
) -> dict[str, Any]:
    """Our recipe with TRL's objective: no whitened scores, no penalty, its optimizer."""
    return {
        "output_dir": str(folder / arm.replace(" ", "_")),
        "seed": arguments.seed,
        "model": model,
        "model_init": {"dtype": arguments.dtype},
        "value_model": reward_model if ARMS[arm] == "separate" else None,
        "prompts": {"sources": [{"name": "file", "path": str(prompts), "split": "all"}], "shuffle": False},
        "scorer": {
            "type": "reward_model",
            "path": reward_model,
            "dtype": arguments.dtype,
            "batch_size": rollout_batch_size(arguments),
        },
        "sampling": {
            "temperature": arguments.temperature,
            "max_new_tokens": arguments.new_tokens,
            "max_prompt_tokens": arguments.max_prompt_tokens,
            "batch_size": rollout_batch_size(arguments),
        },
        "ppo": {
            "num_iterations": arguments.iterations,
            "batch_size": arguments.prompts,
            "mini_batch_size": arguments.mini_batch_size,
            "per_device_batch_size": arguments.micro_batch_size,
            "num_ppo_epochs": arguments.epochs,
            "learning_rate": arguments.learning_rate,
            "kl_coef": arguments.kl_coef,
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "whiten_scores": "none",
            "missing_eos_penalty": 0.0,
            "value_trunk": ARMS[arm],
            "save_steps": 10**9,
        },
    }


def trl_job(
    arguments: Any, prompts: Sequence[Prompt], renderer: Renderer, *, recipe: PpoRecipe, model: str, folder: Path
) -> dict[str, Any]:
    """TRL's part of the work, without reward and value model; its prompts stand in the order in which `recipe` asks."""
    from alignment.rollout import iteration_positions

    order = [
        position
        for iteration in range(arguments.iterations)
        for position in iteration_positions(len(prompts), recipe, iteration=iteration, name="prompts")
    ]
    return {
        "model": model,
        "pad_token": renderer.tokenizer.pad_token,
        "dtype": arguments.dtype,
        "batch_size": arguments.prompts,
        "mini_batch_size": arguments.mini_batch_size,
        "micro_batch_size": arguments.micro_batch_size,
        "rollout_batch_size": rollout_batch_size(arguments),
        "prompt_ids": [renderer.render_prompt(prompts[position]) for position in order],
        "ppo": trl_settings(arguments, folder / TRL_ARM),
    }


def rollout_batch_size(arguments: Any) -> int:
    return min(arguments.rollout_batch_size, arguments.prompts)


def trl_settings(arguments: Any, output_dir: Path) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "seed": arguments.seed,
        "response_length": arguments.new_tokens,
        "temperature": arguments.temperature,
        "num_ppo_epochs": arguments.epochs,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "kl_coef": arguments.kl_coef,
    }


def random_reward_model(model: str, folder: Path, arguments: Any) -> Path:
    """A score head of random weights on the model's own trunk: as fast as a trained one."""
    import torch

    from alignment.policy import load_model, load_tokenizer
    from alignment.recipe import ModelInit

    tokenizer = load_tokenizer(model)
    torch.manual_seed(arguments.seed)
    module = load_model(
        model,
        init=ModelInit(dtype=arguments.dtype),
        head="sequence_classification",
        pad_token_id=tokenizer.pad_token_id,
    )
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def summary(workers: Sequence[Worker], arguments: Any) -> dict[str, Any]:
    """Over all iterations of each arm; `ratio` is TRL's seconds over the arm's."""
    seconds = {worker.name: sum(turn["seconds"] for turn in worker.turns) for worker in workers}
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "peer_env")}
    return {
        "settings": settings,
        "machine": {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0))},
        "arms": {
            worker.name: {
                "samples_per_second": arguments.prompts * len(worker.turns) / seconds[worker.name],
                "ratio": seconds[TRL_ARM] / seconds[worker.name],
                "phases": {name: _mean([turn["phases"].get(name, 0.0) for turn in worker.turns]) for name in PHASES},
                "peak_bytes": max(turn["peak_bytes"] for turn in worker.turns),
                "gpu_bytes": max(turn["gpu_bytes"] for turn in worker.turns),
                "turns": worker.turns,
            }
            for worker in workers
        },
    }


def show(result: dict[str, Any]) -> None:
    titles = "".join(f"{name:>19}" for name in PHASES)
    print(f"{'arm':<17}{'samples/s':>10}{'x TRL':>7}{titles}{'peak GiB':>10}{'score':>8}{'kl':>8}")
    for name, arm in result["arms"].items():
        phases = "".join(f"{arm['phases'][phase]:>17.1f} s" for phase in PHASES)
        peak = (arm["gpu_bytes"] or arm["peak_bytes"]) / 2**30
        last = arm["turns"][-1]
        print(
            f"{name:<17}{arm['samples_per_second']:>10.3f}{arm['ratio']:>7.2f}{phases}{peak:>10.1f}"
            f"{last['score']:>8.2f}{last['kl']:>8.3f}"
        )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-env", type=Path, required=True, help="folder of TRL's virtual environment")
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--reward-model", help="with the tokenizer of --model (default: --model with a random head)")
    parser.add_argument("--source", nargs="+", default=["starter_safety", "starter_borderline"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=16, help="in an iteration")
    parser.add_argument("--mini-batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4, help="of the update's passes")
    parser.add_argument("--rollout-batch-size", type=int, default=64, help="of sampling and scoring; 64 is TRL's own")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--max-prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
