"""Alarms of a PPO run: a window of metrics in, alarms with a written reason out. Nothing here reads a clock or a file.

An alarm is raised when its condition becomes true, not again while it stays true, and may be raised anew after it was
false. Limits are those of the recipe's `health` section.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from alignment.recipe_health import Action, Health
from alignment.recipe_scorers import Section

EXIT_UNHEALTHY = 3
"""Of a stage that an alarm stopped: training itself is at fault, and the same command would only stop again."""

MISMATCH = "logprob_mismatch"


class Series(Section):
    """The first and the newest values of a metric, in order."""

    first: list[float] = []
    last: list[float] = []


class HealthState(Section):
    """What the alarms remember from one iteration to the next."""

    series: dict[str, Series] = {}
    active: dict[str, str] = {}
    """Alarms whose condition is true, and the reason given when they were raised."""


@dataclass(frozen=True, slots=True)
class Alarm:
    """`reason`: what was seen, in numbers, and what to do about it; one line."""

    name: str
    action: Action
    iteration: int
    reason: str

    @property
    def title(self) -> str:
        return f"PPO: {self.name.replace('_', ' ')} at iteration {self.iteration}"


class Unhealthy(Exception):
    """An alarm whose action is `stop`. What is needed to go on is on disk."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"stopped by the alarm {name}: {reason}. To go on all the same: --health.{name} warn "
            f"(sara pipeline: --steps.N.overrides.health.{name} warn, N from 0)"
        )


def observe(
    state: HealthState,
    metrics: Mapping[str, float],
    *,
    settings: Health,
    iteration: int,
    found: Mapping[str, str] | None = None,
) -> tuple[HealthState, list[Alarm]]:
    """Take in the metrics of an iteration; the new state, and the alarms that are raised by it.

    `found`: alarms whose condition is looked at elsewhere and is true now, with their reasons.
    """
    series = dict(state.series)
    for name in sorted(WATCHED & metrics.keys()):
        series[name] = _extended(series.get(name, Series()), metrics[name], settings)
    conditions = {name: check(settings, series) for name, check in CHECKS.items()} | dict(found or {})
    active: dict[str, str] = {}
    raised: list[Alarm] = []
    for name, reason in conditions.items():
        action: Action = getattr(settings, name)
        if reason is None or action == "off":
            continue
        active[name] = state.active.get(name, reason)
        if name not in state.active:
            raised.append(Alarm(name, action, iteration, reason))
    return HealthState(series=series, active=active), raised


def check_health(state: HealthState, settings: Health) -> None:
    """Unhealthy when an alarm is on whose action is `stop`."""
    for name, reason in state.active.items():
        if getattr(settings, name) == "stop":
            raise Unhealthy(name, reason)


def trend(values: Sequence[float]) -> float:
    """Slope of the least-squares line over its standard error (the t statistic, n - 2 degrees of freedom); n >= 3."""
    n = len(values)
    middle, mean = (n - 1) / 2, math.fsum(values) / n
    spread = math.fsum((position - middle) ** 2 for position in range(n))
    slope = math.fsum((position - middle) * (value - mean) for position, value in enumerate(values)) / spread
    residual = math.fsum((value - mean - slope * (position - middle)) ** 2 for position, value in enumerate(values))
    error = math.sqrt(residual / (n - 2) / spread)
    if error == 0:
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / error


# ------------------------------------------------------------------------------------------------- windows


def _extended(series: Series, value: float, settings: Health) -> Series:
    closed = len(series.first) >= settings.window or series.first != series.last[: len(series.first)]
    first = series.first if closed else [*series.first, value]
    return Series(first=first, last=[*series.last, value][-max(settings.window, settings.gold_window) :])


def _window(series: Mapping[str, Series], name: str, length: int) -> list[float] | None:
    """The newest values of a metric; None while there are fewer than `length`."""
    last = series.get(name, Series()).last[-length:]
    return last if len(last) == length else None


def _growth(series: Mapping[str, Series], name: str, length: int) -> tuple[float, float] | None:
    """Mean of the first values of a metric and of the newest; None while there are too few, or no start above 0."""
    last = _window(series, name, length)
    if last is None:
        return None
    first = series[name].first
    start = math.fsum(first) / len(first)
    return (start, math.fsum(last) / length) if start > 0 else None


# -------------------------------------------------------------------------------------------- the conditions


def _negative_kl(settings: Health, series: Mapping[str, Series]) -> str | None:
    values = _window(series, "kl_k1", settings.window)
    if values is None or max(values) >= settings.min_kl:
        return None
    return (
        f"the estimate of the KL to the start was {min(values):.3g} to {max(values):.3g} nats per answer in the last "
        f"{settings.window} iterations (limit {settings.min_kl:g}), and a KL is never negative: the answers are not "
        "drawn from the policy whose log-probabilities are taken. Look at logprob_difference_mean, at how answers end, "
        "and at the chat template"
    )


def _runaway_kl(settings: Health, series: Mapping[str, Series]) -> str | None:
    values = _window(series, "kl", settings.window)
    if values is None or min(values) <= settings.max_kl:
        return None
    return (
        f"the KL to the start was {min(values):.3g} to {max(values):.3g} nats per answer in the last "
        f"{settings.window} iterations (limit {settings.max_kl:g}): the policy leaves the texts that its scorer was "
        "trained on. Raise ppo.kl_coef or lower ppo.learning_rate, and go back to a checkpoint before the rise"
    )


def _ratio_explosion(settings: Health, series: Mapping[str, Series]) -> str | None:
    values = _window(series, "ratio_max", 1)
    if values is None or values[0] <= settings.max_ratio:
        return None
    return (
        f"the probability of a token changed by a factor of {values[0]:.3g} within one iteration (limit "
        f"{settings.max_ratio:g}): the steps are too large for clipping to hold. Lower ppo.learning_rate, "
        "ppo.num_ppo_epochs or ppo.max_grad_norm"
    )


def _entropy_collapse(settings: Health, series: Mapping[str, Series]) -> str | None:
    growth = _growth(series, "entropy", settings.window)
    if growth is None or growth[1] >= settings.min_entropy_share * growth[0]:
        return None
    return (
        f"the entropy is {growth[1]:.3g} nats per token over the last {settings.window} iterations, "
        f"{growth[1] / growth[0]:.0%} of the {growth[0]:.3g} of the first ones (limit "
        f"{settings.min_entropy_share:.0%}): the policy says one thing only. Read the samples, raise ppo.kl_coef or "
        "lower ppo.learning_rate"
    )


def _length_growth(settings: Health, series: Mapping[str, Series]) -> str | None:
    growth = _growth(series, "completion_tokens", settings.window)
    if growth is None or growth[1] <= settings.max_length_growth * growth[0]:
        return None
    return (
        f"answers take {growth[1]:.4g} tokens over the last {settings.window} iterations, {growth[1] / growth[0]:.1f} "
        f"times the {growth[0]:.4g} of the first ones (limit {settings.max_length_growth:g}): the scorer may pay for "
        "length. Compare scores with lengths (sara eval-reward), raise ppo.kl_coef or lower sampling.max_new_tokens"
    )


def _gold_drift(settings: Health, series: Mapping[str, Series]) -> str | None:
    gold = _window(series, "gold_mean", settings.gold_window)
    score = _window(series, "gold_training_mean", settings.gold_window)
    if gold is None or score is None:
        return None
    up, down = trend(score), trend(gold)
    if up < settings.min_gold_trend or down > -settings.min_gold_trend:
        return None
    return (
        f"over the last {settings.gold_window} measurements the training score rose from {score[0]:.3g} to "
        f"{score[-1]:.3g} (trend {up:+.1f} standard errors) while the gold scorer fell from {gold[0]:.3g} to "
        f"{gold[-1]:.3g} ({down:+.1f}; limit {settings.min_gold_trend:g}): the policy games its scorer. Take a "
        "checkpoint before the fall, raise ppo.kl_coef, or train the scorer on these answers"
    )


def _false_refusal_growth(settings: Health, series: Mapping[str, Series]) -> str | None:
    """Above its start by more than the limit, and by more than chance: the interval of now excludes the start."""
    rates, lows = _window(series, "probe_false_refusal_rate", 1), _window(series, "probe_false_refusal_low", 1)
    if rates is None or lows is None:
        return None
    start, now = series["probe_false_refusal_rate"].first[0], rates[0]
    if now - start <= settings.max_false_refusal_growth or lows[0] <= start:
        return None
    return (
        f"the policy refuses {now:.0%} of the borderline probes (95% interval from {lows[0]:.0%}), and {start:.0%} at "
        f"the start: {100 * (now - start):.0f} points more (limit {100 * settings.max_false_refusal_growth:g}). Give "
        "prompts more borderline and helpful rows, or the helpfulness score more say (scorer.threshold)"
    )


def _poor_value_model(settings: Health, series: Mapping[str, Series]) -> str | None:
    values = _window(series, "explained_variance", settings.window)
    if values is None or max(values) >= settings.min_explained_variance:
        return None
    return (
        f"the value model explains {min(values):.3g} to {max(values):.3g} of the variance of the returns in the last "
        f"{settings.window} iterations (limit {settings.min_explained_variance:g}), worse than their mean would: the "
        "advantages are noise. Raise ppo.value_learning_rate, ppo.value_clip_range or ppo.critic_warmup_iterations"
    )


CHECKS: dict[str, Callable[[Health, Mapping[str, Series]], str | None]] = {
    "negative_kl": _negative_kl,
    "runaway_kl": _runaway_kl,
    "ratio_explosion": _ratio_explosion,
    "entropy_collapse": _entropy_collapse,
    "length_growth": _length_growth,
    "gold_drift": _gold_drift,
    "false_refusal_growth": _false_refusal_growth,
    "poor_value_model": _poor_value_model,
}
"""Name of the alarm, as in the recipe -> why it is on, or None."""

WATCHED = frozenset(
    {
        "kl_k1",
        "kl",
        "ratio_max",
        "entropy",
        "completion_tokens",
        "gold_mean",
        "gold_training_mean",
        "probe_false_refusal_rate",
        "probe_false_refusal_low",
        "explained_variance",
    }
)
"""The metrics that the conditions read."""
