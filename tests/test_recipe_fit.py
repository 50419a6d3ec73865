"""Batches that no processes share, texts that a model cannot read, foreign token ids: refused before loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from alignment import stages
from alignment.__main__ import main
from alignment.cli import main as sara
from alignment.inputs import InputError, check_inputs
from alignment.recipe import Ppo, PpoRecipe, Sampling
from alignment.recipe_fit import check_batches, check_fit
from tests.conftest import ROOT
from tests.interrupted import make_parents
from tests.recipe_text import EVALUATE, PPO, load
from tests.tiny import make_reward_model, make_tiny_model, make_tiny_tokenizer

TINY = "tests/tiny_pipeline"
SAMPLING = "stage: {}\noutput_dir: out\nmodel: m\nprompts: {{sources: [{{name: a}}]}}\n"
SCORED = SAMPLING + "scorer: {{type: refusal}}\n"
STAGES = {
    "ppo": PPO,
    "grpo": PPO + "trainer: grpo\n",
    "rloo": PPO + "trainer: rloo\n",
    "rejection_sampling": SCORED.format("rejection_sampling"),
    "context_distillation": SCORED.format("context_distillation"),
    "respond": SAMPLING.format("respond"),
    "evaluate": EVALUATE,
}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


# -------------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("mini_batch", "per_device", "processes", "fits"),
    [
        (64, 4, 8, True),
        (64, 4, 6, False),  # not as many rows on each
        (64, 4, 128, False),  # none on some
        (24, 4, 8, True),  # all rows of a process in one pass
        (40, 4, 8, False),  # 5 rows in passes of 4
    ],
)
def test_a_step_is_shared_out_evenly(
    tmp_path: Path, mini_batch: int, per_device: int, processes: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignment.ppo_update import accumulation_steps

    ppo = Ppo(batch_size=2 * mini_batch, mini_batch_size=mini_batch, per_device_batch_size=per_device)
    recipe = load(tmp_path, PPO).model_copy(update={"ppo": ppo})
    assert isinstance(recipe, PpoRecipe)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if fits:
        check_batches(recipe, processes=processes)
        rows = mini_batch // processes
        assert accumulation_steps(recipe) * min(per_device, rows) == rows
    else:
        said = f"ppo.mini_batch_size {mini_batch} must divide into {processes} processes x per_device_batch_size"
        with pytest.raises(InputError, match=said):
            check_batches(recipe, processes=processes)
        with pytest.raises(InputError, match=said):
            accumulation_steps(recipe)


@pytest.mark.parametrize("trainer", ["ppo", "grpo"])
def test_batches_that_do_not_divide_end_a_launched_stage_before_anything_loads(
    trainer: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    began: list[Any] = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(stages, "run_stage", began.append)
    make_parents(tmp_path, tiny_model)
    words = ["--config", f"{TINY}/ppo.yaml", "--run_dir", str(tmp_path), "--trainer", trainer]
    words += ["--value_model", "null", "--sampling.batch_size", "16"]  # as TRL's trainers have them
    capsys.readouterr()
    assert main([*words, "--dry-run"]) == 0, "nobody has said how many processes there will be"
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", "3")
    for how in ([], ["--dry-run"]):
        assert main([*words, *how]) == 2
        assert "ppo.mini_batch_size 4 must divide into 3 processes" in one_line(capsys)
    monkeypatch.delenv("WORLD_SIZE")
    assert main([*words, "--ppo.per_device_batch_size", "3"]) == 2
    assert "must divide into 1 processes x per_device_batch_size 3" in one_line(capsys)
    assert began == []
    assert main(words) == 0
    assert len(began) == 1


def test_a_pipeline_knows_how_many_processes_a_launch_file_starts(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shutil.copytree(tiny_model, tmp_path / "model")
    words = ["pipeline", f"{TINY}/pipeline.yaml", "--run_dir", str(tmp_path), "--dry-run"]
    assert sara([*words, "--steps.6.launch", "launch/cpu_ddp.yaml"]) == 0
    capsys.readouterr()
    assert sara([*words, "--steps.6.launch", "launch/ddp.yaml"]) == 2
    assert "ppo.mini_batch_size 4 must divide into 8 processes" in one_line(capsys)


# -------------------------------------------------------------------------------------------------------------- lengths


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A model folder that says how far it reads, and no more."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"max_position_embeddings": 600}', encoding="utf-8")
    return folder


def recipe_of(tmp_path: Path, stage: str, model: Path, *overrides: str) -> Any:
    key = "checkpoints.base" if stage == "evaluate" else "model"
    return load(tmp_path, STAGES[stage], f"--{key}", str(model), *overrides)


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_reads_the_longest_prompt_with_the_longest_answer(tmp_path: Path, reader: Path, stage: str) -> None:
    prompts = "prompt_sets.bad.prompts" if stage == "evaluate" else "prompts"
    model = "checkpoints.base" if stage == "evaluate" else "model"

    def check(max_length: int, *overrides: str) -> None:
        words = [f"--{prompts}.max_length", str(max_length), "--sampling.max_new_tokens", "100", *overrides]
        check_fit(recipe_of(tmp_path, stage, reader, *words), planned=())

    check(500)
    said = f"{prompts}.max_length 501 and sampling.max_new_tokens 100 let in texts of 601 tokens, but {model}, .*600"
    with pytest.raises(InputError, match=said):
        check(501)
    check(501, "--sampling.max_prompt_tokens", "500")
    with pytest.raises(InputError, match=r"^sampling.max_prompt_tokens 502 and sampling.max_new_tokens 100 let in"):
        check(700, "--sampling.max_prompt_tokens", "502")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({"text_config": {"max_position_embeddings": 600}}, 600),
        ({"max_position_embeddings": None}, None),
        ({}, None),
    ],
)
def test_a_config_may_say_it_elsewhere_or_not_at_all(
    tmp_path: Path, reader: Path, config: dict[str, Any], limit: int | None
) -> None:
    (reader / "config.json").write_text(json.dumps(config), encoding="utf-8")
    recipe = recipe_of(tmp_path, "respond", reader, "--prompts.max_length", "600")
    if limit is None:
        check_fit(recipe, planned=())
    else:
        with pytest.raises(InputError, match=f"reads {limit} "):
            check_fit(recipe, planned=())


def test_probes_held_out_prompts_and_the_value_model_count_too(tmp_path: Path, reader: Path) -> None:
    wide, prompts = tmp_path / "wide", "{max_length: 500, sources: [{name: a}]}"
    wide.mkdir()
    (wide / "config.json").write_text('{"max_position_embeddings": 1000}', encoding="utf-8")
    words = ["--prompts.max_length", "500", "--sampling.max_new_tokens", "100"]
    probes = [*words, "--probes", f"{{adversarial: {prompts}, borderline: {prompts}}}"]
    with pytest.raises(InputError, match=r"probes.adversarial.max_length 500 and probes.max_new_tokens 256 let in"):
        check_fit(recipe_of(tmp_path, "ppo", reader, *probes), planned=())
    check_fit(recipe_of(tmp_path, "ppo", reader, *probes, "--probes.max_new_tokens", "100"), planned=())
    held_out = ["--eval_prompts", prompts.replace("500", "550")]
    with pytest.raises(InputError, match=r"eval_prompts.max_length 550 and"):
        check_fit(recipe_of(tmp_path, "ppo", reader, *words, *held_out), planned=())
    words[1] = "600"
    check_fit(recipe_of(tmp_path, "ppo", wide, *words), planned=())
    with pytest.raises(InputError, match=r"but value_model, .*, reads 600"):
        check_fit(recipe_of(tmp_path, "ppo", wide, *words, "--value_model", str(reader)), planned=())


def test_a_model_that_is_not_here_yet_is_left_to_its_stage(
    tmp_path: Path, reader: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SARA_CACHE", str(tmp_path / "cache"))
    for model in ("org/model", str(tmp_path / "absent"), "embedded:smollm2-135m-instruct"):
        check_fit(load(tmp_path, PPO, "--model", model), planned=())
    check_fit(load(tmp_path, PPO, "--model", str(reader)), planned={str(reader)})
    shutil.copytree(reader, tmp_path / "cache" / "smollm2-135m-instruct-v1")
    with pytest.raises(InputError, match="model, embedded:smollm2-135m-instruct, reads 600"):
        check_fit(load(tmp_path, PPO, "--model", "embedded:smollm2-135m-instruct"), planned=())


def test_a_stage_checks_it_with_its_other_inputs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shutil.copytree(tiny_model, tmp_path / "sft")
    words = ["--config", f"{TINY}/rejection_sampling.yaml", "--run_dir", str(tmp_path), "--dry-run"]
    assert main([*words, "--sampling.max_new_tokens", "3584"]) == 0
    capsys.readouterr()
    assert main([*words, "--sampling.max_new_tokens", "3585"]) == 2
    assert "prompts.max_length 512 and sampling.max_new_tokens 3585 let in texts of 4097 tokens" in one_line(capsys)
    (tmp_path / "sft" / "config.json").write_text("{", encoding="utf-8")
    assert main(words) == 2
    assert "config.json is not JSON" in one_line(capsys)


# ------------------------------------------------------------------------------------------------------------ token ids

OTHER = r"^value_model: .* reads the token ids of `model`, .*, but its tokenizer is another one; name a reward model"


def ppo(model: Path, value_model: Path) -> PpoRecipe:
    base = PpoRecipe.model_validate(
        {
            "output_dir": "out",
            "model": "m",
            "prompts": {"sources": [{"name": "starter_safety"}]},
            "scorer": {"type": "refusal"},
        }
    )
    sampling = Sampling(max_new_tokens=8, max_prompt_tokens=64)
    return base.model_copy(update={"model": str(model), "value_model": str(value_model), "sampling": sampling})


def test_a_value_model_of_another_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    own = make_reward_model(tiny_model, tmp_path / "own")
    foreign = make_reward_model(make_tiny_model(tmp_path / "small", vocab=400), tmp_path / "foreign")
    check_inputs(ppo(tiny_model, own))
    with pytest.raises(InputError, match=OTHER):
        check_inputs(ppo(tiny_model, foreign))
    shutil.copy(tiny_model / "tokenizer.json", foreign)
    check_inputs(ppo(tiny_model, foreign))
    check_fit(ppo(tiny_model, Path("org/value")), planned=())


def test_the_same_tokens_under_other_ids_are_another_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    value = make_reward_model(tiny_model, tmp_path / "value")
    file = value / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(InputError, match=OTHER):
        check_fit(ppo(tiny_model, value), planned=())


def test_tokens_that_only_one_of_both_has(tiny_model: Path, tmp_path: Path) -> None:
    """The value model may know more than the policy can say, and no less."""
    value = make_reward_model(tiny_model, tmp_path / "value")
    more = make_tiny_tokenizer()
    more.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    policy = Path(shutil.copytree(tiny_model, tmp_path / "policy"))
    more.save_pretrained(value)
    check_fit(ppo(policy, value), planned=())
    with pytest.raises(InputError, match=OTHER):
        check_fit(ppo(value, policy), planned=())


def test_tokenizers_of_other_kinds(tmp_path: Path) -> None:
    """Unigram models list their tokens; without a tokenizer.json the configs say whether every id has a row."""

    def model(name: str, vocabulary: Any, size: int | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"vocab_size": size}), encoding="utf-8")
        if vocabulary is not None:
            (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}), encoding="utf-8")
        return folder

    ours, theirs = model("ours", [["a", -1.0], ["b", -2.0]]), model("theirs", [["b", -1.0], ["a", -2.0]])
    same = model("same", {"a": 0, "b": 1})
    check_fit(ppo(ours, same), planned=())
    large, small, unknown = model("large", None, 100), model("small", None, 99), model("unknown", None)
    for policy, value in ((large, large), (small, large), (large, unknown), (unknown, small)):
        check_fit(ppo(policy, value), planned=())
    for policy, value in ((ours, theirs), (large, small)):
        with pytest.raises(InputError, match=OTHER):
            check_fit(ppo(policy, value), planned=())
