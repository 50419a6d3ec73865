"""`sara plan` of PPO whose answers a vLLM server draws: what sending it the weights takes. Numbers are by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from alignment.cli import main as sara
from alignment.plan.layout import Layout
from alignment.plan.memory import Loaded, Numerics, packs_of_weights
from alignment.plan.shapes import BUILT_IN, shape_of
from tests.conftest import ROOT

B70 = "recipes/llama2-70b/ppo.yaml"


def test_with_a_server_the_main_process_holds_packs_of_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """70B under ZeRO-3 in bfloat16: 2^30 bytes and the embeddings (32,000 x 8,192), gathered, made and on their way."""
    monkeypatch.chdir(ROOT)
    server = "{base_url: 'http://127.0.0.1:8000'}"
    assert sara(["plan", B70, "--gpus", "32", "--gpu-memory", "80", "--vllm", server, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    sampling = next(phase for phase in made["phases"] if phase["name"] == "sampling")
    assert sampling["parts"] == {"packs of weights": 4_794_089_472}
    assert made["fits"]
    assert made["notes"] == ["a server samples: its memory and the time that it takes are not counted"]
    # 68,976,656,384 weights, with a value head of 8,192, at 25 GB/s between nodes
    assert made["time"]["of"] == "an iteration, without the server's sampling"
    assert list(made["time"]["seconds"]) == ["sending weights", "log-probabilities", "scoring", "update"]
    assert made["time"]["seconds"]["sending weights"] == pytest.approx(68_976_656_384 * 2 / 25e9)


@pytest.mark.parametrize(
    ("stage", "tuning", "parameters", "expected"),
    [
        (0, "full", 6_738_415_616, 2_671_771_648),  # two packs of 2^30 + 2 x 32,000 x 4,096, made of what is there
        (2, "full", 6_738_415_616, 2_671_771_648),
        (3, "full", 6_738_415_616, 4_007_657_472),  # and one that was gathered
        (0, "lora", 6_738_415_616, 4_007_657_472),  # or merged
        (0, "full", 400_000_000, 800_000_000),  # a model that fills no pack
        (3, "full", 400_000_000, 1_600_000_000),
    ],
)
def test_packs_of_weights_by_hand(stage: int, tuning: Any, parameters: int, expected: int) -> None:
    shape = replace(shape_of(BUILT_IN["meta-llama/Llama-2-7b-hf"]), parameters=parameters)
    layout = Layout("x", 8, 8, deepspeed=stage > 0, zero_stage=stage)
    assert packs_of_weights(Loaded("m", "m", shape, Numerics(2, 2, 2), tuning=tuning), layout) == expected
