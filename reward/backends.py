"""Chat models that judges speak through: `ChatBackend`, in process with transformers, and scripted for tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from reward.checkpoint import adapter_base, model_file
from reward.conversation import Prompt
from reward.dtype import Dtype, Quantization, quantization_config, torch_dtype
from reward.render import Renderer

if TYPE_CHECKING:
    from reward.continuations import PrefixCache

CUT_OFF = " [cut off]"
"""Stands behind a text that ran into `max_new_tokens`, so that half a text never reads like a whole one."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What stands in place of a result that one prompt did not get. `transient`: another time it might."""

    reason: str
    transient: bool = False


_SAMPLED = 64
"""Values of each weight tensor that a fingerprint looks at."""


@runtime_checkable
class ChatBackend(Protocol):
    """A chat model. Results come one per prompt, in order, never a stand-in.

    What concerns one prompt alone is its `Failure`; what concerns them all (no such model) is an exception.
    """

    def num_tokens(self, prompt: Prompt) -> int:
        """Length of the rendered prompt, up to where the assistant would start to write."""
        ...

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> Sequence[str | Failure]:
        """The assistant's most likely answer to each prompt; one that was cut off ends with `CUT_OFF`."""
        ...

    def choice_logprobs(
        self, prompts: Sequence[Prompt], prefix: str, choices: Sequence[str]
    ) -> Sequence[list[float] | Failure]:
        """`log P(choice | prompt, prefix)` per prompt and choice, where the assistant's answer begins with `prefix`."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A back end that can tell which model it speaks for."""

    @property
    def fingerprint(self) -> str:
        """A text that changes with the model."""
        ...


@dataclass(frozen=True)
class TransformersBackend:
    """A causal language model in this process. Deterministic: greedy, and independent of how prompts are batched.

    `shared_prefix`: log-probabilities compute what all prompts begin with once (same numbers, faster).
    """

    model: Any
    renderer: Renderer
    batch_size: int = 8
    shared_prefix: bool = True

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: Dtype = "bfloat16",
        batch_size: int = 8,
        device: str | None = None,
        chat_template: str | None = None,
        quantization: Quantization | None = None,
        shared_prefix: bool = True,
    ) -> TransformersBackend:
        """Load a chat model, or a LoRA adapter on its base, from a folder or hub id.

        `device` None takes the GPU when there is one; `chat_template` takes the place of the tokenizer's own. Weights
        come from safetensors alone and no code of the repository runs.
        """
        import torch
        import transformers

        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        base = adapter_base(path)
        auto_tokenizer: Any = transformers.AutoTokenizer
        auto_model: Any = transformers.AutoModelForCausalLM
        has_own = base is None or model_file(str(path), "tokenizer_config.json") is not None
        tokenizer = auto_tokenizer.from_pretrained(path if has_own else base)
        tokenizer.chat_template = chat_template or tokenizer.chat_template
        renderer = Renderer(tokenizer, name=str(path))  # refuses a tokenizer before any weight loads
        settings: dict[str, Any] = {"dtype": torch_dtype(dtype, device), "use_safetensors": True}
        if quantization is not None:
            settings |= {
                "quantization_config": quantization_config(quantization, dtype, device),
                "device_map": {"": device},
            }
        model = auto_model.from_pretrained(base or path, **settings)
        if base is not None:
            model.load_adapter(str(path))
        # A checkpoint may ship a temperature or a repetition penalty, which would seep into every `generate`.
        model.generation_config = transformers.GenerationConfig()
        # Quantized weights are on their device, and cannot be moved.
        model = model if quantization else model.to(device)
        return cls(model.eval(), renderer, batch_size, shared_prefix)

    def num_tokens(self, prompt: Prompt) -> int:
        return len(self.renderer.render_prompt(prompt))

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str]:
        import torch

        from reward.continuations import pad_left

        rows = [self.renderer.render_prompt(prompt) for prompt in prompts]
        texts = [""] * len(rows)
        for batch in self._batches(rows):
            padded = pad_left([rows[index] for index in batch], pad_token_id=self._pad_id)
            inputs = {name: tensor.to(self.model.device) for name, tensor in padded.items()}
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
        """See `ChatBackend`. Where the tokenizer merges across the seam, the merged token counts with the choices.

        What comes before the prompts' last turns is taken to be the same in all of them, and computed once.
        """
        heads = [self.renderer.render_prompt(prompt) for prompt in prompts]
        if not heads:
            return []
        on_new_line = self.renderer.tokenizer.decode(heads[0][-1:]).endswith("\n")
        start = self.renderer.render_start(prompts[0])
        return self.continuation_logprobs(heads, prefix, choices, behind="\n" if on_new_line else "", start=start)

    def continuation_logprobs(
        self,
        heads: Sequence[list[int]],
        prefix: str,
        choices: Sequence[str],
        *,
        behind: str = "",
        start: Sequence[int] = (),
    ) -> list[list[float]]:
        """`choice_logprobs` behind token ids; `behind`: the text that they end with, where it changes how `prefix` is
        encoded (SentencePiece puts a space in front of a text that follows nothing); `start`: ids that the heads begin
        with, to be computed once. A wrong `start` costs time and changes no number.
        """
        from reward.continuations import Tails, read_whole

        shared, tails = self._split_at_seam(prefix, choices, behind)
        texts = [[*head, *shared] for head in heads]
        if self.why_unshared is None:
            return self._prefix_cache.read(texts, Tails.of(tails), prefix=start, batch_size=self.batch_size)
        return read_whole(self.model, texts, Tails.of(tails), pad_token_id=self._pad_id, batch_size=self.batch_size)

    @cached_property
    def why_unshared(self) -> str | None:
        """Why every prompt is read whole; None where what prompts begin with is computed once and kept."""
        from reward.continuations import why_not_shared

        return why_not_shared(self.model) if self.shared_prefix else "switched off"

    @cached_property
    def _prefix_cache(self) -> PrefixCache:
        from reward.continuations import PrefixCache

        return PrefixCache(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with the weights, of which a sample is taken from every tensor.

        They are rounded to bfloat16, so that a model loaded in it and in float32 has one fingerprint.
        """
        import torch

        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, len(flat) // _SAMPLED)]
            sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
            digest.update(name.encode())
            digest.update(bytes(sample.contiguous().view(torch.uint8).tolist()))
        return digest.hexdigest()[:16]

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

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Indices of rows, longest first (so that a lack of memory shows at once), `batch_size` at a time."""
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for start in range(0, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    @property
    def _pad_id(self) -> int:
        """Any valid id: padding is masked by position, so a tokenizer without a pad token may lend its eos."""
        tokenizer = self.renderer.tokenizer
        return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


@dataclass
class ScriptedBackend:
    """Answers from functions, for tests; `prompts` keeps what was asked. One token is taken to be four characters."""

    reply: Callable[[Prompt], str | Failure] = lambda _: ""
    logprob: Callable[[Prompt, str], float] = lambda _prompt, _text: 0.0
    prompts: list[Prompt] = field(default_factory=list[Prompt])

    def num_tokens(self, prompt: Prompt) -> int:
        return sum(len(message.content) // 4 + 1 for message in prompt.messages)

    def generate(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[str | Failure]:
        del max_new_tokens  # the script decides how long its texts are
        self.prompts.extend(prompts)
        return [self.reply(prompt) for prompt in prompts]

    def choice_logprobs(self, prompts: Sequence[Prompt], prefix: str, choices: Sequence[str]) -> list[list[float]]:
        self.prompts.extend(prompts)
        return [[self.logprob(prompt, prefix + choice) for choice in choices] for prompt in prompts]
