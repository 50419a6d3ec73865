"""`RewardModel`: a scorer that is also a module with a regression head.

On disk it is a stock sequence classifier with one output, so transformers, TRL and reward-bench load it unaided. The
head reads the hidden state of the last token that is not padding (the end-of-turn token); the raw number is the score,
its sigmoid the 0-1 score of the Llama 2 paper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward.checkpoint import HEAD_NAMES, Checkpoint
from reward.conversation import Conversation, Message
from reward.dtype import Dtype, torch_dtype
from reward.padding_free import attending_by_text, row_of, why_padded
from reward.render import Renderer, TooLong
from reward.scorer import Scale, Score, ScorerError
from reward.shared_prefix import Group, outputs_of_head, pack, packed_scores, why_not_packed


class RewardModel:
    """A sequence classifier with one output and the renderer of its own tokenizer."""

    scale: Scale = "logit"

    def __init__(
        self,
        module: Any,
        tokenizer: Any,
        *,
        name: str = "reward_model",
        batch_size: int = 16,
        max_length: int = 4096,
        shared_prefix: bool = True,
        keep_tail: bool = False,
    ) -> None:
        if module.config.num_labels != 1:
            raise ScorerError(f"{name} has {module.config.num_labels} outputs; a reward model has one")
        renderer = Renderer(tokenizer, name=name, keep_tail=keep_tail)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id in renderer.end_ids:
            raise ScorerError(
                f"{name}: pad token must be set and differ from eos and from the end of a turn, "
                "else the last token is not found"
            )
        module.config.pad_token_id = tokenizer.pad_token_id
        self.module = module
        self.renderer = renderer
        self.name = name
        self.batch_size = batch_size
        self.max_length = max_length
        self.why_padded = why_not_packed(module) if shared_prefix else "switched off"
        self._run: Callable[..., Any] = module
        self._most: Callable[[int], int] = int

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "bfloat16",
        device: str | torch.device | None = None,
        name: str | None = None,
        batch_size: int = 16,
        max_length: int = 4096,
        shared_prefix: bool = True,
        keep_tail: bool = False,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """Load for scoring. ScorerError when the checkpoint holds no regression head (it would be random).

        `keep_tail`: the score is read behind all that the chat template writes, not at the end-of-turn token.
        """
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        Checkpoint.read(path).check_head("classifier")
        module = AutoModelForSequenceClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=torch_dtype(dtype, device or "cpu"),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
        module.eval().requires_grad_(False)
        if device is not None:
            module.to(device)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        return cls(
            module,
            tokenizer,
            name=name or Path(path).name,
            batch_size=batch_size,
            max_length=max_length,
            shared_prefix=shared_prefix,
            keep_tail=keep_tail,
        )

    @functools.cached_property
    def _attends_by_text(self) -> bool:
        return why_padded(self.module) is None

    @property
    def tokenizer(self) -> Any:
        return self.renderer.tokenizer

    @property
    def head(self) -> Tensor:
        """Weights of the regression head, `(1, hidden size)`."""
        name = next(name for name, _ in self.module.named_children() if name in HEAD_NAMES)
        return getattr(self.module, name).weight

    @property
    def dtype(self) -> torch.dtype:
        return self.head.dtype

    def share_out(self, engine: Callable[..., Any], *, most: Callable[[int], int]) -> None:
        """From now on run the module through `engine`, whose weights several processes hold together.

        All of them must then call `score` together, also one that has nothing to score: every forward pass needs the
        weights of all. `most` maps this process's number of passes to the largest of any process.
        """
        self._run, self._most = engine, most

    def token_ids(self, conversation: Conversation) -> list[int]:
        """What the model reads; the score is read at the last one."""
        return self.renderer.render_ids(conversation)

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Raw scores, in order. A conversation over `max_length` tokens is unscored with the reason, never cut."""
        scores: dict[int, Score] = {}
        rendered: dict[int, list[int]] = {}
        for position, conversation in enumerate(conversations):
            try:
                rendered[position] = self.renderer.render_ids(conversation, max_length=self.max_length)
            except TooLong as error:
                scores[position] = Score(None, str(error))
        batches = list(self._batches(conversations, rendered))
        num_idle = self._most(len(batches)) - len(batches)
        for batch in batches:
            positions = [position for group in batch for position in group]
            if self.why_padded is None:
                values = self.forward_packed([[rendered[position] for position in group] for group in batch])
            else:
                values = self.forward([rendered[position] for position in positions])
            scores |= {position: Score(value) for position, value in zip(positions, values.tolist(), strict=True)}
        for _ in range(num_idle):  # for the other processes, which need the weights that this one holds
            self.forward([[self.module.config.pad_token_id]])
        return [scores[position] for position in range(len(conversations))]

    def _batches(
        self, conversations: Sequence[Conversation], rendered: Mapping[int, list[int]]
    ) -> Iterator[list[list[int]]]:
        """Batches of at most `batch_size` texts, short ones first: lists of groups with one prompt, as positions."""
        by_prompt: dict[tuple[Message, ...], list[int]] = {}
        for position in rendered:
            by_prompt.setdefault(conversations[position].messages[:-1], []).append(position)
        groups = [
            positions[start : start + self.batch_size]
            for positions in by_prompt.values()
            for start in range(0, len(positions), self.batch_size)
        ]
        groups.sort(key=lambda group: (max(len(rendered[position]) for position in group), group[0]))
        batch: list[list[int]] = []
        for group in groups:
            if batch and sum(map(len, batch)) + len(group) > self.batch_size:
                yield batch
                batch = []
            batch.append(group)
        if batch:
            yield batch

    @torch.no_grad()
    def forward(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Raw scores `(batch,)` in float32 of token ids, padded on the right."""
        device = next(self.module.parameters()).device
        input_ids, attention_mask = pad_right(sequences, pad_token_id=self.module.config.pad_token_id)
        logits = self._run(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)).logits
        return logits.squeeze(-1).float().cpu()

    @torch.no_grad()
    def forward_packed(self, groups: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Raw scores `(n,)` in float32 of the texts of all groups; each group's common beginning is computed once."""
        device = next(self.module.parameters()).device
        if self._attends_by_text and all(len(group) == 1 for group in groups):
            row = row_of([text for (text,) in groups], device=device)
            with attending_by_text(self.module):
                outputs = outputs_of_head(self._run, self.module.score, row)[0]
            return outputs[torch.tensor(row["text_lengths"]).cumsum(dim=0) - 1].squeeze(-1).float().cpu()
        hidden_size = self.module.config.get_text_config().hidden_size
        packed = pack(
            [Group.of(texts) for texts in groups],
            pad_token_id=self.module.config.pad_token_id,
            hidden_size=hidden_size,
        )
        return packed_scores(self._run, self.module.score, packed.to(device)).cpu()


def pad_right(sequences: Sequence[Sequence[int]], *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both `(batch, longest)`; True counts."""
    longest = max(len(ids) for ids in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id, dtype=torch.long)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.long)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, : len(ids)] = 1
    return input_ids, attention_mask
