"""`sara plan`: layouts, models that do not exist yet, recipes that fit where they say, knobs, time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from alignment.actor_critic import load_actor_critic
from alignment.cli import main as sara
from alignment.inputs import InputError
from alignment.plan.catalog import Catalog, Setup
from alignment.plan.footprint import footprint
from alignment.plan.knobs import advise
from alignment.plan.layout import Layout, launch_of, read_layout
from alignment.plan.memory import GIB, USABLE, Loaded, Numerics, Texts, states_of
from alignment.plan.ppo_models import PpoModels
from alignment.plan.shapes import shape_of
from alignment.plan.speed import Clock, Machine, forward_operations, seconds
from alignment.policy import add_lora
from alignment.recipe_file import load_recipe
from alignment.recipe_parts import Lora
from tests.conftest import ROOT
from tests.measured import stored
from tests.tiny_ppo import PAD, ppo_recipe

B70 = "recipes/llama2-70b/ppo.yaml"
LORA = Lora(r=4, alpha=8)
pytestmark = pytest.mark.usefixtures("bare_checkout")
SEVEN = sorted(ROOT.glob("recipes/llama2-7b/*.yaml"))


def setup_of(path: str, *overrides: str, gpus: int | None = None, launch: str | None = None) -> Setup:
    recipe = load_recipe(Path(path), overrides)
    layout = read_layout(Path(launch or launch_of(Path(path))), gpus=gpus)
    return Setup(recipe, layout, Catalog(recipe, Path(path)))


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert sara(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# -------------------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("launch", "gpus", "per_node", "deepspeed", "stage", "offload", "bf16", "on_cpu"),
    [
        ("gpu", 1, 1, False, 0, False, False, False),
        ("cpu", 1, 1, False, 0, False, False, True),
        ("ddp", 8, 8, False, 0, False, True, False),
        ("zero1", 8, 8, True, 1, False, True, False),
        ("zero2", 8, 8, True, 2, False, True, False),
        ("zero3", 8, 8, True, 3, False, True, False),
        ("zero3_offload", 8, 8, True, 3, True, True, False),
        ("multi_node", 16, 8, True, 3, False, True, False),
        ("cpu_zero2", 2, 2, True, 2, False, False, True),
    ],
)
def test_a_launch_file_is_read(
    launch: str, gpus: int, per_node: int, deepspeed: bool, stage: int, offload: bool, bf16: bool, on_cpu: bool
) -> None:
    layout = read_layout(Path(f"launch/{launch}.yaml"))
    assert layout == Layout(
        f"launch/{launch}.yaml", gpus, per_node, deepspeed, stage, offload, offload, bf16=bf16, on_cpu=on_cpu
    )
    if gpus > 1:
        more = read_layout(Path(f"launch/{launch}.yaml"), gpus=4 * per_node)
        assert more == replace(layout, gpus=4 * per_node)
        assert more.nodes == 4


def test_layouts_that_a_plan_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"starts one process, not 4"):
        read_layout(Path("launch/gpu.yaml"), gpus=4)
    file = tmp_path / "fsdp.yaml"
    file.write_text("distributed_type: FSDP\nnum_processes: 2\n", encoding="utf-8")
    with pytest.raises(InputError, match="distributed_type 'FSDP'"):
        read_layout(file)


def test_the_launch_file_stands_in_the_first_line_of_a_recipe(tmp_path: Path) -> None:
    assert launch_of(Path(B70)) == "launch/multi_node.yaml"
    bare = tmp_path / "recipe.yaml"
    bare.write_text("stage: ppo\n", encoding="utf-8")
    with pytest.raises(InputError, match="name one with --launch"):
        launch_of(bare)


# --------------------------------------------------------------------------------------------------------------- models


def test_models_of_later_stages_are_those_that_they_start_from() -> None:
    setup = setup_of("recipes/llama2-7b/ppo.yaml", "--run_dir", "elsewhere")
    for model in ("elsewhere/rejection_sampling_sft", "elsewhere/safety_reward_model", "elsewhere/ppo"):
        assert setup.catalog.config(model)["hidden_size"] == 4096
    assert setup.catalog.config("runs/llama2-13b/safety_reward_model")["hidden_size"] == 5120
    with pytest.raises(InputError, match=r"--config-json nowhere=CONFIG\.json"):
        setup.catalog.config("nowhere")


def test_a_config_file_stands_for_a_model_that_is_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 32}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    words = ["recipes/llama2-7b/sft.yaml", "--gpu-memory", "80", "--model", "runs/my-model"]
    made = planned(capsys, *words, "--config-json", f"runs/my-model={tmp_path}")
    # GPT-2: 12 h^2 + 13 h a layer, embeddings of words and positions (tied head), final norm
    assert made["roles"][0]["parameters"] == 3 * (12 * 64**2 + 13 * 64) + (100 + 32) * 64 + 2 * 64
    assert planned(capsys, *words, "--config-json", str(tmp_path / "config.json")) == made


@pytest.mark.parametrize(
    ("trunk", "lora"),
    [("shared", None), ("separate", None), ("shared", LORA), ("separate", LORA), ("adapter", LORA)],
)
def test_the_models_of_ppo_are_those_that_it_loads(tiny_model: Path, trunk: str, lora: Lora | None) -> None:
    recipe = ppo_recipe(tiny_model, value_trunk=trunk, lora=lora)
    actor = load_actor_critic(recipe, pad_token_id=PAD)
    models = PpoModels.of(Setup(recipe, Layout("launch/cpu.yaml", 1, 1), Catalog(recipe, Path("recipe.yaml"))))
    states = [states_of(model, models.layout) for model in models.engine]
    assert sum(state.weights for state in states) == stored(actor.parameters())
    assert sum(state.gradients for state in states) == stored(p for p in actor.parameters() if p.requires_grad)
    assert (models.reference is None) == (lora is not None)


# -------------------------------------------------------------------------------------------- the recipes that are here


@pytest.mark.parametrize(
    ("recipe", "gpus", "memory"),
    [
        *((f"recipes/llama2-7b/{path.name}", None, 80) for path in SEVEN if path.stem != "pipeline"),
        ("recipes/llama2-7b/ppo_lora.yaml", 8, 48),
        ("recipes/llama2-13b/sft.yaml", 8, 80),
        ("recipes/llama2-13b/safety_reward_model.yaml", 8, 80),
        ("recipes/llama2-13b/helpfulness_reward_model.yaml", 8, 80),
        ("recipes/llama2-13b/label.yaml", 8, 80),
        ("recipes/llama2-13b/ppo.yaml", 8, 80),
        ("recipes/llama2-13b/ppo_lora.yaml", 8, 80),
        ("recipes/llama2-70b/label.yaml", 8, 80),
        ("recipes/llama2-70b/sft.yaml", 32, 80),
        ("recipes/llama2-70b/safety_reward_model.yaml", 32, 80),
        ("recipes/llama2-70b/helpfulness_reward_model.yaml", 32, 80),
        ("recipes/llama2-70b/ppo.yaml", 32, 192),
        ("recipes/llama2-70b/ppo_lora.yaml", 8, 80),
    ],
)
def test_a_recipe_fits_where_it_says(recipe: str, gpus: int | None, memory: int) -> None:
    assert footprint(setup_of(recipe, gpus=gpus)).peak.total <= USABLE * memory * GIB


def test_ppo_of_7b_by_hand() -> None:
    """Weights in bfloat16: whole ones of reference, two reward models and, while it samples, policy; a cache."""
    found = footprint(setup_of("recipes/llama2-7b/ppo.yaml"))
    policy, reward_model = 6_738_415_616, 6_738_415_616 - 32_000 * 4096 + 4096
    states = 16 * (policy + 4096) // 8
    held = states + 2 * policy + 2 * 2 * reward_model + 2 * 500_000_000
    sampling = found.phases[0]
    assert sampling.held == pytest.approx(held, abs=8)
    assert sampling.parts["gathered weights"] == 2 * (policy + 4096)
    assert sampling.parts["KV cache"] == 2 * 32 * 4096 * 2 * 8 * (1024 + 512)
    assert found.peak is sampling


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        (["--eval_prompts.max_length", "4096"], 3072 + 512),
        (["--probes.adversarial.max_length", "2048"], 2048),  # reading the prompts takes more than 256 further tokens
        (["--probes.borderline.max_length", "4096"], 3072),
        (["--probes.max_new_tokens", "2048"], 1024 + 2048),
    ],
)
def test_prompts_that_nothing_is_learned_from_are_sampled_too(words: list[str], tokens: int) -> None:
    """Held-out prompts and probes, cut to sampling.max_prompt_tokens; what is learned from stays as long as it was."""
    plain, found = (footprint(setup_of("recipes/llama2-7b/ppo.yaml", *more)) for more in ([], words))
    assert found.phases[0].parts["KV cache"] == 2 * 32 * 4096 * 2 * 8 * tokens
    assert found.peak.total > plain.peak.total
    assert found.phases[-2:] == plain.phases[-2:]


def test_scorers_read_the_answers_to_prompts_that_nothing_is_learned_from() -> None:
    """Of the same length it is the same pass, whoever is asked. A violation scorer reads the probes' answers alone."""
    scorer = "{type: reward_model, path: runs/llama2-7b/safety_reward_model, dtype: bfloat16}"
    words = ["--probes.violation_scorer", scorer]

    def scoring(*more: str) -> int:
        phases = footprint(setup_of("recipes/llama2-7b/ppo.yaml", *words, *more)).phases
        return next(phase.parts["activations"] for phase in phases if phase.name == "scoring")

    learned = scoring("--prompts.max_length", "4096")
    assert scoring() < scoring("--eval_prompts.max_length", "4096") == learned
    assert scoring("--probes.adversarial.max_length", "4096", "--probes.max_new_tokens", "512") == learned
    assert scoring("--probes.max_new_tokens", "512") == scoring()


def test_the_pairs_that_a_reward_model_ranks_may_be_longer_than_the_answers() -> None:
    """The same pass as over answers of that length, 1,536 + 96 tokens, and no second copy of the model."""

    def scoring(name: str, max_length: int) -> int:
        words = ["--reward_models.helpfulness.data.max_length", str(max_length), "--sampling.max_prompt_tokens", "1536"]
        found = footprint(setup_of("recipes/smollm2-135m/evaluate.yaml", *words))
        assert [role.model.name for role in found.roles].count("helpfulness") == 1
        return next(phase.parts["activations"] for phase in found.phases if phase.name == f"scoring by {name}")

    answers = scoring("helpfulness", 512)
    pairs = [scoring("reward_models.helpfulness", max_length) for max_length in (512, 1632, 2048)]
    assert pairs[0] < pairs[1] == answers < pairs[2]


def test_the_plan_of_70b(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, B70, "--gpus", "32", "--gpu-memory", "80")
    assert (made["gpus"], made["nodes"], made["zero_stage"]) == (32, 4, 3)
    policy, reference, *reward_models = made["roles"]
    parts = [2 * (68_976_648_192 - 32_000 * 8192 + 8192) // 32] * 2
    assert [role["weights"] for role in reward_models] == parts
    assert policy["parameters"] == 68_976_648_192 + 8192  # with the value head
    assert policy["weights"] + policy["gradients"] + policy["optimizer"] == pytest.approx(
        16 * policy["parameters"] / 32
    )
    assert reference["weights"] == 2 * 68_976_648_192 // 32
    assert not made["fits"]
    assert made["peak"] == max(phase["total"] for phase in made["phases"]) > 2 * 68_976_648_192
    assert made["advice"]["peak"] <= USABLE * 80 * GIB
    assert all(knob["peak"] < made["peak"] for knob in made["advice"]["knobs"])
    assert [change.split()[0] for change in made["advice"]["way"]] == ["answers"], "and nothing else with it"
    assert any("offload" in knob["change"] for knob in made["advice"]["knobs"])
    # Llama 2, section 3.4.3 of the paper's PPO: about 330 s an iteration for 70B
    assert 150 < sum(made["time"]["seconds"].values()) < 600


# ---------------------------------------------------------------------------------------------------------------- knobs


def test_a_way_to_fit_holds_nothing_that_is_not_needed() -> None:
    setup = setup_of("recipes/llama2-7b/ppo.yaml")
    advice = advise(setup, limit=USABLE * 24 * GIB)
    assert advice.peak <= USABLE * 24 * GIB < footprint(setup).peak.total
    assert any("offload" in knob.change for knob in advice.knobs)
    assert [change.split()[0] for change in advice.way] == [
        "sampling.batch_size:",
        "ppo.reference:",
        "sharded:",
        "--launch",
    ]
    nothing = advise(setup, limit=1.0)
    assert nothing.peak > 1.0
    assert nothing.way, "where nothing fits, all that helps"


def test_a_sharded_reference_is_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = [B70, "--gpus", "32", "--gpu-memory", "80"]
    whole, sharded = planned(capsys, *words, "--ppo.reference", "whole"), planned(capsys, *words)
    saved = whole["roles"][1]["weights"] * 31 // 32
    assert whole["peak"] - sharded["peak"] == saved
    knobs = {knob["change"]: knob["peak"] for knob in whole["advice"]["knobs"]}
    assert knobs["ppo.reference: sharded"] == sharded["peak"]
    assert sara(["plan", *words, "--launch", "launch/ddp.yaml", "--model_init.dtype", "float32"]) == 2
    assert "needs ZeRO-3" in capsys.readouterr().err


def test_what_else_ppo_may_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """A value adapter, the pretraining mix, and scorers that PPO does not see."""
    words = ["recipes/llama2-7b/ppo_lora.yaml", "--gpu-memory", "80"]
    plain = planned(capsys, *words)
    adapter = planned(capsys, *words, "--ppo.value_trunk", "adapter")
    second = adapter["roles"][1]
    assert (second["name"], second["trainable"]) == ("value adapter", plain["roles"][0]["trainable"])
    assert second["weights"] == pytest.approx(4 * second["trainable"], rel=1e-3)
    mix = ["--ptx_data", "{sources: [{name: alpaca}], max_length: 1024}", "--ppo.ptx_coef", "1.0"]
    mixed = planned(capsys, *words, *mix)
    totals = [{phase["name"]: phase["total"] for phase in made["phases"]} for made in (plain, mixed)]
    # of 2 rows 1,024 tokens wide: 32 inputs of layers, and the float32 log-distribution
    assert totals[1]["update"] - totals[0]["update"] > 2 * 1024 * (32 * 4096 * 2)
    assert totals[1]["sampling"] == totals[0]["sampling"]
    gold = planned(capsys, *words, "--gold_scorer", "{type: reward_model, path: runs/llama2-7b/safety_reward_model}")
    assert gold["roles"][-1]["name"] == "gold_scorer"
    assert gold["phases"][0]["held"] - plain["phases"][0]["held"] == 4 * gold["roles"][-1]["parameters"]


def test_every_knob_of_an_update_lowers_it() -> None:
    words = ["--ppo.gradient_checkpointing", "false", "--ppo.value_trunk", "separate", "--sampling.batch_size", "1"]
    words += ["--scorer", "{type: reward_model, path: runs/llama2-7b/safety_reward_model}"]
    words += ["--model_init.dtype", "float32"]
    setup = setup_of("recipes/llama2-7b/ppo.yaml", *words, launch="launch/ddp.yaml")
    changes = [knob.change.partition(" ")[0] for knob in advise(setup, limit=0).knobs]
    assert changes == [
        "ppo.gradient_checkpointing:",
        "ppo.per_device_batch_size:",
        "--launch",
        "--launch",
        "--launch",
        "dtype:",
        "scorers",
        "ppo.value_trunk:",
        "--launch",
        "lora:",
        "lora",
    ]


def test_a_smaller_micro_batch_keeps_the_batch() -> None:
    setup = setup_of("recipes/llama2-7b/safety_reward_model.yaml", "--training.gradient_checkpointing", "false")
    changes = [knob.change for knob in advise(setup, limit=GIB).knobs]
    assert "training.per_device_train_batch_size: 1 and gradient_accumulation_steps: 64" in changes


# ----------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("lora", [None, Lora(r=4)])
def test_operations_are_those_that_torch_counts(lora: Lora | None) -> None:
    config = {"model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 344}
    config |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    plain: Any = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation="eager")
    model = plain if lora is None else add_lora(plain, lora, head="causal_lm")
    ids = torch.randint(4, 512, (2, 64))
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    shape = shape_of(config, lora=lora)
    tuning = "full" if lora is None else "lora"
    loaded = Loaded("m", "m", shape, Numerics(2, 2, 2), tuning=tuning, tuned_layers=4)
    texts = Texts(2, 64)
    found = forward_operations(loaded, texts, head_tokens=texts.tokens)
    assert found == pytest.approx(forward.get_total_flops(), rel=0.15)
    clock = Clock(Machine(tflops=1.0, mfu=1.0), Layout("x", 1, 1))
    learned = clock.learn([loaded], texts, batches=1, steps=1, head_tokens=texts.tokens, again=False) * 1e12
    assert learned == pytest.approx(forward.get_total_flops() + backward.get_total_flops(), rel=0.15)


def test_time_follows_the_machine() -> None:
    setup = setup_of("recipes/llama2-7b/ppo.yaml")
    _, usual = seconds(setup, Machine()) or ("", {})
    assert list(usual) == ["sampling", "log-probabilities", "scoring", "update"]
    _, faster = seconds(setup, Machine(mfu=0.8)) or ("", {})
    assert faster["update"] == pytest.approx(usual["update"] / 2)
    assert faster["scoring"] == pytest.approx(usual["scoring"] / 2)
    _, far = seconds(setup, Machine(network=0.25)) or ("", {})
    # each of 16 micro-batches gathers 13.5 GB twice and gives as much in gradients
    assert far["update"] == pytest.approx(16 * 3 * 2 * 6_738_419_712 / 0.25e9)
    assert seconds(setup_of("recipes/demo/ppo.yaml"), Machine()) is None, "a CPU is no such machine"
