"""Launches of PPO on the tiny model, two processes on the CPU: how many end with exit code 0, by layout.

`python -m tests.benchmarks.launches --count 20 [--layouts zero2 zero3]`

An iteration of full tuning each. When a launch ends with another code, or not in time (-1), its last words are printed.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.interrupted import make_parents, ppo_words
from tests.tiny import make_tiny_model

SMALL = ("--value_model", "null", "--ppo.value_trunk", "shared", "--ppo.num_iterations", "1")
SHARDED = ("--ppo.reference", "sharded", "--scorer.safety.sharded", "true", "--scorer.helpfulness.sharded", "true")
LAYOUTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # name: (words of the launcher, overrides of the recipe)
    "ddp": (("--config_file", "launch/cpu_ddp.yaml"), ()),
    "zero0": (("--config_file", "launch/cpu_zero2.yaml", "--zero_stage", "0"), ()),
    "zero1": (("--config_file", "launch/cpu_zero2.yaml", "--zero_stage", "1"), ()),
    "zero2": (("--config_file", "launch/cpu_zero2.yaml"), ()),
    "zero3": (("--config_file", "launch/cpu_zero3.yaml"), ()),
    "zero3, frozen models sharded": (("--config_file", "launch/cpu_zero3.yaml"), SHARDED),
}


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parents = make_parents(folder / "parents", make_tiny_model(folder / "tiny"))
        print(f"{'layout':<30} {'launches':>8} {'exit 0':>7} {'others':>12} {'median s':>9}")
        for layout in arguments.layouts:
            codes: Counter[int] = Counter()
            seconds: list[float] = []
            for number in range(arguments.count):
                started = time.perf_counter()
                codes[launch(layout, parents, folder / f"{layout} {number}", timeout=arguments.timeout)] += 1
                seconds.append(time.perf_counter() - started)
            others = " ".join(f"{code}:{times}" for code, times in sorted(codes.items()) if code != 0) or "-"
            median = statistics.median(seconds)
            print(f"{layout:<30} {arguments.count:>8} {codes[0]:>7} {others:>12} {median:>9.1f}", flush=True)


def launch(layout: str, parents: Path, output: Path, *, timeout: float) -> int:
    """The exit code of one launch; -1 when it has not ended in time."""
    words, overrides = LAYOUTS[layout]
    command = [sys.executable, "-m", "alignment.launch", *words, "-m", "alignment"]
    command += ppo_words(parents, output, *SMALL, *overrides)
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            _, said = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the processes that it started, too
            _, said = process.communicate()
            code = -1
    if code != 0:
        print(f"{output.name}: {code}\n{said[-2000:]}", flush=True)
    return code


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="launches of each layout")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a launch may take")
    return parser.parse_args()


if __name__ == "__main__":
    main()
