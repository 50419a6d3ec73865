"""`alignment.plan.memory` against what a small Llama really holds: a real update, every storage counted.

States must be exact. What comes and goes must be within 15% of the measured peak.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from alignment.actor_critic import ActorCritic, Batch
from alignment.generate import Generator
from alignment.plan.layout import Layout
from alignment.plan.memory import (
    Loaded,
    Numerics,
    Pass,
    Texts,
    buckets,
    forward_workspace,
    fused_head,
    kv_cache,
    learning,
    mix_head,
    ppo_head,
    reading,
    sampled,
    states_of,
)
from alignment.plan.shapes import BUILT_IN, ModelShape, shape_of
from alignment.policy import add_lora
from alignment.ppo_state import make_optimizer
from alignment.recipe import Ppo, PpoRecipe, Sampling
from alignment.recipe_parts import Data, Lora, ModelInit, Source
from alignment.recipe_scorers import RefusalScorer
from reward.padding_free import attend_by_text
from reward.shared_prefix import Group, pack, packed_scores
from tests.measured import Live, stored

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 3,
}
PROMPT, ANSWER, ROWS = 96, 32, 4
TEXTS = Texts(ROWS, PROMPT + ANSWER)
ONE = Layout("launch/gpu.yaml", gpus=1, gpus_per_node=1)
LORA = Lora(r=4, alpha=8)


def within(found: float, measured: float) -> bool:
    return abs(found - measured) <= 0.15 * measured


def build(
    head: str = "causal_lm", *, dtype: torch.dtype = torch.float32, lora: Lora | None = None, **sizes: Any
) -> Any:
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM if head == "causal_lm" else AutoModelForSequenceClassification
    config = LlamaConfig(**{key: value for key, value in CONFIG.items() if key != "model_type"} | sizes, num_labels=1)
    model = factory.from_config(config).to(dtype)
    return model if lora is None else add_lora(model, lora, head=head)  # pyright: ignore[reportArgumentType]


def planned(
    head: str = "causal_lm", *, dtype: torch.dtype = torch.float32, lora: Lora | None = None, **sizes: Any
) -> Loaded:
    init = ModelInit(dtype="float32" if dtype == torch.float32 else "bfloat16")
    shape = shape_of(CONFIG | sizes, head=head, lora=lora)  # pyright: ignore[reportArgumentType]
    tuning = "full" if lora is None else "lora"
    return Loaded("model", "m", shape, Numerics.of(init, ONE), tuning=tuning, tuned_layers=shape.num_layers)


def ppo_batch() -> Batch:
    """Rows of unequal length, so that there is a mask; the longest is as long as planned."""
    draw = torch.Generator().manual_seed(0)

    def ids(number: int) -> list[int]:
        return torch.randint(4, 512, (number,), generator=draw).tolist()

    prompts = [ids(PROMPT - 8 * row) for row in range(ROWS)]
    return Batch.of(prompts, [ids(ANSWER - 4 * row) for row in range(ROWS)], pad_token_id=3, padding_free=False)


def given(batch: Batch) -> list[torch.Tensor]:
    tensors = [*batch.inputs.values(), batch.columns, batch.completion_mask, batch.present]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


def actor(*, separate: bool, lora: Lora | None, dtype: torch.dtype, checkpointing: bool = False) -> ActorCritic:
    policy = build(dtype=dtype, lora=lora)
    value = build("sequence_classification", dtype=dtype, lora=lora) if separate else None
    for model in (policy, value) if checkpointing else ():
        if model is not None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    return ActorCritic(policy, value_model=value, temperature=1.0)


def engine(*, separate: bool, lora: Lora | None, dtype: torch.dtype) -> list[Loaded]:
    models = [planned(dtype=dtype, lora=lora)]
    return [*models, planned("sequence_classification", dtype=dtype, lora=lora)] if separate else models


def passes_of(models: list[Loaded]) -> list[Pass]:
    """Policy with its head, then the value model."""
    return [
        Pass(models[0], TEXTS, ppo_head(models[0], ROWS, ANSWER)),
        *(Pass(model, TEXTS) for model in models[1:]),
    ]


def measured_peak(work: Callable[[], Any], parameters: list[torch.Tensor], *, known: list[torch.Tensor]) -> int:
    """Of a forward and backward pass that accumulates into gradients that are there already."""
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with Live([*parameters, *gradients, *known]) as live:
        work().backward()
    return live.peak


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("embedded:smollm2-135m-instruct", 134_515_008),
    ],
)
def test_parameters_are_those_that_are_published(model: str, parameters: int) -> None:
    assert shape_of(BUILT_IN[model]).parameters == parameters


@pytest.mark.parametrize("lora", [None, LORA, Lora(r=4, alpha=8, last_layers=2)])
@pytest.mark.parametrize("head", ["causal_lm", "sequence_classification"])
def test_parameters_are_those_of_the_model(head: str, lora: Lora | None) -> None:
    model = build(head, lora=lora)
    shape = shape_of(CONFIG, head=head, lora=lora)  # pyright: ignore[reportArgumentType]
    assert shape.parameters + shape.adapter == sum(p.numel() for p in model.parameters())
    assert shape.adapter == (0 if lora is None else sum(p.numel() for p in model.parameters() if p.requires_grad))
    plain = build(head)
    layers = plain.model.layers
    assert shape.layer == sum(p.numel() for p in layers[0].parameters())
    linear = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    assert shape.quantizable == sum(module.weight.numel() for module in linear)
    assert shape.gated


# --------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("separate", [False, True])
def test_states_are_those_of_a_real_update(dtype: torch.dtype, lora: Lora | None, separate: bool) -> None:
    model = actor(separate=separate, lora=lora, dtype=dtype)
    recipe = PpoRecipe(
        output_dir="o",
        model="m",
        prompts=Data(sources=[Source(name="s")]),
        scorer=RefusalScorer(),
        lora=lora,
        ppo=Ppo(),
    )
    optimizer = make_optimizer(model, recipe)
    batch = ppo_batch()
    output = model(batch)
    (output.logprobs.sum() + output.values.sum()).backward()
    optimizer.step()
    head = [] if separate else [model.value_head.weight]  # the plan of a stage adds it to the policy
    parameters = [parameter for parameter in model.parameters() if not any(parameter is own for own in head)]
    learning_ones = [parameter for parameter in parameters if parameter.requires_grad]
    moments = [optimizer.state[parameter][name] for parameter in learning_ones for name in ("exp_avg", "exp_avg_sq")]
    states = [states_of(loaded, ONE) for loaded in engine(separate=separate, lora=lora, dtype=dtype)]
    assert sum(state.weights for state in states) == stored(parameters)
    assert sum(state.gradients for state in states) == stored(p.grad for p in learning_ones if p.grad is not None)
    assert sum(state.optimizer for state in states) == stored(moments)


def sized(parameters: int) -> Loaded:
    """A model of so many parameters, tuned whole under DeepSpeed in bfloat16."""
    shape = ModelShape(parameters, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, gated=True, sees_all=True)
    return Loaded("model", "m", shape, Numerics(2, 2, 2), tuning="full")


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_shares_out_what_its_paper_says(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 GPUs, mixed precision, Adam."""
    layout = Layout("x", gpus=64, gpus_per_node=8, deepspeed=True, zero_stage=stage, bf16=True)
    states = states_of(sized(7_500_000_000), layout)
    assert states.weights + states.gradients + states.optimizer == pytest.approx(gigabytes * 1e9, rel=0.02)
    assert states.host == 0


def test_offload_moves_states_to_the_host() -> None:
    layout = Layout("x", gpus=8, gpus_per_node=8, deepspeed=True, zero_stage=3, offload_optimizer=True, bf16=True)
    kept = states_of(sized(8_000), layout)
    assert (kept.weights, kept.gradients, kept.optimizer, kept.host) == (2_000, 0, 0, 14_000)
    gone = states_of(sized(8_000), dataclasses.replace(layout, offload_weights=True))
    assert (gone.weights, gone.gradients, gone.optimizer, gone.host) == (0, 0, 0, 16_000)


def test_four_bits_a_weight_and_a_scale_for_64_of_them() -> None:
    model = dataclasses.replace(planned(), quantization="nf4")
    packed, plain = model.shape.quantizable, model.shape.parameters - model.shape.quantizable
    assert model.weight_bytes == packed / 2 + 4 * packed / 64 + 4 * plain


def test_ddp_copies_gradients_into_buckets() -> None:
    model = planned(lora=LORA)
    two = dataclasses.replace(ONE, gpus=2)
    assert buckets([model], ONE) == 0
    assert buckets([model], two) == 4 * model.shape.adapter


# -------------------------------------------------------------------------------------------------- what comes and goes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize(("separate", "checkpointing"), [(False, False), (False, True), (True, False), (True, True)])
def test_peak_of_a_ppo_update(dtype: torch.dtype, lora: Lora | None, separate: bool, checkpointing: bool) -> None:
    model = actor(separate=separate, lora=lora, dtype=dtype, checkpointing=checkpointing).train()
    batch = ppo_batch()

    def loss() -> torch.Tensor:
        output = model(batch)
        return ((output.logprobs + 0.1 * output.values.square()) * batch.completion_mask).sum()

    known = given(batch)
    peak = measured_peak(loss, list(model.parameters()), known=known)
    models = engine(separate=separate, lora=lora, dtype=dtype)
    found = learning(passes_of(models), checkpointing=checkpointing)
    assert within(sum(found), peak), (sum(found) / peak, found)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_ppo_update_without_padding(separate: bool, checkpointing: bool) -> None:
    """Where all texts are as long as planned; shorter ones need less then."""
    model = actor(separate=separate, lora=None, dtype=torch.float32, checkpointing=checkpointing).train()
    for part in (model.policy, model.value_model) if separate else (model.policy,):
        attend_by_text(part)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 512, (ROWS, PROMPT + ANSWER), generator=draw).tolist()
    prompts, answers = [row[:PROMPT] for row in ids], [row[PROMPT:] for row in ids]
    batch = Batch.of(prompts, answers, pad_token_id=3, padding_free=True)

    def loss() -> torch.Tensor:
        output = model(batch)
        return (output.logprobs + 0.1 * output.values.square()).sum()

    peak = measured_peak(loss, list(model.parameters()), known=given(batch))
    models = engine(separate=separate, lora=None, dtype=torch.float32)
    unmasked = [dataclasses.replace(one, texts=dataclasses.replace(TEXTS, masked=False)) for one in passes_of(models)]
    found = learning(unmasked, checkpointing=checkpointing)
    assert within(sum(found), peak), (sum(found) / peak, found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_with_a_pretraining_mix(dtype: torch.dtype, checkpointing: bool) -> None:
    model = actor(separate=False, lora=None, dtype=dtype, checkpointing=checkpointing).train()
    batch, mix = ppo_batch(), ppo_batch()

    def loss() -> torch.Tensor:
        output = model(batch, mix=mix)
        assert output.mix_logprobs is not None
        return (output.logprobs * batch.completion_mask).sum() + (output.mix_logprobs * mix.completion_mask).sum()

    known = [tensor for one in (batch, mix) for tensor in given(one)]
    peak = measured_peak(loss, list(model.parameters()), known=known)
    loaded = planned(dtype=dtype)
    answers_alone = mix_head(loaded, Texts(ROWS, ANSWER + 1))  # here the logits of the prompts are not wanted
    found = learning([*passes_of([loaded]), Pass(loaded, TEXTS, answers_alone)], checkpointing=checkpointing)
    assert within(sum(found), peak), (sum(found) / peak, found)


def test_peak_under_autocast() -> None:
    model = actor(separate=False, lora=None, dtype=torch.float32).train()
    batch = ppo_batch()

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(batch)
        return ((output.logprobs + output.values.float().square()) * batch.completion_mask).sum()

    known = given(batch)
    peak = measured_peak(loss, list(model.parameters()), known=known)
    loaded = dataclasses.replace(planned(), numerics=Numerics(4, 2, 4, autocast=True))
    found = learning(passes_of([loaded]), checkpointing=False)
    assert within(sum(found), peak), sum(found) / peak


@pytest.mark.parametrize("separate", [False, True])
def test_peak_of_reading_log_probabilities(separate: bool) -> None:
    model = actor(separate=separate, lora=None, dtype=torch.float32).eval()
    batch = ppo_batch()
    known = [*model.parameters(), *given(batch)]
    with torch.no_grad(), Live(known) as live:
        model(batch)
    models = engine(separate=separate, lora=None, dtype=torch.float32)
    found = reading(passes_of(models))
    assert within(sum(found), live.peak), sum(found) / live.peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_fine_tuning_with_the_fused_head(checkpointing: bool) -> None:
    from trl.trainer.utils import add_fused_lm_head

    model = build().train()
    add_fused_lm_head(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(4, 512, (ROWS, TEXTS.length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, -8:] = 0

    def loss() -> torch.Tensor:
        return model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).loss

    peak = measured_peak(loss, list(model.parameters()), known=[ids, mask])
    loaded = planned()
    found = learning([Pass(loaded, TEXTS, fused_head(loaded, TEXTS.tokens))], checkpointing=checkpointing)
    assert within(sum(found), peak), (sum(found) / peak, found)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_a_packed_batch_of_pairs(checkpointing: bool) -> None:
    model = build("sequence_classification").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    draw = torch.Generator().manual_seed(0)
    pairs = [[torch.randint(4, 512, (64,), generator=draw).tolist() for _ in range(2)] for _ in range(ROWS)]
    texts = pack([Group.of(pair) for pair in pairs], pad_token_id=3, hidden_size=128)
    assert texts.input_ids.shape == (ROWS, 128), "two texts without a common beginning in each row"
    known = [getattr(texts, name) for name in ("input_ids", "position_ids", "groups", "rests", "ends")]
    peak = measured_peak(lambda: packed_scores(model, model.score, texts).sum(), list(model.parameters()), known=known)
    loaded = planned("sequence_classification")
    found = learning([Pass(loaded, Texts(ROWS, 128))], checkpointing=checkpointing)
    assert within(sum(found), peak), sum(found) / peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_key_value_cache_and_workspace_of_a_prompt(dtype: torch.dtype) -> None:
    model = build(dtype=dtype).eval()
    ids = torch.randint(4, 512, (ROWS, TEXTS.length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad(), Live([*model.parameters(), ids, mask]) as live:
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1).past_key_values
    loaded = planned(dtype=dtype)
    keys_and_values = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert kv_cache(loaded, TEXTS) == stored(keys_and_values)
    assert within(kv_cache(loaded, TEXTS) + forward_workspace(loaded, TEXTS), live.peak)


@pytest.mark.parametrize("padding_free", [True, False])
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
@pytest.mark.parametrize(("prompt", "answer"), [(96, 32), (16, 100), (200, 4), (100, 200)])
def test_peak_of_sampling(prompt: int, answer: int, kv_heads: int, padding_free: bool) -> None:
    """Prompts of unequal length; no answer ends by itself."""
    model = build(num_key_value_heads=kv_heads).eval()
    renderer: Any = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=3), end_ids={CONFIG["vocab_size"]})
    settings = Sampling(max_new_tokens=answer, batch_size=ROWS)
    generator = Generator(model, renderer, settings, padding_free=padding_free)
    assert generator.padding_free == padding_free, "tried out before it is measured"
    prompts = [list(range(4, 4 + prompt - row)) for row in range(ROWS)]
    generator.sample(prompts, seeds=range(ROWS))
    with Live(list(model.parameters())) as live:
        ids, _ = generator.sample(prompts, seeds=range(ROWS))
    assert ids.shape == (ROWS, prompt + answer)
    loaded = planned(num_key_value_heads=kv_heads)
    found = sampled(loaded, Texts(ROWS, prompt, masked=not padding_free), Texts(ROWS, prompt + answer))
    assert within(sum(found), live.peak), (sum(found) / live.peak, found)
