"""A scorer with a tokenizer of its own: PPO's policy never sees it, so its token ids stay the same to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from alignment.__main__ import main
from alignment.stages import ppo
from tests.one_process import forget_accelerate
from tests.tiny import make_reward_model, make_tiny_model
from tests.tiny_families import make_beaver, make_pair_model

if TYPE_CHECKING:
    from pathlib import Path

    from alignment.rollout import Rollout


def first_batch(
    root: Path, policy: Path, scorer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The tensors of PPO's first iteration, and the scores that its answers got."""
    forget_accelerate()
    recipe = {
        "stage": "ppo",
        "output_dir": str(root / "ppo"),
        "model": str(policy),
        "value_model": str(root.parent / "value"),
        "prompts": {"max_length": 512, "sources": [{"name": "starter_safety", "max_rows": 8}]},
        "scorer": scorer,
        "sampling": {"max_new_tokens": 8, "batch_size": 2},
        "ppo": {"num_iterations": 1, "batch_size": 8, "mini_batch_size": 8, "per_device_batch_size": 4},
    }
    root.mkdir()
    (root / "ppo.yaml").write_text(yaml.safe_dump(recipe))
    seen: list[tuple[dict[str, torch.Tensor], list[float]]] = []
    whiten = ppo.whiten_scores

    def record(run: Any, scores: Any, rollout: Rollout, loop: Any) -> Any:
        batch = rollout.rows(range(8), pad_token_id=run.pad_token_id, padding_free=True, device="cpu")
        tensors = {
            "input_ids": batch.inputs["input_ids"],
            "position_ids": batch.inputs["position_ids"],
            "logprobs": rollout.logprobs,
            "ref_logprobs": rollout.ref_logprobs,
            "values": rollout.values,
        }
        seen.append((tensors, [score.value for score in scores]))
        return whiten(run, scores, rollout, loop)

    monkeypatch.setattr(ppo, "whiten_scores", record)
    assert main(["--config", str(root / "ppo.yaml")]) == 0
    monkeypatch.undo()
    (found,) = seen
    return found


def test_the_policy_batch_is_the_same_to_the_bit_with_and_without_a_foreign_scorer(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reward_model(tiny_model, tmp_path / "value")
    other = make_tiny_model(tmp_path / "other", vocab=300, seed=9)
    harmfulness = make_pair_model(tmp_path / "harmfulness", kind="bert")
    scorers = {
        "none": {"type": "python", "function": "tests.scorers:shorter_is_better"},
        "own": {"type": "reward_model", "path": str(tmp_path / "value")},
        "beaver": {"type": "reward_model", "path": str(make_beaver(other, tmp_path / "beaver"))},
        "pair": {"type": "reward_model", "path": str(make_pair_model(tmp_path / "pair")), "max_length": 256},
        "harmfulness": {"type": "absolute_harmfulness", "model": str(harmfulness)},
    }
    batches = {
        name: first_batch(tmp_path / f"run-{name}", tiny_model, scorer, monkeypatch) for name, scorer in scorers.items()
    }
    tensors, plain = batches["none"]
    assert tensors["input_ids"].unique().numel() > 20
    for name in ("own", "beaver", "pair", "harmfulness"):
        found, scores = batches[name]
        assert None not in scores
        assert scores != plain
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor), (name, key)
