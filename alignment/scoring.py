"""A recipe's `scorer:` section -> a Scorer. The one place that knows every kind."""

from __future__ import annotations

import importlib
from pathlib import Path

from alignment.distributed import device, whole_weights
from alignment.policy import resolve_model
from alignment.recipe_scorers import (
    GuardScorer,
    HttpScorer,
    JudgeScorer,
    Lagrangian,
    Llama2Scorer,
    Minimum,
    PythonScorer,
    RefusalScorer,
    RewardModelScorer,
    ScorerSpec,
    WeightedSum,
)
from reward.scorer import FunctionScorer, LagrangianScorer, MinimumScorer, PiecewiseScorer, Scorer, WeightedSumScorer

GUIDELINES = Path(__file__).parent / "data" / "guidelines" / "default.md"


def build_scorer(spec: ScorerSpec) -> Scorer:
    """Load what the section names, whole on this process and on its own device."""
    match spec:
        case RewardModelScorer():
            return _reward_model(spec)
        case JudgeScorer():
            return _judge(spec)
        case GuardScorer():
            return _guard(spec)
        case RefusalScorer():
            from reward.refusal import RefusalRuleScorer

            return RefusalRuleScorer()
        case PythonScorer():
            module, _, name = spec.function.partition(":")
            return FunctionScorer(getattr(importlib.import_module(module), name), name=name, scale=spec.scale)
        case HttpScorer():
            return _http(spec)
        case Llama2Scorer():
            return PiecewiseScorer(build_scorer(spec.safety), build_scorer(spec.helpfulness), spec.threshold)
        case WeightedSum():
            return WeightedSumScorer(tuple(build_scorer(part) for part in spec.parts), tuple(spec.weights))
        case Minimum():
            return MinimumScorer(tuple(build_scorer(part) for part in spec.parts))
        case Lagrangian():
            return LagrangianScorer(build_scorer(spec.reward), build_scorer(spec.cost), spec.multiplier)


def _reward_model(spec: RewardModelScorer) -> Scorer:
    from reward.families import Loading, load_reward_model

    loading = Loading(
        dtype=spec.dtype,
        device=device(),
        name=Path(spec.path).name,
        batch_size=spec.batch_size,
        max_length=spec.max_length,
        shared_prefix=spec.shared_prefix,
        trust_remote_code=spec.trust_remote_code,
        read_at=spec.read_at,
    )
    with whole_weights():
        return load_reward_model(
            resolve_model(spec.path), family=spec.family, direction=spec.direction, label=spec.label, loading=loading
        )


def _judge(spec: JudgeScorer) -> Scorer:
    from reward.backends import TransformersBackend
    from reward.judge import Constitution
    from reward.judge import JudgeScorer as Judge

    text = Path(spec.guidelines or GUIDELINES).read_text(encoding="utf-8")
    with whole_weights():
        backend = TransformersBackend.load(
            resolve_model(spec.model), dtype=spec.dtype, batch_size=spec.batch_size, device=device()
        )
    return Judge(backend, Constitution(text), mode=spec.mode, max_length=spec.max_length)


def _guard(spec: GuardScorer) -> Scorer:
    from reward.guard import GuardScorer as Guard

    with whole_weights():
        return Guard.load(
            resolve_model(spec.model),
            spec.format,
            dtype=spec.dtype,
            device=device(),
            batch_size=spec.batch_size,
            max_length=spec.max_length,
            name=Path(spec.model).name,
        )


def _http(spec: HttpScorer) -> Scorer:
    from reward.http import Endpoint
    from reward.http import HttpScorer as Client
    from reward.wire import read_token

    token = None if spec.token_env is None else read_token(spec.token_env)
    endpoint = Endpoint(url=spec.url, token=token, timeout=spec.timeout, deadline=spec.deadline, retries=spec.retries)
    return Client.connect(endpoint, name=spec.name, scale=spec.scale, batch_size=spec.batch_size)
