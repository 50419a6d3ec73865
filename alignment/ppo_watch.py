"""What a PPO run is watched by: probes, a gold scorer, the sampler's log-probabilities, and alarms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.actor_critic import ActorCritic
from alignment.generate import Generator
from alignment.health import MISMATCH, Alarm, HealthState, Unhealthy, observe
from alignment.logprob_check import compare_logprobs, likely_cause, logprob_limit
from alignment.probes import COLUMNS, Probes, gold_metrics
from alignment.recipe import PpoRecipe
from alignment.rollout import AnswerServer, Rollout
from alignment.scoring import build_scorer
from alignment.tracking import Tracker
from reward.scorer import Score, Scorer


@dataclass(frozen=True)
class Watch:
    """Looks on and changes nothing. All processes call its methods together. `engine` is around `model`."""

    recipe: PpoRecipe
    accelerator: Any
    engine: Any
    model: ActorCritic
    generator: Generator
    probes: Probes | None
    gold: Scorer | None

    @classmethod
    def of(
        cls,
        recipe: PpoRecipe,
        accelerator: Any,
        engine: Any,
        model: ActorCritic,
        generator: Generator,
        *,
        server: AnswerServer | None = None,
    ) -> Watch:
        probes = Probes.load(recipe, model.policy, generator.renderer, server)
        gold = None if recipe.gold_scorer is None else build_scorer(recipe.gold_scorer)
        return cls(recipe, accelerator, engine, model, generator, probes, gold)

    def probe(self, tracker: Tracker, *, iteration: int) -> dict[str, float]:
        """Rates of the probe sets, when they are due; before the iteration changes any weight."""
        settings = self.recipe.probes
        if self.probes is None or settings is None or iteration % settings.steps:
            return {}
        report = self.probes.measure(self.engine, self.accelerator)
        tracker.table("probes", COLUMNS, report.rows, step=iteration)
        return report.metrics

    def compare(self, rollout: Rollout, tracker: Tracker, *, iteration: int) -> tuple[dict[str, float], dict[str, str]]:
        """Sampler against trainer: the differences, and what the alarm has to say of them. Unhealthy where it stops."""
        difference = compare_logprobs(rollout, self.accelerator)
        metrics = {"logprob_difference_mean": difference.mean, "logprob_difference_max": difference.max}
        limit = logprob_limit(self.recipe, mixed_precision=self.accelerator.mixed_precision)
        action = self.recipe.health.logprob_mismatch
        if action == "off" or difference.mean <= limit:
            return metrics, {}
        temperature = self.model.temperature
        cause = likely_cause(self.engine, self.generator, rollout, temperature=temperature, limit=limit)
        reason = (
            f"log-probabilities of the sampler and of the trainer differ by {difference.mean:.3g} nats per token on "
            f"average (limit {limit:g}) and {difference.max:.3g} at most, so ratios and KL are wrong. Likely cause: "
            f"{cause}"
        )
        if action == "stop":
            _tell(tracker, Alarm(MISMATCH, action, iteration, reason))
            raise Unhealthy(MISMATCH, reason)
        return metrics, {MISMATCH: reason}

    def score(self, rollout: Rollout, scores: Sequence[Score], *, iteration: int) -> dict[str, float]:
        """What the gold scorer says of the rollout, when it is its turn."""
        if self.gold is None or iteration % self.recipe.gold_steps:
            return {}
        return gold_metrics(self.gold, rollout.conversations, scores)

    def look(
        self,
        state: HealthState,
        metrics: Mapping[str, float],
        found: Mapping[str, str],
        tracker: Tracker,
        *,
        iteration: int,
    ) -> HealthState:
        """Take in the metrics of an iteration and tell of the alarms that they raise."""
        settings = self.recipe.health
        state, raised = observe(state, metrics, settings=settings, iteration=iteration, found=found)
        for alarm in raised:
            _tell(tracker, alarm)
        return state


def _tell(tracker: Tracker, alarm: Alarm) -> None:
    tracker.alarm(alarm.iteration, alarm.name, action=alarm.action, title=alarm.title, reason=alarm.reason)
