"""The stage `harmfulness_model`: it learns grades, survives an interruption, and leaves what its scorer reads."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from alignment.__main__ import main
from alignment.artifact import read_artifact, sha256
from alignment.cli import main as sara
from reward.checkpoint import check_checkpoint
from reward.conversation import Prompt, write_json_lines
from reward.families import Loading
from reward.harmfulness import AbsoluteHarmfulness
from reward.losses import grade_loss
from reward.scorer import ScorerError
from tests.one_process import forget_accelerate
from tests.tiny_families import make_pair_model

if TYPE_CHECKING:
    from pathlib import Path

TRAINING = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 8.0,
    "logging_steps": 1,
}
LOADING = Loading(dtype="float32")


def graded_rows(start: int, stop: int) -> list[dict[str, Any]]:
    """Grade 4 where the answer says `ferns`, else 0; all else varies."""
    return [
        {
            "prompt": f"Question {number}?",
            "completion": f"Answer {number} is {'ferns' if number % 2 else 'candle'}.",
            "grade": 4 if number % 2 else 0,
        }
        for number in range(start, stop)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graded")
    write_json_lines(folder / "train.jsonl", graded_rows(0, 48))
    write_json_lines(folder / "test.jsonl", graded_rows(48, 72))
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trunk alone, as encoders come from the hub: neither pooler nor classifier."""
    from transformers import AutoModel

    folder = make_pair_model(tmp_path_factory.mktemp("encoder") / "deberta-v2")
    AutoModel.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tiny_model: Path, encoder: Path) -> dict[str, Path]:
    """Language models without a head and without dropout, which would need longer training."""
    folder = encoder.with_name("no_dropout")
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout"), 0.0)
    (folder / "config.json").write_text(json.dumps(config | off))
    return {"encoder": folder, "decoder": tiny_model}


def write_recipe(folder: Path, model: Path, files: Path, **changes: Any) -> Path:
    sources = {
        part: {"max_length": 128, "sources": [{"name": "file", "path": str(files), "split": split}]}
        for part, split in (("data", "train"), ("eval_data", "test"))
    }
    recipe = {"stage": "harmfulness_model", "output_dir": str(folder / "model"), "model": str(model), **sources}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"training": TRAINING} | changes), encoding="utf-8")
    return path


def run(recipe: Path) -> Path:
    """The stage in this process; its folder."""
    forget_accelerate()
    assert main(["--config", str(recipe)]) == 0
    return recipe.parent / "model"


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["harmfulness_model/loss"] for row in rows if "harmfulness_model/loss" in row]


def test_the_loss_is_the_mean_square_of_the_errors() -> None:
    loss = grade_loss(torch.tensor([0.5, 3.0, -1.0]), torch.tensor([0.0, 4.0, 2.0]))
    assert loss.item() == pytest.approx((0.25 + 1.0 + 9.0) / 3)
    with pytest.raises(ValueError, match="must have one shape"):
        grade_loss(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize(
    ("base", "changes"),
    [
        ("encoder", {}),
        ("decoder", {"training": TRAINING | {"learning_rate": 3e-3}}),
        ("encoder", {"lora": {"r": 8, "alpha": 16}, "training": TRAINING | {"learning_rate": 5e-3}}),
    ],
    ids=["encoder", "decoder", "encoder with adapters"],
)
def test_a_word_that_tells_the_grade_is_learned(
    bases: dict[str, Path], data: Path, tmp_path: Path, base: str, changes: dict[str, Any]
) -> None:
    """Saying the mean for all costs 4. Held-out rows are graded by what was saved, so that is what was trained."""
    folder = run(write_recipe(tmp_path, bases[base], data, **changes))
    found = losses(folder)
    assert len(found) == 48
    assert min(found[:3]) > 2
    assert max(found[-6:]) < 0.5
    artifact = read_artifact(folder, kind="harmfulness_model")
    held_out = artifact.metrics["held_out"]
    assert held_out["constant_mse"] == 4.0
    assert held_out["mse"]["value"] < 0.5
    assert (held_out["mse"]["n"], held_out["cut"], artifact.data["num_rows"]) == (24, 0, 48)


def test_accumulated_batches_make_the_step_of_one_batch(bases: dict[str, Path], tmp_path: Path) -> None:
    write_json_lines(tmp_path / "rows.jsonl", graded_rows(0, 8))
    source = {"sources": [{"name": "file", "path": str(tmp_path / "rows.jsonl"), "split": "all"}]}
    found: list[dict[str, float]] = []
    for size, times in ((8, 1), (2, 4)):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": times, "max_steps": 1}
        folder = tmp_path / f"{size}x{times}"
        folder.mkdir()
        recipe = write_recipe(
            folder, bases["encoder"], tmp_path, data=source, eval_data=None, training=TRAINING | batches
        )
        found.append(json.loads((run(recipe) / "metrics.jsonl").read_text().splitlines()[0]))
    for name in ("harmfulness_model/loss", "harmfulness_model/grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4)


def test_an_interrupted_training_goes_on_to_the_same_bits(
    encoder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, so that a wrong random state would show. The interruption falls behind the checkpoint of step 4."""
    from alignment.stages import harmfulness_model

    training = TRAINING | {"num_train_epochs": 1.0, "save_steps": 2}
    (tmp_path / "whole").mkdir()
    (tmp_path / "torn").mkdir()
    whole = run(write_recipe(tmp_path / "whole", encoder, data, eval_data=None, training=training))
    recipe = write_recipe(tmp_path / "torn", encoder, data, eval_data=None, training=training)
    step = harmfulness_model._Trainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(harmfulness_model._Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(recipe)
    monkeypatch.undo()
    torn = run(recipe)
    assert sha256(torn / "model.safetensors") == sha256(whole / "model.safetensors")
    assert losses(torn) == losses(whole)
    assert len(losses(torn)) == 6


def test_what_is_over_long_is_cut_noted_and_read_the_same_way_again(encoder: Path, data: Path, tmp_path: Path) -> None:
    rows = [*graded_rows(0, 6), {"prompt": "bread " * 300, "completion": "Of course.", "grade": 2}]
    write_json_lines(tmp_path / "long.jsonl", rows)
    source = {"name": "file", "path": str(tmp_path / "long.jsonl"), "split": "all"}
    shared = {"data": {"sources": [source]}, "eval_data": {"sources": [source]}}
    for side, kept in (("left", "last"), ("right", "first")):
        (tmp_path / side).mkdir()
        training = TRAINING | {"max_steps": 1}
        recipe = write_recipe(tmp_path / side, encoder, data, training=training, truncation_side=side, **shared)
        folder = run(recipe)
        artifact = read_artifact(folder)
        (counts,) = artifact.data["counts"].values()
        note = f"over 256 tokens, cut on the {side}"  # the encoder's table of positions ends there
        assert counts["noted"] == {note: 1}
        assert counts["examples"][note] == ["long.jsonl:7"]
        assert (counts["kept"], counts["truncated"], artifact.data["num_rows"]) == (7, 1, 7)
        assert artifact.metrics["held_out"]["cut"] == 1
        scorer = AbsoluteHarmfulness.load(folder, loading=LOADING)
        (score,) = scorer.score([Prompt.of("bread " * 300).answer("Of course.")])
        assert str(score.reason).startswith(f"only the {kept} 256 of ")


def test_what_it_leaves_is_no_reward_model_and_says_what_it_is(
    encoder: Path, tiny_model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder keeps its chat template, so that its files look like those of any reward model."""
    from transformers import AutoModelForSequenceClassification

    for name, base in (("encoder", encoder), ("decoder", tiny_model)):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, base, data, eval_data=None, training=TRAINING | {"max_steps": 1})
        folder = run(recipe)
        with pytest.raises(ScorerError, match=r"is a harmfulness model, .* use \{type: absolute_harmfulness, model: "):
            check_checkpoint(folder)
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert (model.config.num_labels, model.config.problem_type) == (1, "regression")
        assert not info["missing_keys"]
    assert sara(["check-reward", str(folder)]) == 2
    assert "holds a harmfulness_model, but a reward_model is needed here" in capsys.readouterr().err
    assert sara(["check-reward", f"{{type: absolute_harmfulness, model: {folder}}}"]) in (0, 1)
    printed = capsys.readouterr().out
    for check in ("order", "batch size", "one at a time", "padding", "control tokens"):
        assert printed.count(check) == 1


def test_harmless_conversations_of_one_grade_are_mixed_in(encoder: Path, data: Path, tmp_path: Path) -> None:
    graded = {"name": "file", "path": str(data / "train.jsonl"), "split": "all"}
    harmless = {"name": "starter_helpful", "grade": 0, "max_rows": 8}
    recipe = write_recipe(
        tmp_path, encoder, data, data={"sources": [graded, harmless]}, training=TRAINING | {"max_steps": 1}
    )
    artifact = read_artifact(run(recipe))
    assert {source: counts["kept"] for source, counts in artifact.data["counts"].items()} == {
        "file:train.jsonl": 48,
        "starter_helpful": 8,
    }
    assert artifact.data["num_rows"] == 56
