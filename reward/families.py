"""Reward models of other makers as scorers: own tokenizer, own form of the text, own head (see `reward.checkpoint`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reward.checkpoint import (
    BEAVER_HEAD,
    HEAD_NAMES,
    VALUE_HEAD,
    Checkpoint,
    Direction,
    Family,
    check_checkpoint,
    model_file,
)
from reward.conversation import Conversation, Message, Role
from reward.dtype import Dtype, torch_dtype
from reward.model import RewardModel
from reward.render import Renderer, TooLong
from reward.scorer import NegatedScorer, Scale, Score, Scorer, ScorerError
from reward.slots import disarmer

ReadAt = Literal["end_of_turn", "end_of_template"]
"""Where a chat model's score is read: at the end-of-turn token, or behind all that its template writes after it."""

Inputs = Mapping[str, list[int]]
"""What the model reads of one conversation: `input_ids` and, for encoders that have them, `token_type_ids`."""


@dataclass(frozen=True)
class Loading:
    """How to load and run a model."""

    dtype: Dtype = "bfloat16"
    device: str | torch.device = "cpu"
    name: str | None = None
    batch_size: int = 16
    max_length: int = 4096
    shared_prefix: bool = True
    """Answers to one prompt share its computation, where the family and architecture can (see `RewardModel`)."""
    trust_remote_code: bool = False
    read_at: ReadAt | None = None
    """None: as the family is trained, `end_of_turn` for classifiers and `end_of_template` for value heads."""


def load_reward_model(
    model: str | Path,
    *,
    family: Family | Literal["auto"] = "auto",
    direction: Direction = "higher",
    label: int | str | None = None,
    loading: Loading | None = None,
) -> Scorer:
    """A folder or hub id as a scorer. ScorerError, before weights load, for what is no reward model of a known family.

    `direction` "lower": the model measures cost or harm, its scores are negated. `label`: the output that is meant of a
    classifier with several.
    """
    loading = loading or Loading()
    checkpoint, found = check_checkpoint(model, family=family, direction=direction, label=label)
    scorer: Scorer
    match found:
        case "classifier":
            scorer = _classifier(checkpoint, label, loading)
        case "pair":
            scorer = _pair(checkpoint, label, loading)
        case "value_head":
            scorer = _value_head(checkpoint, loading)
        case "beaver":
            scorer = _beaver(checkpoint, loading)
    return NegatedScorer(scorer) if direction == "lower" else scorer


@dataclass(frozen=True)
class TokenScorer:
    """A model that reads token ids and gives one number: what the families share.

    `encode` makes the inputs of one conversation, `read` maps a right-padded batch of them to raw scores `(batch,)`.
    """

    name: str
    tokenizer: Any
    encode: Callable[[Conversation], Inputs]
    read: Callable[[dict[str, Tensor]], Tensor]
    head: Tensor
    """Weights of the regression head, `(1, hidden size)`."""
    dtype: torch.dtype
    batch_size: int
    max_length: int
    scale: Scale = "logit"

    def token_ids(self, conversation: Conversation) -> list[int]:
        """What the model reads."""
        return self.encode(conversation)["input_ids"]

    def score(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Raw scores, in order. A text over `max_length` tokens and a number that is not finite are unscored."""
        return self.score_inputs([self.encode(conversation) for conversation in conversations])

    def score_inputs(self, texts: Sequence[Inputs], *, progress: Callable[[int], None] | None = None) -> list[Score]:
        """`score` of what `encode` gave; `progress` is called with the number of texts read, after every batch."""
        scores: dict[int, Score] = {}
        encoded: dict[int, Inputs] = {}
        for position, inputs in enumerate(texts):
            length = len(inputs["input_ids"])
            if length > self.max_length:
                scores[position] = Score(None, str(TooLong(length, self.max_length)))
            else:
                encoded[position] = inputs
        order = sorted(encoded, key=lambda position: (len(encoded[position]["input_ids"]), position))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            for position, value in zip(batch, self._values([encoded[i] for i in batch]), strict=True):
                known = torch.isfinite(value).item()
                scores[position] = Score(value.item()) if known else Score(None, f"the model gave {value.item()}")
            if progress is not None:
                progress(min(start + self.batch_size, len(order)))
        return [scores[position] for position in range(len(texts))]

    @torch.inference_mode()
    def _values(self, rows: Sequence[Inputs]) -> Tensor:
        longest = max(len(row["input_ids"]) for row in rows)
        padding = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": 0}
        batch = {
            key: torch.tensor([[*row[key], *[padding[key]] * (longest - len(row[key]))] for row in rows])
            for key in rows[0]
        }
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < lengths).long()
        return self.read({key: tensor.to(self.head.device) for key, tensor in batch.items()}).float().cpu()


# --------------------------------------------------------------------------------------------- classifiers


def _classifier(checkpoint: Checkpoint, label: int | str | None, loading: Loading) -> Scorer:
    """A stock classifier that reads its chat template; with one output it is a `RewardModel`."""
    keep_tail = loading.read_at == "end_of_template"
    index = checkpoint.label_index(label)
    if index is None:
        return RewardModel.load(
            checkpoint.model,
            dtype=loading.dtype,
            device=loading.device,
            name=loading.name,
            batch_size=loading.batch_size,
            max_length=loading.max_length,
            shared_prefix=loading.shared_prefix,
            keep_tail=keep_tail,
            trust_remote_code=loading.trust_remote_code,
        )
    module, tokenizer = sequence_classifier(checkpoint, loading)
    renderer = _renderer(checkpoint, tokenizer, keep_tail=keep_tail)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in renderer.end_ids:
        raise ScorerError(f"{checkpoint.model}: pad token must be set and differ from eos, else the end is not found")
    module.config.pad_token_id = tokenizer.pad_token_id
    return label_scorer(checkpoint, loading, module, tokenizer, lambda c: {"input_ids": renderer.render_ids(c)}, index)


def _pair(checkpoint: Checkpoint, label: int | str | None, loading: Loading) -> Scorer:
    """An encoder on (what was asked, answer), each a text; see `pair_texts`."""
    module, tokenizer = sequence_classifier(checkpoint, loading)
    disarm = disarmer(anywhere=tokenizer.all_special_tokens)

    def encode(conversation: Conversation) -> Inputs:
        question, answer = pair_texts(conversation)
        encoded = tokenizer(disarm(question), disarm(answer), return_attention_mask=False)
        return {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}

    index = checkpoint.label_index(label)
    return label_scorer(checkpoint, loading, module, tokenizer, encode, index)


def pair_texts(conversation: Conversation) -> tuple[str, str]:
    """Question and answer. One question stands alone, as these models are trained; of a longer dialogue each turn
    stands behind its speaker's name, a system turn without one, a blank line between them.
    """
    *before, answer = conversation.messages
    if len(before) == 1:
        return before[0].content, answer.content
    names: dict[Role, str] = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    disarm = disarmer(line_start=("Human:", "Assistant:"))
    return "\n\n".join(names[turn.role] + disarm(turn.content) for turn in before), answer.content


def sequence_classifier(checkpoint: Checkpoint, loading: Loading) -> tuple[Any, Any]:
    """The frozen module of a stock classifier, and its tokenizer."""
    from transformers import AutoModelForSequenceClassification

    one = {"num_labels": 1} if checkpoint.num_outputs() in (None, 1) else {}
    return _load(AutoModelForSequenceClassification, checkpoint, loading, **one), _tokenizer(checkpoint, loading)


def label_scorer(
    checkpoint: Checkpoint,
    loading: Loading,
    module: Any,
    tokenizer: Any,
    encode: Callable[[Conversation], Inputs],
    index: int | None,
) -> TokenScorer:
    """One output of a classifier, read as transformers' own pipeline does: of several that exclude each other (the
    default) the log-odds, of independent ones or regressions the output itself.
    """
    problem = module.config.problem_type
    exclusive = index is not None and problem in (None, "single_label_classification")
    regression = index is not None and problem == "regression"

    def read(batch: dict[str, Tensor]) -> Tensor:
        logits = module(**batch).logits.float()
        column = logits[:, index or 0]
        if not exclusive:
            return column
        others = [i for i in range(logits.shape[1]) if i != index]
        return column - logits[:, others].logsumexp(dim=-1)

    head = next(child for name, child in module.named_children() if name in HEAD_NAMES)
    return TokenScorer(
        name=loading.name or Path(checkpoint.model).name,
        tokenizer=tokenizer,
        encode=encode,
        read=read,
        head=next(head.parameters()),
        dtype=module.dtype,
        batch_size=loading.batch_size,
        max_length=text_limit(module.config, tokenizer, loading.max_length),
        scale="unbounded" if regression else "logit",
    )


# ------------------------------------------------------------------------------------- heads on a causal trunk


def _value_head(checkpoint: Checkpoint, loading: Loading) -> Scorer:
    """`v_head.summary` on the hidden state of the last token that the chat template writes.

    The trunk is the model without its next-token head; of an adapter, the base model with the adapter switched on.
    """
    from transformers import AutoModel

    tokenizer = _tokenizer(checkpoint, loading)
    renderer = _renderer(checkpoint, tokenizer, keep_tail=loading.read_at != "end_of_turn")
    tensors = _tensors(checkpoint.value_head, f"{VALUE_HEAD}.")
    trunk = _load(AutoModel, checkpoint, loading)
    return _head_scorer(checkpoint, loading, trunk, tokenizer, lambda c: {"input_ids": renderer.render_ids(c)}, tensors)


def _beaver(checkpoint: Checkpoint, loading: Loading) -> Scorer:
    """safe-rlhf's score head, read at the eos token behind the answer; see `beaver_rounds` for the text."""
    from transformers import AutoModel

    tokenizer = _tokenizer(checkpoint, loading)
    if tokenizer.eos_token_id is None:
        raise ScorerError(f"{checkpoint.model}: the tokenizer has no eos token, at which a beaver score is read")
    disarm = disarmer(anywhere=tokenizer.all_special_tokens)
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

    def encode(conversation: Conversation) -> Inputs:
        ids = list(first)
        for text in beaver_rounds(conversation.messages):
            ids += [*tokenizer.encode(disarm(text), add_special_tokens=False), tokenizer.eos_token_id]
        return {"input_ids": ids}

    file = model_file(checkpoint.model, checkpoint.weights[f"{BEAVER_HEAD}.weight"])
    tensors = _tensors(file, f"{BEAVER_HEAD}.")
    trunk = _load(AutoModel, checkpoint, loading)
    return _head_scorer(checkpoint, loading, trunk, tokenizer, encode, tensors, _normaliser(checkpoint))


def beaver_rounds(messages: Sequence[Message]) -> list[str]:
    """safe-rlhf's text of a conversation, one item per question and answer; each is followed by the eos token.

    A system turn, which safe-rlhf does not know, goes in front of the first question.
    """
    disarm = disarmer(anywhere=("BEGINNING OF CONVERSATION:", "USER:", "ASSISTANT:"))
    system = f"{disarm(messages[0].content)}\n\n" if messages[0].role == "system" else ""
    turns = [disarm(message.content) for message in messages if message.role != "system"]
    rounds = [f"USER: {question} ASSISTANT:{answer}" for question, answer in zip(turns[::2], turns[1::2], strict=True)]
    rounds[0] = f"BEGINNING OF CONVERSATION: USER: {system}{rounds[0].removeprefix('USER: ')}"
    return rounds


def _normaliser(checkpoint: Checkpoint) -> Callable[[Tensor], Tensor]:
    """safe-rlhf's normaliser where its config switches it on: reward models shift and scale, cost models scale."""
    config = checkpoint.config
    if not config.get("do_normalize"):
        return lambda scores: scores
    name = "normalizer.mean"
    stored: dict[str, Tensor] = {}
    if name in checkpoint.weights:
        stored = _tensors(model_file(checkpoint.model, checkpoint.weights[name]), "normalizer.")
    mean = stored.get("mean", torch.tensor(config.get("mean") or [0.0])).float()
    deviation = stored.get("var", torch.tensor(config.get("var") or [1.0])).float().sqrt() + 1e-8
    shift = mean if config.get("score_type", "reward") == "reward" else torch.zeros_like(mean)
    return lambda scores: (scores - shift.to(scores.device)) / deviation.to(scores.device)


def _head_scorer(
    checkpoint: Checkpoint,
    loading: Loading,
    trunk: Any,
    tokenizer: Any,
    encode: Callable[[Conversation], Inputs],
    head: Mapping[str, Tensor],
    normalise: Callable[[Tensor], Tensor] = lambda scores: scores,
) -> TokenScorer:
    """A linear head, computed in float32, on the last token's final hidden state."""
    weight = head["weight"].float().to(loading.device)
    bias = head["bias"].float().to(loading.device) if "bias" in head else torch.zeros(1, device=loading.device)

    def read(batch: dict[str, Tensor]) -> Tensor:
        hidden = trunk(**batch, use_cache=False).last_hidden_state
        last = batch["attention_mask"].sum(dim=-1) - 1
        states = hidden[torch.arange(len(last), device=hidden.device), last].float()
        return normalise(states @ weight[0] + bias)

    return TokenScorer(
        name=loading.name or Path(checkpoint.model).name,
        tokenizer=tokenizer,
        encode=encode,
        read=read,
        head=weight,
        dtype=trunk.dtype,
        batch_size=loading.batch_size,
        max_length=text_limit(trunk.config, tokenizer, loading.max_length),
    )


# --------------------------------------------------------------------------------------------------- parts


def _load(auto_class: Any, checkpoint: Checkpoint, loading: Loading, **settings: Any) -> Any:
    """The model, frozen, on its device; ScorerError when a weight is missing, which transformers makes up at random."""
    module, info = auto_class.from_pretrained(
        checkpoint.model,
        dtype=torch_dtype(loading.dtype, loading.device),
        use_safetensors=True,
        trust_remote_code=loading.trust_remote_code,
        output_loading_info=True,
        **settings,
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ScorerError(f"{checkpoint.model} lacks weights, which would be random: {', '.join(missing[:3])}")
    return module.to(loading.device).eval().requires_grad_(False)


def _tokenizer(checkpoint: Checkpoint, loading: Loading) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint.model, trust_remote_code=loading.trust_remote_code)


def _renderer(checkpoint: Checkpoint, tokenizer: Any, *, keep_tail: bool) -> Renderer:
    try:
        return Renderer(tokenizer, name=checkpoint.model, keep_tail=keep_tail)
    except ValueError as error:
        raise ScorerError(str(error)) from error


def _tensors(file: Path | None, prefix: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose names begin with `prefix`, without it."""
    from safetensors import safe_open

    if file is None:
        return {}
    with safe_open(file, framework="pt") as handle:
        names: list[str] = list(handle.keys())
        return {name.removeprefix(prefix): handle.get_tensor(name) for name in names if name.startswith(prefix)}


def text_limit(config: Any, tokenizer: Any, max_length: int) -> int:
    """The longest text in tokens: absolute positions end where the model's table of them ends."""
    positions = getattr(config, "max_position_embeddings", None) or max_length
    return min(max_length, positions, tokenizer.model_max_length)
