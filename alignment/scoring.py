"""A recipe's `scorer:` section -> a Scorer. The one place that knows every kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from alignment.distributed import (
    device,
    frozen_engine,
    is_main_process,
    most_of_all,
    sharded_weights,
    whole_weights,
)
from alignment.policy import model_fingerprint, resolve_model
from alignment.recipe_scorers import (
    GUIDELINES,
    HOW_IT_IS_RUN,
    ONLY_CLASSIFIERS,
    GuardScorer,
    HarmfulnessScorer,
    HttpScorer,
    JudgeScorer,
    Lagrangian,
    Llama2Scorer,
    Minimum,
    ModerationScorer,
    PythonScorer,
    RefusalScorer,
    RewardModelScorer,
    ScorerSpec,
    Server,
    WeightedSum,
)
from reward.conversation import fingerprint
from reward.scorer import (
    FunctionScorer,
    LagrangianScorer,
    MinimumScorer,
    NegatedScorer,
    PiecewiseScorer,
    Scorer,
    ScorerError,
    WeightedSumScorer,
)

if TYPE_CHECKING:
    from reward.backends import ChatBackend, TransformersBackend
    from reward.judge import Judge
    from reward.remote import ModelServer


def build_scorer(spec: ScorerSpec) -> Scorer:
    """Load what the section names, whole on this process and on its own device."""
    match spec:
        case RewardModelScorer():
            return _reward_model(spec)
        case HarmfulnessScorer():
            return _harmfulness(spec)
        case JudgeScorer():
            return _judge(spec)
        case GuardScorer():
            return _guard(spec)
        case ModerationScorer():
            return _moderation(spec)
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
    from reward.dtype import torch_dtype
    from reward.families import Loading, load_reward_model
    from reward.model import RewardModel

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
    dtype = torch_dtype(spec.dtype, device())
    with sharded_weights(dtype) if spec.sharded else whole_weights():
        scorer = load_reward_model(
            resolve_model(spec.path), family=spec.family, direction=spec.direction, label=spec.label, loading=loading
        )
    if spec.sharded:
        model = scorer.part if isinstance(scorer, NegatedScorer) else scorer
        if not isinstance(model, RewardModel):
            raise ScorerError(f"{spec.path}: {ONLY_CLASSIFIERS}")
        model.share_out(frozen_engine(model.module), most=most_of_all)
    return scorer


def _harmfulness(spec: HarmfulnessScorer) -> Scorer:
    from alignment.progress import Progress
    from reward.families import Loading
    from reward.harmfulness import AbsoluteHarmfulness

    loading = Loading(dtype=spec.dtype, device=device(), batch_size=spec.batch_size)
    with whole_weights():
        return AbsoluteHarmfulness.load(
            spec.model,
            revision=spec.revision,
            truncation_side=spec.truncation_side,
            max_length=spec.max_length,
            threshold=spec.threshold,
            progress=Progress if spec.progress else None,
            loading=loading,
        )


def _judge(spec: JudgeScorer) -> Scorer:
    from reward.backends import TransformersBackend
    from reward.judge_prompt import SAFETY_LLAMA_TEMPLATE
    from reward.remote import RemoteBackend

    if spec.server is not None:
        server = _server(spec.server, spec.model)
        return _cached(_judge_on(RemoteBackend(server), spec), spec, lambda: server.identity)
    with whole_weights():
        backend = TransformersBackend.load(
            resolve_model(spec.model),
            dtype=spec.dtype,
            batch_size=spec.batch_size,
            device=device(),
            chat_template=SAFETY_LLAMA_TEMPLATE if spec.prompt == "safety_llama" else None,
            quantization=spec.quantization,
            shared_prefix=spec.shared_prefix,
        )
    if spec.mode == "score" and spec.shared_prefix and backend.why_unshared is not None and is_main_process():
        print(f"the judge reads its guidelines anew for every conversation: {backend.why_unshared}", flush=True)
    return _cached(_judge_on(backend, spec), spec, lambda: _identity(spec.model, backend))


def _judge_on(backend: ChatBackend, spec: JudgeScorer) -> Judge:
    from reward.judge import JudgeScorer as ChatJudge
    from reward.judge_prompt import Constitution
    from reward.platt import Calibration

    return ChatJudge(
        backend,
        Constitution.read(spec.guidelines or GUIDELINES),
        mode=spec.mode,
        max_length=spec.max_length,
        prompt=spec.prompt,
        calibration=None if spec.calibration is None else Calibration.read(spec.calibration),
    )


def _guard(spec: GuardScorer) -> Scorer:
    from reward.guard import GuardScorer as Guard

    with whole_weights():
        guard = Guard.load(
            resolve_model(spec.model),
            spec.format,
            dtype=spec.dtype,
            device=device(),
            batch_size=spec.batch_size,
            max_length=spec.max_length,
            name=Path(spec.model).name,
        )
    return _cached(guard, spec, lambda: _identity(spec.model, guard.backend))


def _moderation(spec: ModerationScorer) -> Scorer:
    from reward.moderation import ModerationJudge

    server = _server(spec.server, spec.model)
    return _cached(ModerationJudge(server, threshold=spec.threshold), spec, lambda: server.identity)


def _server(spec: Server, model: str) -> ModelServer:
    from reward.remote import ModelServer
    from reward.wire import read_token

    return ModelServer.at(
        spec.url,
        model=model,
        token=None if spec.token_env is None else read_token(spec.token_env, shortest=1),
        concurrency=spec.concurrency,
        timeout=spec.timeout,
        deadline=spec.deadline,
        retries=spec.retries,
    )


def _identity(model: str, backend: TransformersBackend) -> str:
    """Of the files that were named, and of what was made of them: an adapter's base, a number format."""
    return f"{model_fingerprint(model)} {backend.fingerprint} {backend.model.dtype}"


def _cached(judge: Judge, spec: JudgeScorer | GuardScorer | ModerationScorer, model: Callable[[], str]) -> Scorer:
    """`judge` behind the verdicts that stand in its file already. `model` tells who it is, where that is asked."""
    from reward.verdict_cache import CachedJudge, VerdictCache

    if spec.cache is None:
        return judge
    settings = spec.model_dump(mode="json", exclude={*HOW_IT_IS_RUN, "model", "server", "guidelines"})
    return CachedJudge(judge, VerdictCache(Path(spec.cache)), fingerprint([model(), settings]))


def _http(spec: HttpScorer) -> Scorer:
    from reward.endpoint import Endpoint
    from reward.http import HttpScorer as Client
    from reward.wire import read_token

    token = None if spec.token_env is None else read_token(spec.token_env)
    endpoint = Endpoint(url=spec.url, token=token, timeout=spec.timeout, deadline=spec.deadline, retries=spec.retries)
    return Client.connect(endpoint, name=spec.name, scale=spec.scale, batch_size=spec.batch_size)
