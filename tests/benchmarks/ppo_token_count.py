"""A scorer that counts a token, in the shape in which TRL takes a reward model. It runs in TRL's environment."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reward.conversation import Prompt
from reward.render import Renderer
from tests.scorers import count_sixes

COUNTED = "6"
"""What `tests.scorers.count_sixes` counts: one token to the tiny tokenizer, alone."""


class TokenCount(nn.Module):
    """Its score at each position is how often `token` has come up to there; prompts must not hold it."""

    base_model_prefix = "backbone"

    def __init__(self, token: int) -> None:
        super().__init__()
        self.backbone = _CountsAsHiddenStates(token)
        self.score = nn.Identity()


class _CountsAsHiddenStates(nn.Module):
    def __init__(self, token: int) -> None:
        super().__init__()
        self.token = token

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        counts = (input_ids == self.token).cumsum(dim=1)
        return SimpleNamespace(hidden_states=(counts.unsqueeze(-1).float(),))


def check_same_scores(reward_model: TokenCount, tokenizer: Any, prompt_ids: list[list[int]], *, length: int) -> None:
    """AssertionError unless TRL reads of drawn answers, ended and cut off, what our scorer gives for their texts."""
    from trl.experimental.utils import get_reward

    token, pad, renderer = reward_model.backbone.token, tokenizer.pad_token_id, Renderer(tokenizer)
    assert not any(token in ids for ids in prompt_ids), f"a prompt holds {COUNTED!r}, which would be counted"
    draw = torch.Generator().manual_seed(0)
    number, width = 256, max(len(ids) for ids in prompt_ids)
    others = torch.tensor([i for i in range(len(tokenizer)) if i != pad])  # TRL reads up to the first padding
    answers = others[torch.randint(len(others), (number, length), generator=draw)]
    chance = torch.rand((number, length), generator=draw)
    answers[chance < 0.4] = token
    answers[chance < 0.1] = tokenizer.eos_token_id
    ends = (answers == tokenizer.eos_token_id).long()
    answers[ends.cumsum(dim=1) > ends] = pad
    prompts = [prompt_ids[row % len(prompt_ids)] for row in range(number)]
    queries = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    _, theirs, _ = get_reward(reward_model, torch.cat((queries, answers), dim=1), pad, width)
    texts = [renderer.decode(row)[0] for row in answers.tolist()]
    ours = [count_sixes(Prompt.of("unused").answer(text)) for text in texts]
    assert len(set(ours)) > 2
    assert theirs.tolist() == ours, "TRL's reward model and our scorer differ"
