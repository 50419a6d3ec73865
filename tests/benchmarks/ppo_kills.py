"""kill -9 of PPO at random instants, then the same command again: are the bits those of an uninterrupted run?

    python -m tests.benchmarks.ppo_kills --kills 20 --layout alone

The tiny model of the tests on the CPU in float32. Kills go through rollout, scoring, update and save in turn, each at a
random instant of a random one of them. By hand: it takes minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import tempfile
import time
from pathlib import Path

from alignment.artifact import sha256
from tests.interrupted import LAYOUTS, PHASES, Stage, end_all, history, make_parents, ppo_words, start_ranks
from tests.tiny import make_tiny_model

ITERATIONS = 4
WEIGHTS = "model.safetensors"


def phase_seconds(stage: Stage) -> dict[str, float]:
    """How long each phase of an uninterrupted run takes, at most."""
    longest = dict.fromkeys(PHASES, 0.0)
    last, began = "", 0.0
    with contextlib.suppress(EOFError):
        while stage.reports.poll(600):
            phase, now = stage.reports.recv(), time.monotonic()
            longest[last] = max(longest.get(last, 0.0), now - began if last else 0.0)
            last, began = phase, now
    return longest


def kill(stages: list[Stage], phase: str, *, times: int, delay: float) -> bool:
    """Kill all ranks so long after the n-th beginning of a phase; False when one had ended before."""
    stages[-1].wait_for(phase, times=times)
    time.sleep(delay)
    for stage in stages:
        stage.process.kill()
    return 0 not in end_all(stages)


def main() -> None:
    options = parse_arguments()
    random.seed(options.seed)
    processes, environment = (1, {}) if options.layout == "alone" else (2, LAYOUTS[options.layout])
    with tempfile.TemporaryDirectory() as folder:
        parents, whole, output = (Path(folder) / name for name in ("parents", "whole", "ppo"))
        parents.mkdir()
        make_parents(parents, make_tiny_model(Path(folder) / "model"))

        def start(target: Path) -> list[Stage]:
            words = ppo_words(parents, target, "--ppo.num_iterations", str(ITERATIONS))
            return start_ranks(words, processes, **environment)

        stages = start(whole)
        seconds = phase_seconds(stages[0])
        if any(end_all(stages)):
            raise SystemExit("the uninterrupted run failed")
        same = done = 0
        while done < options.kills:
            phase = PHASES[done % len(PHASES)]
            times, delay = random.randint(1, ITERATIONS - (phase == "save")), random.uniform(0, seconds[phase])
            if not kill(start(output), phase, times=times, delay=delay) or (output / "manifest.json").exists():
                shutil.rmtree(output)  # the run was over
                continue
            again = start(output)
            equal = not any(end_all(again)) and sha256(output / WEIGHTS) == sha256(whole / WEIGHTS)
            equal = equal and history(output) == history(whole)
            went_on = ITERATIONS - again[0].phases.count("rollout")
            done, same = done + 1, same + equal
            where = f"{delay:.2f} s into {phase} {times}, went on from iteration {went_on}"
            print(f"{done:2}: killed {where}: {'same bits' if equal else 'NOT THE SAME'}", flush=True)
            shutil.rmtree(output)
    print(f"{same} of {options.kills}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--layout", choices=["alone", *LAYOUTS], default="alone", help="two processes but for alone")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
