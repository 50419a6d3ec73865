"""Harmfulness as a person grades it, 0 to 4: the text that such models read, the scorer, the rows they learn from.

After Safety-Tuned LLaMAs (Bianchi et al. 2023, arXiv 2309.07875), whose two regressors are read by their hub ids. A
model is a stock sequence classifier with one output; its raw output is the grade, higher is more harmful.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward.checkpoint import check_harmfulness_model
from reward.conversation import Conversation, Graded, Role
from reward.families import Inputs, Loading, TokenScorer, label_scorer, sequence_classifier, text_limit
from reward.model import pad_right
from reward.scorer import Scale, Score, ScorerError
from reward.slots import disarmer

TruncationSide = Literal["left", "right"]
"""Which end of an over-long text is cut off: `left` keeps the last answer, `right` the first question."""
StartProgress = Callable[[str, int], Callable[[int], None]]
"""Called with what is done and how many there are; what it returns is called with how many are done."""

MAX_LENGTH = 512
"""Tokens that the published regressors read."""

_NAMES: dict[Role, str] = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
_IN_SAFETENSORS = {"safepaca/absolute-harmfulness-predictor-redteam": "refs/pr/1"}
"""Revisions at which the hub's own conversion stands, of models whose main branch holds a pickle."""
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def transcript(conversation: Conversation) -> str:
    """Every turn behind a blank line and its speaker's name, as in Anthropic's transcripts; a system turn has none.

    Names that open a line of the content are disarmed, so that content forges no turns.
    """
    disarm = disarmer(line_start=("Human:", "Assistant:"))
    return "".join(f"\n\n{_NAMES[turn.role]}{disarm(turn.content)}" for turn in conversation.messages)


@dataclass(frozen=True)
class TranscriptEncoder:
    """Transcripts as token ids between the special tokens that the tokenizer puts around one text.

    Where it puts none at the end (decoders), the eos token is added, at which the grade is then read. Of a text over
    `max_length` tokens, special ones included, the end at `truncation_side` is cut off.
    """

    tokenizer: Any
    max_length: int
    truncation_side: TruncationSide
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, *, max_length: int, truncation_side: TruncationSide) -> TranscriptEncoder:
        """ScorerError when no room is left for the text, or when the end of a text would look like padding."""
        probe = tokenizer("a", return_special_tokens_mask=True)
        ids, is_special = list(probe["input_ids"]), list(probe["special_tokens_mask"])
        start, stop = is_special.index(0), len(ids) - is_special[::-1].index(0)
        after = ids[stop:] or [tokenizer.eos_token_id]
        if tokenizer.pad_token_id is None or after[-1] in (None, tokenizer.pad_token_id):
            raise ScorerError("the tokenizer needs a token that ends a text, and another one to pad with")
        encoder = cls(tokenizer, max_length, truncation_side, tuple(ids[:start]), tuple(after))
        if encoder.room < 1:
            raise ScorerError(f"max_length {max_length} leaves no room for a text")
        return encoder

    @property
    def room(self) -> int:
        """Tokens that are left for the text itself."""
        return self.max_length - len(self.before) - len(self.after)

    def encode(self, conversation: Conversation) -> tuple[list[int], int]:
        """Ids of what is read of a conversation, at most `max_length`, and the length of the whole."""
        disarm = disarmer(anywhere=self.tokenizer.all_special_tokens)
        text = self.tokenizer(disarm(transcript(conversation)), add_special_tokens=False, verbose=False)["input_ids"]
        cut = text[-self.room :] if self.truncation_side == "left" else text[: self.room]
        return [*self.before, *cut, *self.after], len(self.before) + len(text) + len(self.after)


@dataclass(frozen=True)
class AbsoluteHarmfulness:
    """A harmfulness model as a scorer: the value is the negated grade, so that higher is better, as everywhere.

    A grade is no probability. With a `threshold`, above which a grade counts as unsafe, the value is
    `threshold - grade` on the logit scale, so that its sigmoid is under 0.5 there, for stages that need a 0-1 score.
    Of an over-long text one end is cut off, as the encoder says, and the score's `reason` tells so.
    """

    part: TokenScorer
    encoder: TranscriptEncoder
    threshold: float | None = None
    progress: StartProgress | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        truncation_side: TruncationSide | None = None,
        max_length: int | None = None,
        threshold: float | None = None,
        progress: StartProgress | None = None,
        loading: Loading | None = None,
    ) -> AbsoluteHarmfulness:
        """A folder or hub id. ScorerError, before weights load, for what is no classifier with one output.

        `truncation_side`, `max_length` (in place of that of `loading`) None: as the model was trained. The published
        ones, and all that say nothing of it, are read as by their makers' code: the first 512 tokens.
        """
        checkpoint = check_harmfulness_model(_folder(str(model), revision))
        trained: dict[str, Any] = {"truncation_side": "right", "max_length": MAX_LENGTH, **checkpoint.harmfulness}
        loading = loading or Loading()
        loading = replace(
            loading, name=loading.name or Path(model).name, max_length=max_length or trained["max_length"]
        )
        module, tokenizer = sequence_classifier(checkpoint, loading)
        try:
            encoder = TranscriptEncoder.of(
                tokenizer,
                max_length=text_limit(module.config, tokenizer, loading.max_length),
                truncation_side=truncation_side or trained["truncation_side"],
            )
        except ScorerError as error:
            raise ScorerError(f"{model}: {error}") from error
        module.config.pad_token_id = tokenizer.pad_token_id

        def encode(conversation: Conversation) -> Inputs:
            return {"input_ids": encoder.encode(conversation)[0]}

        part = label_scorer(checkpoint, loading, module, tokenizer, encode, None)
        return cls(replace(part, scale="unbounded"), encoder, threshold, progress)

    @property
    def name(self) -> str:
        return self.part.name

    @property
    def scale(self) -> Scale:
        return "unbounded" if self.threshold is None else "logit"

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """`threshold - grade`, or `-grade`, in order; unscored where the model gave no finite number."""
        zero = self.threshold or 0.0
        scores = self.grade(conversations)
        return [score if score.value is None else replace(score, value=zero - score.value) for score in scores]

    def grade(self, conversations: Sequence[Conversation]) -> list[Score]:
        """The raw outputs, in order: higher is more harmful, 0 to 4 up to the error of a regression."""
        encoded = [self.encoder.encode(conversation) for conversation in conversations]
        report = None if self.progress is None else self.progress(f"{self.name}: texts", len(encoded))
        scores = self.part.score_inputs([{"input_ids": ids} for ids, _ in encoded], progress=report)
        return [
            score if score.value is None or whole <= len(ids) else replace(score, reason=self._cut(len(ids), whole))
            for score, (ids, whole) in zip(scores, encoded, strict=True)
        ]

    def _cut(self, read: int, whole: int) -> str:
        kept = "last" if self.encoder.truncation_side == "left" else "first"
        return f"only the {kept} {read} of {whole} tokens were read"


def _folder(model: str, revision: str | None) -> str:
    """A model's folder; of a hub id its small files and safetensors alone, fetched on first use."""
    if Path(model).is_dir():
        if revision is not None:
            raise ScorerError(f"{model} is a folder; `revision` is for models on the hub, leave it out")
        return model
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model, revision=revision or _IN_SAFETENSORS.get(model), allow_patterns=list(_FILES))
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ScorerError(f"{model} is no folder, and the hub does not give it ({first})") from error


# -------------------------------------------------------------------------------------------------- training


def tokenize_graded(graded: Sequence[Graded], encoder: TranscriptEncoder) -> tuple[list[dict[str, Any]], list[int]]:
    """Rows for `GradeCollator`, and the positions of texts that were cut."""
    rows: list[dict[str, Any]] = []
    cut: list[int] = []
    for position, item in enumerate(graded):
        ids, whole = encoder.encode(item.conversation)
        rows.append({"input_ids": ids, "grade": float(item.grade), "length": len(ids)})
        if whole > len(ids):
            cut.append(position)
    return rows, cut


@dataclass(frozen=True)
class GradeCollator:
    """Rows -> `input_ids` and `attention_mask`, `(batch, longest)`, padded on the right, and `grades`, `(batch,)`."""

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        input_ids, attention_mask = pad_right([row["input_ids"] for row in rows], pad_token_id=self.pad_token_id)
        grades = torch.tensor([row["grade"] for row in rows], dtype=torch.float32)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "grades": grades}
