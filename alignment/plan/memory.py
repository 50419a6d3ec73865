"""Bytes on one GPU, by counting. Pure arithmetic: sizes in, bytes out.

Activations are counted as autograd keeps them for a Llama layer of transformers under PyTorch's scaled-dot-product
attention; other decoders differ by a few tensors. Weights, gradients and optimizer states are exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignment.plan.layout import Layout
from alignment.plan.shapes import ModelShape
from alignment.recipe_parts import ModelInit

GIB = 2**30
"""A "GB" of a plan, as GPU makers count memory."""

CONTEXT = int(1.5 * GIB)
"""Assumed for the CUDA context, NCCL's buffers and the workspaces of libraries."""

USABLE = 0.95
"""Assumed share of the memory that the allocator can fill before fragments stop it."""

BUCKET = 500_000_000
"""Elements of DeepSpeed's buckets for reducing gradients and gathering weights (its defaults)."""

LIVE = 1_000_000_000
"""Elements of gathered weights that ZeRO-3 keeps at a time, and of an optimizer step of its (its defaults)."""

PACK = 2**30
"""Bytes above which vLLM sends a pack of weights on its way (its default); the next is made meanwhile."""

MASTER_AND_MOMENTS = 4 + 4 + 4
"""Bytes a parameter of DeepSpeed's optimizer: weights and two moments in float32."""

_PACKED = {"int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Bytes of a quantized weight with its scales."""

_TILE = (4096, 32768)
"""Tokens and words of the logits that TRL's fused head has at a time."""


@dataclass(frozen=True, slots=True)
class Numerics:
    """Bytes of a weight (and of the residual stream), of what linear layers read and give, and of an adapter weight."""

    weight: int
    compute: int
    adapter: int
    autocast: bool = False

    @classmethod
    def of(cls, init: ModelInit, layout: Layout, *, trainer: bool = False) -> Numerics:
        """`trainer`: under transformers' Trainer, which computes in bfloat16 when the weights are."""
        own = dtype_bytes(init.dtype, on_cpu=layout.on_cpu)
        if layout.deepspeed:
            own = 2 if layout.bf16 else own
            return cls(own, own, own)
        autocast = layout.bf16 or (trainer and own == 2)
        return cls(own, 2 if autocast else own, 4, autocast)

    @property
    def casts_for_adapters(self) -> int:
        """Bytes of the copies that adapters make of what they read, each for itself; 0 when they read it as it is."""
        if self.adapter == self.weight:
            return 0
        return self.compute if self.autocast else self.adapter


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model as one process holds it. `tuning`: what of it learns; `tuned_layers`: how many layers, from the top.

    `sharded`: of a model that is only read, each process holds a part (ZeRO-3).
    """

    name: str
    source: str
    shape: ModelShape
    numerics: Numerics
    tuning: Literal["full", "lora"] | None = None
    tuned_layers: int = 0
    quantization: Literal["int8", "nf4"] | None = None
    attention: str = "sdpa"
    sharded: bool = False

    @property
    def reads_rows(self) -> bool:
        """It takes texts behind each other in one row, without padding (`reward.padding_free`)."""
        return self.attention == "sdpa" and self.shape.sees_all

    @property
    def trainable(self) -> int:
        """Parameters that learn, and so have gradients and optimizer states."""
        return {"full": self.shape.parameters, "lora": self.shape.adapter, None: 0}[self.tuning]

    @property
    def trainable_bytes(self) -> int:
        """Of the parameters that learn."""
        if self.tuning != "lora":
            return self.trainable * self.numerics.weight
        head = self.shape.adapter_head
        return (self.shape.adapter - head) * self.numerics.adapter + head * self.numerics.weight

    @property
    def weight_bytes(self) -> int:
        """Of the whole model with its adapter."""
        packed = self.shape.quantizable if self.quantization else 0
        plain = self.shape.parameters - packed
        adapter = self.trainable_bytes if self.tuning == "lora" else 0
        return int(packed * _PACKED.get(self.quantization or "", 0) + plain * self.numerics.weight + adapter)

    @property
    def cast_bytes(self) -> int:
        """The copies of whole weights that autocast makes and keeps for the backward pass."""
        return self.shape.quantizable * self.numerics.compute if self.numerics.compute < self.numerics.weight else 0

    @property
    def adapter_copies(self) -> int:
        """Bytes of the copies that each adapter makes of a number that it reads; 0 without."""
        return self.numerics.casts_for_adapters if self.tuning == "lora" else 0


@dataclass(frozen=True, slots=True)
class Texts:
    """What goes through a model at once. `masked`: padded or packed, so that attention needs a mask."""

    rows: int
    length: int
    masked: bool = True

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, slots=True)
class States:
    """Bytes of a model that stay on a GPU; `gradients` come and go unless `keeps_gradients`."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0
    """Bytes in host memory in their place."""


def dtype_bytes(dtype: str, *, on_cpu: bool = False) -> int:
    """Bytes of a number; `fast` is bfloat16 on a GPU."""
    return 4 if dtype == "float32" or (dtype == "fast" and on_cpu) else 2


def states_of(model: Loaded, layout: Layout) -> States:
    """Weights, gradients and optimizer states of a model in the engine, on one GPU of the layout.

    Quantized weights are not shared out by ZeRO-3.
    """
    trainable, share, weights = model.trainable, layout.gpus, model.weight_bytes
    if layout.zero_stage == 0:
        return States(weights, model.trainable_bytes, 2 * model.trainable_bytes)
    if layout.zero_stage == 3 and model.quantization is None:
        weights //= share
    gradients = trainable * model.numerics.weight // (share if layout.zero_stage >= 2 else 1)
    optimizer = trainable * MASTER_AND_MOMENTS // share
    if not layout.offload_optimizer:
        return States(weights, gradients, optimizer)
    if layout.offload_weights and layout.zero_stage == 3:
        return States(0, 0, 0, host=weights + gradients + optimizer)
    return States(weights, 0, 0, host=gradients + optimizer)


def keeps_gradients(layout: Layout) -> bool:
    """Whether gradients have buffers of their own, which stay when there is nothing to learn from."""
    return layout.zero_stage >= 2


def buckets(models: Sequence[Loaded], layout: Layout) -> int:
    """What the engine keeps to exchange gradients between GPUs; DDP copies them into buckets."""
    if layout.deepspeed and layout.zero_stage > 0:
        return BUCKET * models[0].numerics.compute
    return 0 if layout.gpus == 1 else sum(states_of(model, layout).gradients for model in models)


def live_weights(models: Sequence[Loaded], layout: Layout) -> int:
    """Weights that ZeRO-3 has gathered at a time in a forward or backward pass."""
    if layout.zero_stage < 3:
        return 0
    return min(LIVE, sum(model.shape.parameters for model in models)) * models[0].numerics.weight


def gathered_weights(models: Sequence[Loaded], layout: Layout) -> int:
    """Whole weights of all models of the engine, as ZeRO-3 gathers them to sample."""
    if layout.zero_stage < 3:
        return 0
    return sum(model.weight_bytes for model in models if model.quantization is None)


def packs_of_weights(model: Loaded, layout: Layout) -> int:
    """What sending the weights to a server takes on the main process: a pack on its way, and one that is made.

    The weights that a pack is made of count, too, where they are gathered (ZeRO-3) or merged with an adapter for it. A
    pack ends with the weight that brings it above `PACK`.
    """
    s, size = model.shape, model.numerics.weight
    whole = s.parameters * size
    pack = min(whole, PACK + s.hidden * max(s.vocab, s.intermediate) * size)
    made_for_it = layout.zero_stage == 3 or model.tuning == "lora"
    return min(whole, 2 * pack) + (pack if made_for_it else 0)


def step_bytes(models: Sequence[Loaded], layout: Layout) -> int:
    """What an optimizer step takes for a moment: gradients in float32 and the root of the second moment."""
    if not layout.deepspeed or layout.offload_optimizer:
        return 0  # torch's fused step takes nothing
    own = sum(m.trainable for m in models) // layout.gpus
    return 8 * (min(own, LIVE) if layout.zero_stage == 3 else own)


def layer_activations(model: Loaded, texts: Texts) -> int:
    """What autograd keeps of one layer until its backward pass."""
    s, n = model.shape, model.numerics
    tokens, hidden, wide = texts.tokens, s.hidden, s.intermediate
    norms = 2 * tokens * hidden * (4 + (n.weight if model.tuning == "full" else 0))
    keys = s.heads if texts.masked else s.kv_heads  # under a mask they are repeated for every head
    attention = tokens * s.head_dim * n.compute * (2 * s.heads + 2 * keys) + 4 * tokens * s.heads
    if model.attention == "eager":
        attention += texts.rows * s.heads * texts.length**2 * (4 + n.compute)
    elif texts.masked and not model.attention.startswith("flash"):
        attention += texts.rows * texts.length**2 * n.compute  # the mask as numbers
    inner = (3 if s.gated else 1) * tokens * wide * n.compute
    return norms + attention + inner + _linear_inputs(model, tokens)


def _linear_inputs(model: Loaded, tokens: int) -> int:
    """What linear layers keep of what they read: once for those that read the same, unless each casts it for itself."""
    s, n = model.shape, model.numerics
    if model.adapter_copies:
        width = (5 if s.gated else 4) * s.hidden + s.heads * s.head_dim + s.intermediate
        return tokens * model.adapter_copies * width
    copies = 2 if n.compute == n.weight else (5 if s.gated else 4)
    return tokens * n.compute * (copies * s.hidden + s.intermediate)


def kept_activations(model: Loaded, texts: Texts, *, checkpointing: bool) -> int:
    """What autograd keeps of all layers between their forward and their backward pass.

    With checkpointing, the input of each layer, from which a layer is computed again when its turn comes.
    """
    stream = texts.tokens * model.shape.hidden * model.numerics.weight
    layers = model.shape.num_layers * stream
    if not checkpointing:
        layers = model.tuned_layers * layer_activations(model, texts)
    return layers + _mask(model, texts)


def head_input(model: Loaded, texts: Texts) -> int:
    """What autograd keeps between the last layer and the head: the final norm and what it gives."""
    return texts.tokens * model.shape.hidden * (4 + model.numerics.weight + model.numerics.compute)


def forward_workspace(model: Loaded, texts: Texts) -> int:
    """What one layer takes for a moment when nothing is kept for a backward pass."""
    s, n = model.shape, model.numerics
    copies = model.adapter_copies or (n.compute if model.tuning == "lora" else 0)
    inner = s.intermediate * ((2 if copies else 3 if s.gated else 2) * n.compute + 2 * copies)
    outer = 5 * s.heads * s.head_dim * n.compute
    stream = s.hidden * (2 * n.weight + n.compute + copies)
    return texts.tokens * (max(inner, outer) + stream) + _mask(model, texts) * (1 + n.compute)


def backward_workspace(model: Loaded, texts: Texts, *, checkpointing: bool) -> int:
    """What the backward pass of one layer takes for a moment, with the layer itself where it is computed again."""
    s, n = model.shape, model.numerics
    wide = (2 if s.gated else 1) * n.compute + model.adapter_copies
    gradients = texts.tokens * (s.intermediate * wide + s.hidden * n.weight)
    return gradients + (layer_activations(model, texts) if checkpointing else 0)


def _mask(model: Loaded, texts: Texts) -> int:
    """The mask of attention that all layers read, a byte a pair of tokens."""
    return 0 if model.attention.startswith("flash") or not texts.masked else texts.rows * texts.length**2


@dataclass(frozen=True, slots=True)
class Head:
    """Bytes that a head takes on top of the trunk: at its peak, and until its backward pass."""

    peak: int
    kept: int = 0


def ppo_head(model: Loaded, rows: int, length: int) -> Head:
    """At the peak logits, scaled logits and, in float32, the log-distribution, its exponential and their product."""
    numbers = rows * length * model.shape.vocab
    return Head(numbers * (2 * model.numerics.compute + 12), kept=numbers * 4)


def fused_head(model: Loaded, tokens: int) -> Head:
    """TRL's head for fine-tuning: a tile of logits, and the gradients of hidden states and head in float32."""
    s = model.shape
    weights = s.vocab * s.hidden * 4 if model.tuning == "full" else 0
    tile = min(tokens, _TILE[0]) * _TILE[1]
    return Head(tile * model.numerics.compute + tokens * s.hidden * 4 + weights)


def mix_head(model: Loaded, texts: Texts) -> Head:
    """Logits of the pretraining mix, in float32 and laid out anew, and the log-distribution."""
    numbers = texts.tokens * model.shape.vocab
    return Head(numbers * (model.numerics.compute + 12), kept=numbers * 4)


@dataclass(frozen=True, slots=True)
class Pass:
    """Texts that a model reads, and what its head takes for them."""

    model: Loaded
    texts: Texts
    head: Head = Head(0)


def learning(passes: Sequence[Pass], *, checkpointing: bool) -> tuple[int, int]:
    """Activations and logits at the peak of forward passes, one after another, and one backward pass through all.

    The peak is where a head is at work, or in the first layer of a pass that the backward pass comes to.
    """
    kept = [kept_activations(one.model, one.texts, checkpointing=checkpointing) for one in passes]
    ends = [head_input(one.model, one.texts) for one in passes]
    casts = sum({one.model.name: one.model.cast_bytes for one in passes}.values())
    per_layer = casts // passes[0].model.shape.num_layers if checkpointing else casts
    peaks: list[tuple[int, int]] = []
    for number, one in enumerate(passes):
        heads = sum(earlier.head.kept for earlier in passes[:number])
        peaks.append((sum(kept[: number + 1]) + sum(ends[: number + 1]) + casts, heads + one.head.peak))
        in_layer = backward_workspace(one.model, one.texts, checkpointing=checkpointing) + per_layer
        in_layer += _waiting_gradients(passes, number)
        peaks.append((sum(kept[: number + 1]) + sum(ends[:number]) + in_layer, heads))
    return max(peaks, key=sum)


def _waiting_gradients(passes: Sequence[Pass], number: int) -> int:
    """Gradients that autograd holds back, since the same weights have to come up in this pass again."""
    names = {one.model.name for one in passes[: number + 1]}
    waiting = {one.model.name: one.model.trainable_bytes for one in passes[number + 1 :] if one.model.name in names}
    return sum(waiting.values())


def reading(passes: Sequence[Pass]) -> tuple[int, int]:
    """Activations and logits at the peak of forward passes, one after another, that nothing is learned from."""
    heads = 0
    peaks: list[tuple[int, int]] = []
    for one in passes:
        casts = one.model.cast_bytes
        peaks += [(casts, heads + one.head.peak), (casts + forward_workspace(one.model, one.texts), heads)]
        heads += one.head.kept
    return max(peaks, key=sum)


def kv_cache(model: Loaded, texts: Texts) -> int:
    """Keys and values of all layers."""
    s = model.shape
    return 2 * s.num_layers * s.kv_heads * s.head_dim * texts.tokens * model.numerics.compute


def sampled(model: Loaded, prompts: Texts, answered: Texts) -> tuple[int, int]:
    """Key-value cache and activations at the peak: when prompts are read, or when their last token is drawn.

    A token is drawn from its logits; before that each layer's keys, and then its values, are copied to make room.
    """
    s, n = model.shape, model.numerics
    logits = answered.rows * s.vocab * (n.compute + 3 * 4)
    copied = kv_cache(model, answered) // (2 * s.num_layers)
    read = kv_cache(model, prompts), model.cast_bytes + forward_workspace(model, prompts)
    drawn = kv_cache(model, answered), model.cast_bytes + max(copied, logits)
    return max(read, drawn, key=sum)
