"""TRL's side of the PPO benchmarks, in the environment of its last release with a PPOTrainer.

Started by `tests.benchmarks.ppo` and `tests.benchmarks.ppo_learning`. TRL trains as it comes, but for two things
without which the work would not be the same: its prompts keep their order, and its optimizer steps once a mini-batch
(by itself it accumulates over the whole rollout, whatever `num_mini_batches` says).
"""

from __future__ import annotations

import os
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
)

from tests.benchmarks.ppo_token_count import TokenCount, check_same_scores
from tests.benchmarks.ppo_turns import Turns, read_job

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"


class OneAtATime(TrainerCallback):
    """An iteration of TRL ends in `on_step_end`; the next one begins right behind it."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.figures: dict[str, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.begin()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        names = {"score": "objective/scores", "kl": "objective/kl"}
        self.figures = {ours: float((logs or {})[theirs]) for ours, theirs in names.items()}

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.turns.end(**self.figures)
        self.turns.begin()


def load_reward_model(job: dict[str, Any], tokenizer: Any, dtype: torch.dtype) -> Any:
    """The job's `reward_model`, or a module that counts its `counted_token`, once it is known to do so."""
    if "counted_token" not in job:
        return AutoModelForSequenceClassification.from_pretrained(job["reward_model"], dtype=dtype)
    reward_model = TokenCount(job["counted_token"])
    check_same_scores(reward_model, tokenizer, job["prompt_ids"], length=job["ppo"]["response_length"])
    return reward_model


def main() -> None:
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # pyright: ignore[reportMissingImports]

    job, turns = read_job(), Turns()
    dtype = getattr(torch, job["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left", pad_token=job["pad_token"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype) for _ in range(2))
    value_model = AutoModelForSequenceClassification.from_pretrained(job["value_model"], dtype=dtype)
    reward_model = load_reward_model(job, tokenizer, dtype)
    config = PPOConfig(
        per_device_train_batch_size=job["micro_batch_size"],
        gradient_accumulation_steps=job["batch_size"] // job["micro_batch_size"],
        num_mini_batches=job["batch_size"] // job["mini_batch_size"],
        local_rollout_forward_batch_size=job["rollout_batch_size"],
        total_episodes=len(job["prompt_ids"]),
        stop_token="eos",
        num_sample_generations=0,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **job["ppo"],
    )
    data = Dataset.from_list([{"input_ids": ids} for ids in job["prompt_ids"]])
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=data,
        eval_dataset=data.select(range(1)),
        callbacks=[OneAtATime(turns)],
    )
    collate = DataCollatorWithPadding(tokenizer)
    in_order = torch.utils.data.DataLoader(data, batch_size=job["batch_size"], collate_fn=collate)  # pyright: ignore
    trainer.dataloader = trainer.accelerator.prepare(in_order)
    trainer.accelerator.gradient_accumulation_steps = job["mini_batch_size"] // job["micro_batch_size"]

    def phase_of_reward(model: Any, *_: Any) -> str:
        return "scoring" if model is trainer.reward_model else "log-probabilities"

    def phase_of_forward(model: Any, *_: Any) -> str:
        return "log-probabilities" if model is trainer.ref_model else "update"

    turns.timed(ppo_trainer, "batch_generation", "sampling")
    turns.timed(ppo_trainer, "get_reward", phase_of_reward)
    turns.timed(ppo_trainer, "forward", phase_of_forward)
    trainer.train()


if __name__ == "__main__":
    main()
