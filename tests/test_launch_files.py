"""The files in launch/: accelerate understands them, stages can fill them in, and Slurm jobs start what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.recipe import PpoRecipe, RewardModelRecipe
from alignment.recipe_file import load_recipe
from tests.conftest import ROOT

LAUNCH_FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("launch/*.yaml"))


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", LAUNCH_FILES)
def test_accelerate_knows_every_key_of_a_launch_file(path: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(path)  # refuses unknown keys of the first level
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.deepspeed_config) <= options, "accelerate drops what it does not know without a word"
    assert config.num_processes % config.num_machines == 0
    assert config.use_cpu == ("cpu" in Path(path).name)
    set_by_stages = {"gradient_accumulation_steps", "gradient_clipping"}
    assert set_by_stages.isdisjoint(config.deepspeed_config), "the recipe sets these"
    file = config.deepspeed_config.get("deepspeed_config_file")
    if file is not None:
        assert Path(file).is_file()
        assert config.mixed_precision is None, "accelerate refuses it beside DeepSpeed's own file"


def test_launch_files_are_what_their_names_say() -> None:
    configs = {Path(path).stem: yaml.safe_load(Path(path).read_text(encoding="utf-8")) for path in LAUNCH_FILES}
    machines = {name: (config["num_machines"], config["num_processes"]) for name, config in configs.items()}
    assert machines == {
        "cpu": (1, 1),
        "cpu_ddp": (1, 2),
        "cpu_zero2": (1, 2),
        "cpu_zero3": (1, 2),
        "gpu": (1, 1),
        "ddp": (1, 8),
        "zero1": (1, 8),
        "zero2": (1, 8),
        "zero3": (1, 8),
        "zero3_offload": (1, 8),
        "multi_node": (2, 16),
    }
    stages = {name: config.get("deepspeed_config", {}).get("zero_stage") for name, config in configs.items()}
    named = {name: int(match[1]) for name in configs if (match := re.search(r"zero(\d)$", name))}
    assert {name: stage for name, stage in stages.items() if stage is not None} == named | {"multi_node": 3}
    for name, config in configs.items():
        whole = config.get("deepspeed_config", {}).get("zero3_save_16bit_model", False)
        assert whole == (stages[name] == 3), "under ZeRO-3 alone, whole weights have to be asked for"


def llama2_ppo() -> PpoRecipe:
    recipe = load_recipe(Path("recipes/llama2-7b/ppo.yaml"))
    assert isinstance(recipe, PpoRecipe)
    return recipe


def autos(config: Any, key: str = "") -> set[str]:
    if isinstance(config, dict):
        return {found for name, inner in config.items() for found in autos(inner, f"{key}.{name}".strip("."))}
    return {key} if config == "auto" else set()


def test_ppo_fills_in_the_offload_file() -> None:
    """What accelerate does when it prepares an engine, for eight processes."""
    from types import SimpleNamespace

    from accelerate.utils import DeepSpeedPlugin

    from alignment.ppo_state import configure_engine

    plugin = DeepSpeedPlugin(hf_ds_config="launch/zero3_offload.json")
    accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin), num_processes=8, gradient_accumulation_steps=2
    )
    configure_engine(accelerator, llama2_ppo())
    config = plugin.deepspeed_config
    assert autos(config) == {"train_batch_size"}
    rows = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8
    assert rows == 64
    assert config["gradient_clipping"] == 1.0
    plugin.deepspeed_config_process(must_match=False, train_batch_size=rows)
    assert not autos(config)
    assert plugin.zero_stage == 3


def test_trainers_fill_in_the_offload_file() -> None:
    """What transformers does with the file when a Trainer is made, for eight processes."""
    from types import SimpleNamespace

    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

    recipe = load_recipe(Path("recipes/llama2-7b/safety_reward_model.yaml"))
    assert isinstance(recipe, RewardModelRecipe)
    assert recipe.model_init.dtype == "bfloat16"
    flags = {"bf16": True, "bf16_full_eval": False, "fp16": False, "fp16_full_eval": False, "save_on_each_node": False}
    config = HfTrainerDeepSpeedConfig("launch/zero3_offload.json")
    config.trainer_config_process(SimpleNamespace(world_size=8, **flags, **recipe.training.model_dump()))
    assert not config.mismatches
    assert not autos(config.config)
    assert config.config["train_batch_size"] == 512
    assert config.is_offload()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu_ddp", "cpu_zero3"])
def test_a_launch_file_of_two_processes_starts_two(name: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{name}.yaml"]
    command += ["--main_process_port", "0", "--no_python", "sh", "-c", 'echo "rank $RANK of $WORLD_SIZE"']
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert sorted(line for line in result.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 of 2",
        "rank 1 of 2",
    ]


# ---------------------------------------------------------------------------------------------------------------- Slurm


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for Slurm on two nodes, and for the programs that a job starts: each prints its words as JSON."""
    folder = tmp_path / "bin"
    folder.mkdir()
    echo = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n"
    scripts = {
        "python": echo,
        "sara": echo,
        "scontrol": '#!/bin/sh\n[ "$1" = show ] && printf "first\\nsecond\\n" || echo "$@"\n',
        "srun": "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nfor ((i = 0; i < SLURM_NNODES; i++)); do\n"
        'SLURM_NODEID=$i "$@"; done\nexit "${STEP_EXIT_CODE:-0}"\n',
    }
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "activate").write_text(f"PATH={folder}:$PATH\n", encoding="utf-8")
    for name, value in {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_END_TIME": "99999999999",
        "SLURM_NNODES": "1",
        "VENV": str(tmp_path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SBATCH_SIGNAL", raising=False)
    return folder


def run_job(script: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a batch script as Slurm would."""
    return subprocess.run(
        ["bash", f"launch/slurm/{script}.sbatch", *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("launch", ["launch/multi_node.yaml", "launch/ddp.yaml"])
def test_many_nodes_start_one_launcher_each_that_accelerate_understands(launch: str) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    recipe = "recipes/llama2-7b/ppo.yaml"
    result = run_job("many_nodes", "--seed", "7", RECIPE=recipe, LAUNCH=launch, SLURM_NNODES="2")
    assert result.returncode == 0, result.stderr
    commands = [json.loads(line)[1:] for line in result.stdout.splitlines()]
    assert [words[:2] for words in commands] == [["-m", "alignment.launch"]] * 2
    parsed = [launch_command_parser().parse_args(words[2:]) for words in commands]
    assert [options.machine_rank for options in parsed] == [0, 1]
    for options in parsed:
        assert (options.num_machines, options.num_processes) == (2, 16)
        assert options.main_process_ip == "first"
        merged, _, _ = _validate_launch_command(options)
        assert (merged.num_machines, merged.num_processes) == (2, 16), "the config does not take their place"
        assert (merged.use_deepspeed, merged.multi_gpu) == ("ddp" not in launch, "ddp" in launch)
        assert options.main_process_port == 24711
        assert Path(options.config_file).is_file()
        assert options.module
        assert options.training_script == "alignment"
        assert options.training_script_args == ["--config", recipe, "--seed", "7"]


@pytest.mark.usefixtures("slurm")
def test_one_node_runs_a_pipeline_or_a_stage() -> None:
    pipeline = run_job("one_node", "--run_dir", "x", PIPELINE="recipes/demo/pipeline.yaml")
    assert json.loads(pipeline.stdout)[1:] == ["pipeline", "recipes/demo/pipeline.yaml", "--run_dir", "x"]
    stage = run_job("one_node", RECIPE="a.yaml", LAUNCH="launch/zero3.yaml")
    words = ["--config_file", "launch/zero3.yaml", "-m", "alignment", "--config", "a.yaml"]
    assert json.loads(stage.stdout)[1:] == ["-m", "alignment.launch", *words]
    forgotten = run_job("one_node", RECIPE="a.yaml")
    assert forgotten.returncode != 0
    assert "set LAUNCH" in forgotten.stderr


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_a_job_is_queued_again_at_its_time_limit_and_not_when_it_fails(script: str) -> None:
    settings = {"RECIPE": "a.yaml", "LAUNCH": "launch/multi_node.yaml"}
    at_the_limit = run_job(script, **settings, STEP_EXIT_CODE="143", SLURM_JOB_END_TIME="1")
    assert at_the_limit.returncode == 143
    assert "requeue 4711" in at_the_limit.stdout
    stopped = run_job(script, **settings, STEP_EXIT_CODE="75")
    assert stopped.returncode == 75
    assert "requeue 4711" in stopped.stdout, "it has saved itself, whenever that was"
    failed = run_job(script, **settings, STEP_EXIT_CODE="1")
    assert failed.returncode == 1
    assert "requeue" not in failed.stdout
    done = run_job(script, **settings, SLURM_JOB_END_TIME="1")
    assert done.returncode == 0
    assert "requeue" not in done.stdout


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
@pytest.mark.parametrize(
    ("signal", "lead"), [({}, 300), ({"SBATCH_SIGNAL": "TERM@900"}, 900), ({"SBATCH_SIGNAL": "TERM"}, 60)]
)
def test_whatever_ends_a_job_after_its_signal_queues_it_again(script: str, signal: dict[str, str], lead: int) -> None:
    """137: the step was killed because one of its nodes had saved and ended. Slurm sends signals up to 60 s early."""
    settings = {"RECIPE": "a.yaml", "LAUNCH": "launch/multi_node.yaml", "STEP_EXIT_CODE": "137"} | signal
    now = int(time.time())
    after = run_job(script, **settings, SLURM_JOB_END_TIME=str(now + lead + 50))
    assert after.returncode == 137
    assert "requeue 4711" in after.stdout
    before = run_job(script, **settings, SLURM_JOB_END_TIME=str(now + lead + 360))
    assert (before.returncode, before.stderr) == (137, "")
    assert "requeue" not in before.stdout


@pytest.mark.usefixtures("slurm")
@pytest.mark.parametrize("script", ["one_node", "many_nodes"])
def test_what_a_job_asks_of_slurm(script: str) -> None:
    """The signal goes to the step (no `B:`) before the limit; eight GPUs a node; the step gets the job's processors."""
    text = Path(f"launch/slurm/{script}.sbatch").read_text(encoding="utf-8")
    asked = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, flags=re.MULTILINE)
    assert (
        dict(asked).items()
        >= {"requeue": "", "signal": "TERM@300", "gpus-per-node": "8", "open-mode": "append"}.items()
    )
    assert "${SBATCH_SIGNAL:-TERM@300}" in text, "queued again by the same lead"
    assert text.index("\nexport SRUN_CPUS_PER_TASK=") < text.index("\nsrun ")
    assert subprocess.run(["bash", "-n", f"launch/slurm/{script}.sbatch"], check=False).returncode == 0
