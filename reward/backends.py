"""Chat models that judges speak through: `ChatBackend`, in process with transformers, and scripted for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from reward.conversation import Prompt
from reward.dtype import Dtype, torch_dtype
from reward.render import Renderer

CUT_OFF = " [cut off]"
"""Stands behind a text that ran into `max_new_tokens`, so that half a text never reads like a whole one."""


@runtime_checkable
class ChatBackend(Protocol):
    """A chat model. Results come one per prompt, in order; a failure is an exception, never a stand-in text."""

    def num_tokens(self, prompt: Prompt) -> int:
        """Length of the rendered prompt, up to where the assistant would start to write."""
        ...

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        """The assistant's most likely answer to each prompt; one that was cut off ends with `CUT_OFF`."""
        ...

    def choice_logprobs(self, prompts: Sequence[Prompt], prefix: str, choices: Sequence[str]) -> list[list[float]]:
        """`log P(choice | prompt, prefix)` per prompt and choice, where the assistant's answer begins with `prefix`."""
        ...


@dataclass(frozen=True)
class TransformersBackend:
    """A causal language model in this process. Deterministic: greedy, and independent of how prompts are batched."""

    model: Any
    renderer: Renderer
    batch_size: int = 8

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "bfloat16",
        batch_size: int = 8,
        device: str | None = None,
        chat_template: str | None = None,
    ) -> TransformersBackend:
        """Load a chat model from a folder or hub id; `device` None takes the GPU when there is one.

        `chat_template` takes the place of the tokenizer's own. Weights come from safetensors alone and no code of the
        repository runs.
        """
        import torch
        import transformers

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        auto_tokenizer: Any = transformers.AutoTokenizer
        auto_model: Any = transformers.AutoModelForCausalLM
        tokenizer = auto_tokenizer.from_pretrained(path)
        tokenizer.chat_template = chat_template or tokenizer.chat_template
        renderer = Renderer(tokenizer, name=str(path))  # refuses a tokenizer before any weight loads
        model = auto_model.from_pretrained(path, dtype=torch_dtype(dtype, device), use_safetensors=True)
        # A checkpoint may ship a temperature or a repetition penalty, which would seep into every `generate`.
        model.generation_config = transformers.GenerationConfig()
        return cls(model.to(device).eval(), renderer, batch_size)

    def num_tokens(self, prompt: Prompt) -> int:
        return len(self.renderer.render_prompt(prompt))

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        import torch

        rows = [self.renderer.render_prompt(prompt) for prompt in prompts]
        texts = [""] * len(rows)
        for batch in self._batches(rows):
            inputs = self._pad_left([rows[index] for index in batch])
            with torch.inference_mode():
                output = self.model.generate(
                    **inputs,
                    do_sample=False,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=sorted(self.renderer.end_ids),
                    pad_token_id=self._pad_id,
                )
            width = inputs["input_ids"].shape[1]
            for index, ids in zip(batch, output[:, width:].tolist(), strict=True):
                text, ended = self.renderer.decode(ids)
                texts[index] = text if ended else text + CUT_OFF
        return texts

    def choice_logprobs(self, prompts: Sequence[Prompt], prefix: str, choices: Sequence[str]) -> list[list[float]]:
        """See `ChatBackend`. Where the tokenizer merges across the seam, the merged token counts with the choices."""
        return self.continuation_logprobs([self.renderer.render_prompt(prompt) for prompt in prompts], prefix, choices)

    def continuation_logprobs(
        self, heads: Sequence[list[int]], prefix: str, choices: Sequence[str], *, behind: str = ""
    ) -> list[list[float]]:
        """`choice_logprobs` behind token ids; `behind`: the text that they end with, where it changes how `prefix` is
        encoded (SentencePiece puts a space in front of a text that follows nothing)."""
        shared, continuations = self._split_at_seam(prefix, choices, behind)
        rows = [([*head, *shared], tail) for head in heads for tail in continuations]
        logprobs = [0.0] * len(rows)
        for batch in self._batches([[*ids, *tail] for ids, tail in rows]):
            values = self._tail_logprobs([rows[index] for index in batch])
            for index, value in zip(batch, values, strict=True):
                logprobs[index] = value
        width = len(continuations)
        return [logprobs[start : start + width] for start in range(0, len(logprobs), width)]

    def _split_at_seam(self, prefix: str, choices: Sequence[str], behind: str) -> tuple[list[int], list[list[int]]]:
        """Ids that prefix and all `prefix + choice` begin with, and what follows them in each choice."""
        if not choices or not all(choices):
            raise ValueError(f"choices must be texts that are not empty, got {list(choices)}")
        encode = self.renderer.tokenizer.encode
        rows: list[list[int]] = [encode(behind + prefix + choice, add_special_tokens=False) for choice in choices]
        columns = zip(encode(behind + prefix, add_special_tokens=False), *rows, strict=False)
        seam = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
        start = len(encode(behind, add_special_tokens=False)) if behind else 0
        return rows[0][start:seam], [row[seam:] for row in rows]

    def _tail_logprobs(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Summed log-probability of the second list of ids behind the first, per row."""
        import torch

        inputs = self._pad_left([[*head, *tail] for head, tail in rows])
        longest = max(len(tail) for _, tail in rows)
        with torch.inference_mode():
            # Padded on the left, all tails end in the last column: the logits of the other positions are never made.
            logits = self.model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits
            steps = logits[:, :-1].float().log_softmax(dim=-1)
            targets = inputs["input_ids"][:, -longest:]
            chosen = steps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            return [float(row[longest - len(tail) :].sum()) for row, (_, tail) in zip(chosen, rows, strict=True)]

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of rows, longest first (so that a lack of memory shows at once), `batch_size` at a time."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def _pad_left(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        import torch

        width = max(len(row) for row in rows)
        ids = torch.tensor([[self._pad_id] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: tensor.to(self.model.device) for name, tensor in inputs.items()}

    @property
    def _pad_id(self) -> int:
        """Any valid id: padding is masked by position, so a tokenizer without a pad token may lend its eos."""
        tokenizer = self.renderer.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@dataclass
class ScriptedBackend:
    """Answers from functions, for tests; `prompts` keeps what was asked. One token is taken to be four characters."""

    reply: Callable[[Prompt], str] = lambda _: ""
    logprob: Callable[[Prompt, str], float] = lambda _prompt, _text: 0.0
    prompts: list[Prompt] = field(default_factory=list[Prompt])

    def num_tokens(self, prompt: Prompt) -> int:
        return sum(len(message.content) // 4 + 1 for message in prompt.messages)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        del max_new_tokens  # the script decides how long its texts are
        self.prompts.extend(prompts)
        return [self.reply(prompt) for prompt in prompts]

    def choice_logprobs(self, prompts: Sequence[Prompt], prefix: str, choices: Sequence[str]) -> list[list[float]]:
        self.prompts.extend(prompts)
        return [[self.logprob(prompt, prefix + choice) for choice in choices] for prompt in prompts]
