"""Our side of the PPO benchmarks: the stage as it is, one iteration at a time. See `tests.benchmarks.ppo`."""

from __future__ import annotations

import importlib
from typing import Any

from alignment import rollout
from alignment.recipe import PpoRecipe
from alignment.stages import ppo, run_stage
from reward.model import RewardModel
from tests.benchmarks.ppo_turns import Turns, read_job


def main() -> None:
    job, turns = read_job(), Turns()
    importlib.import_module("trl.models.utils")  # the rollout does so late; the first iteration is not to pay for it
    turns.timed(rollout, "sample_answers", "sampling")
    turns.timed(rollout, "evaluate_tokens", "log-probabilities")
    turns.timed(RewardModel, "score", "scoring")
    run_iteration = ppo.run_iteration

    def one_turn(*args: Any) -> Any:
        turns.begin()
        loop = run_iteration(*args)
        names = {"score": "score_mean", "kl": "kl", "completion_tokens": "completion_tokens"}
        turns.end(**{ours: loop.metrics[theirs] for ours, theirs in names.items()})
        return loop

    ppo.run_iteration = one_turn
    run_stage(PpoRecipe.model_validate(job["recipe"]))


if __name__ == "__main__":
    main()
