"""What PPO learns against the PPOTrainer of TRL 1.12: the score at equal divergence from the start.

`python -m tests.benchmarks.ppo_learning --peer-env runs/trl-1.12`

The tiny model of the tests, and a score that both sides read alike: how often an answer says `6`. TRL's worker checks
at its start that its reward model gives drawn answers what our scorer gives their texts. Policy, separate critic,
prompts and their order, batches, optimizer, clipping and coefficients are the same; scores are not whitened, a missing
end costs nothing, and gradients are not clipped (TRL's loop does not do so). Values start at zero on the policy's trunk
everywhere. Nothing is asserted about the outcome.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.ppo import ARMS, TRL_ARM, job_files, peer_python, recipe_of, started, trl_job
from tests.benchmarks.ppo_token_count import COUNTED
from tests.tiny import SENTENCES, make_tiny_model

WINDOW = 5
"""Iterations that a curve is smoothed over, and that count as the end of a run."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the largest divergence that all arms of a seed reach: where their scores are compared."""
NEARLY = 0.9
NO_CLIPPING = 1e9


def main() -> None:
    arguments = parse_arguments()
    peer = peer_python(arguments.peer_env)
    curves: dict[int, dict[str, list[dict[str, float]]]] = {}
    for seed in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            curves[seed] = learn(argparse.Namespace(**vars(arguments), seed=seed), peer, Path(folder))
    result = summary(curves, best=arguments.new_tokens)
    show(result)
    if arguments.json is not None:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "peer_env")}
        whole = {"settings": settings, "curves": curves, **result}
        arguments.json.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def learn(arguments: Any, peer: Path, folder: Path) -> dict[str, list[dict[str, float]]]:
    """Score and KL to the start, in nats an answer, of every iteration and arm."""
    with started(write_jobs(arguments, folder), peer, folder) as workers:
        for worker in workers:
            for _ in range(arguments.iterations):
                worker.take_turn()
            last = worker.turns[-1]
            print(f"seed {arguments.seed}, {worker.name}: score {last['score']:.2f}, KL {last['kl']:.2f}", flush=True)
    return {
        worker.name: [{name: float(turn[name]) for name in ("score", "kl")} for turn in worker.turns]
        for worker in workers
    }


def write_jobs(arguments: Any, folder: Path) -> dict[str, Path]:
    """What each arm of a seed is told."""
    from alignment.policy import load_tokenizer
    from alignment.recipe import PpoRecipe
    from reward.conversation import Prompt
    from reward.render import Renderer

    model = make_tiny_model(folder / "model", seed=arguments.seed)
    value_model = zero_value_model(model, folder / "value_model")
    prompts = [Prompt.of(text) for text in SENTENCES if text.endswith("?")]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt.to_json()) + "\n" for prompt in prompts), encoding="utf-8")
    jobs: dict[str, dict[str, Any]] = {}
    for arm in ARMS:
        given = recipe_of(arm, arguments, model=str(model), reward_model=str(value_model), prompts=path, folder=folder)
        scorer = {"type": "python", "function": "tests.scorers:count_sixes"}
        jobs[arm] = {"recipe": given | {"scorer": scorer, "ppo": given["ppo"] | {"max_grad_norm": NO_CLIPPING}}}
    checked = [PpoRecipe.model_validate(job["recipe"]) for job in jobs.values()]
    renderer = Renderer(load_tokenizer(str(model)))
    (counted,) = renderer.tokenizer.encode(COUNTED, add_special_tokens=False)
    trl = trl_job(arguments, prompts, renderer, recipe=checked[0], model=str(model), folder=folder)
    jobs[TRL_ARM] = trl | {"value_model": str(value_model), "counted_token": counted}
    return job_files(jobs, folder)


def zero_value_model(policy: Path, folder: Path) -> Path:
    """A sequence classifier on the trunk of `policy` that gives 0, as our critics start without a reward model."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1)
    torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(folder)
    return folder


def summary(curves: dict[int, dict[str, list[dict[str, float]]]], *, best: float) -> dict[str, Any]:
    """The outcome of each seed and arm, and how far our arms' scores at equal KL are above TRL's."""
    seeds: dict[int, dict[str, Any]] = {}
    for seed, arms in curves.items():
        reached = min(smoothed([row["kl"] for row in rows])[-1] for rows in arms.values())
        kls = [share * reached for share in SHARES]
        seeds[seed] = {"kl": kls, "arms": {arm: outcome(rows, kls, best=best) for arm, rows in arms.items()}}
    above = {
        arm: [
            [
                seed["arms"][arm]["at_equal_kl"][place] - seed["arms"][TRL_ARM]["at_equal_kl"][place]
                for seed in seeds.values()
            ]
            for place in range(len(SHARES))
        ]
        for arm in ARMS
    }
    return {"seeds": seeds, "above_trl": above}


def outcome(rows: Sequence[dict[str, float]], kls: Sequence[float], *, best: float) -> dict[str, Any]:
    """End of a smoothed curve, its scores at `kls`, and iterations until a score is nearly the `best` (None: never)."""
    score, kl = (smoothed([row[name] for row in rows]) for name in ("score", "kl"))
    return {
        "iterations": next((n for n, row in enumerate(rows, 1) if row["score"] >= NEARLY * best), None),
        "score": score[-1],
        "kl": kl[-1],
        "at_equal_kl": [score_at(at, kl, score) for at in kls],
    }


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of the last WINDOW values at each place, of fewer at the start."""
    return [statistics.fmean(values[max(0, end - WINDOW) : end]) for end in range(1, len(values) + 1)]


def score_at(kl: float, kls: Sequence[float], scores: Sequence[float]) -> float:
    """The score where a curve first comes to `kl`, on the line between the iterations before and after."""
    after = next(place for place, value in enumerate(kls) if value >= kl)
    if after == 0:
        return scores[0]
    before = after - 1
    part = (kl - kls[before]) / (kls[after] - kls[before])
    return scores[before] + part * (scores[after] - scores[before])


def show(result: dict[str, Any]) -> None:
    places = " | ".join(f"at {share:.0%}" for share in SHARES)
    print(f"| seed | arm | iterations to {NEARLY:.0%} | final score | final KL | equal KL | {places} |")
    print("|" + "---|" * (6 + len(SHARES)))
    for seed, row in result["seeds"].items():
        for arm, end in row["arms"].items():
            scores = " | ".join(f"{score:.2f}" for score in end["at_equal_kl"])
            ends = f"{end['iterations']} | {end['score']:.2f} | {end['kl']:.2f} | {row['kl'][-1]:.2f}"
            print(f"| {seed} | {arm} | {ends} | {scores} |")
    print(f"\n| over TRL: mean (of each seed) | {places} |")
    print("|" + "---|" * (1 + len(SHARES)))
    for arm, differences in result["above_trl"].items():
        cells = [f"{statistics.fmean(each):+.2f} ({', '.join(f'{one:+.2f}' for one in each)})" for each in differences]
        print(f"| {arm} | {' | '.join(cells)} |")


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-env", type=Path, required=True, help="folder of TRL's virtual environment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of models and draws")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=64, help="in an iteration")
    parser.add_argument("--mini-batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--rollout-batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--max-prompt-tokens", type=int, default=192)
    parser.add_argument("--new-tokens", type=int, default=6)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="file for all figures")
    return parser.parse_args()


if __name__ == "__main__":
    main()
