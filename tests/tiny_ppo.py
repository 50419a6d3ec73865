"""A PPO recipe for the tiny model, ids to ask it with, and what a plain forward pass says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from alignment.policy import load_model, load_tokenizer
from alignment.recipe import Data, ModelInit, Ppo, PpoRecipe, Sampling, Source
from alignment.recipe_scorers import RefusalScorer
from reward.conversation import Prompt
from reward.render import Renderer
from tests.tiny import SENTENCES

if TYPE_CHECKING:
    from pathlib import Path

PAD = 3
UNUSED = Data(sources=[Source(name="unused")])
PROMPTS = [Prompt.of(text) for text in ("Hi", *SENTENCES[:10:2], "Which plants grow? " * 6)]
PROMPT_IDS = [[7, 8, 9, 10, 11, 12], [20], [30, 31, 32]]
COMPLETION_IDS = [[40, 41], [50, 51, 52, 2], [60]]


def ppo_recipe(model: Path, *, temperature: float = 1.0, **settings: Any) -> PpoRecipe:
    """`settings`: keys of the recipe, and of its section `ppo`."""
    ppo = {name: settings.pop(name) for name in list(settings) if name in Ppo.model_fields}
    sampling = Sampling(temperature=temperature, max_new_tokens=6, batch_size=2)
    given = {"output_dir": "unused", "prompts": UNUSED, "scorer": RefusalScorer(), "sampling": sampling} | settings
    return PpoRecipe(
        model=str(model),
        **given,
        ppo=Ppo(**{"batch_size": 8, "mini_batch_size": 4, "per_device_batch_size": 2} | ppo),
    )


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return load_model(str(tiny_model), init=ModelInit(), pad_token_id=PAD).eval()


@pytest.fixture(scope="module")
def renderer(tiny_model: Path) -> Renderer:
    return Renderer(load_tokenizer(str(tiny_model)))


def logprobs_alone(model: Any, prompt: list[int], completion: list[int], *, temperature: float) -> torch.Tensor:
    """log softmax of the full forward pass over one text, at the tokens of its completion."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
    distribution = torch.log_softmax(logits[len(prompt) - 1 : -1] / temperature, dim=-1)
    return distribution[torch.arange(len(completion)), torch.tensor(completion)]
