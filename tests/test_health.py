"""`alignment.health`: each alarm is raised on a made series and silent on a sound one, and says what to do."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from alignment.health import CHECKS, Alarm, HealthState, Unhealthy, check_health, observe, trend
from alignment.ppo_state import LoopState
from alignment.recipe_health import Health

if TYPE_CHECKING:
    from collections.abc import Callable

Iteration = dict[str, float]
SETTINGS = Health()


def sound(step: int, *, of: int = 60) -> Iteration:
    """What a run that goes well looks like: noisy, learning, a little longer and surer, gold rising with the score."""
    draw, share = random.Random(step), step / of
    return {
        "kl": max(0.0, 8 * share + draw.gauss(0, 0.3)),
        "kl_k1": 8 * share + draw.gauss(0, 0.02),
        "ratio_max": 1.5 + draw.random(),
        "entropy": 2.0 - 0.6 * share + draw.gauss(0, 0.05),
        "completion_tokens": 100 + 30 * share + draw.gauss(0, 5),
        "gold_mean": 0.5 * share + draw.gauss(0, 0.05),
        "gold_training_mean": 2 * share + draw.gauss(0, 0.05),
        "explained_variance": 0.6 * share + draw.gauss(0, 0.05),
    } | ({"probe_false_refusal_rate": 0.1, "probe_false_refusal_low": 0.05} if step % 10 == 0 else {})


def alarms(
    series: Callable[[int], Iteration],
    *,
    steps: int = 60,
    settings: Health = SETTINGS,
    state: HealthState | None = None,
) -> list[Alarm]:
    raised: list[Alarm] = []
    state = state or HealthState()
    for step in range(steps):
        state, new = observe(state, series(step), settings=settings, iteration=step)
        raised += new
    return raised


def test_a_run_that_goes_well_raises_nothing() -> None:
    assert alarms(sound, steps=60) == []


def spoilt(**changes: Callable[[int], float]) -> Callable[[int], Iteration]:
    """A sound run in which some metrics go wrong."""
    return lambda step: sound(step) | {name: change(step) for name, change in changes.items()}


def probed(step: int) -> Iteration:
    """12 of 120 borderline prompts are refused at first, then 36; Wilson's lower bounds by hand: 0.058 and 0.226."""
    rates = {0: (0.1, 0.058), 10: (0.1, 0.058)}
    rate, low = rates.get(step, (0.3, 0.226))
    return sound(step) | ({"probe_false_refusal_rate": rate, "probe_false_refusal_low": low} if step % 10 == 0 else {})


SICK: dict[str, tuple[Callable[[int], Iteration], int, tuple[str, ...]]] = {
    # the series, the iteration at which the alarm is due, and what its reason says
    "negative_kl": (spoilt(kl_k1=lambda step: 0.1 if step < 7 else -0.3), 11, ("-0.3", "-0.05", "template")),
    "runaway_kl": (spoilt(kl=lambda step: 5.0 * step), 15, ("55 to 75", "50", "kl_coef")),
    "ratio_explosion": (spoilt(ratio_max=lambda step: 12.5 if step == 9 else 2.0), 9, ("12.5", "10", "learning_rate")),
    # the mean of 5 falls under 0.3 x 2.0 at 32: (2 x 1.0 + 3 x 0.2) / 5 = 0.52
    "entropy_collapse": (
        spoilt(entropy=lambda step: 2.0 if step < 20 else 1.0 if step < 30 else 0.2),
        32,
        ("0.52", "26%", "2 of the first", "30%", "samples"),
    ),
    # the first five have 120 on average; the last five have 80 + 10 x step, more than 240 from 17 on
    "length_growth": (
        spoilt(completion_tokens=lambda step: 100.0 + 10 * step),
        17,
        ("250", "2.1 times", "120", "max_new"),
    ),
    "gold_drift": (
        spoilt(gold_mean=lambda step: 0.5 - 0.02 * max(0, step - 20) + random.Random(step).gauss(0, 0.005)),
        25,
        ("rose", "fell", "checkpoint"),
    ),
    "false_refusal_growth": (probed, 20, ("30%", "10% at", "20 points", "limit 10", "borderline")),
    "poor_value_model": (
        spoilt(explained_variance=lambda step: 0.1 if step < 3 else -0.4),
        7,
        ("-0.4", "-0.1", "value_learning_rate"),
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_raises_its_alarm_once_and_no_other(name: str) -> None:
    series, due, words = SICK[name]
    [alarm] = [alarm for alarm in alarms(series) if alarm.name == name]
    assert (alarm.iteration, alarm.action) == (pytest.approx(due, abs=2 if name == "gold_drift" else 0), "warn")
    for word in words:
        assert word in alarm.reason
    assert "\n" not in alarm.reason
    assert {alarm.name for alarm in alarms(series)} == {name}


def test_every_alarm_has_a_series_and_a_switch() -> None:
    assert SICK.keys() == CHECKS.keys()
    actions = {key for key, field in Health.model_fields.items() if field.default in ("off", "warn", "stop")}
    assert actions == CHECKS.keys() | {"logprob_mismatch"}


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_that_is_off_is_silent(name: str) -> None:
    assert alarms(SICK[name][0], settings=Health.model_validate({name: "off"})) == []


@pytest.mark.parametrize("name", SICK)
def test_an_alarm_that_stops(name: str) -> None:
    settings = Health.model_validate({name: "stop"})
    state = HealthState()
    for step in range(60):
        state, raised = observe(state, SICK[name][0](step), settings=settings, iteration=step)
        if raised:
            with pytest.raises(Unhealthy, match=rf"^stopped by the alarm {name}: ") as stopped:
                check_health(state, settings)
            ways = f": --health.{name} warn (sara pipeline: --steps.N.overrides.health.{name} warn, N from 0)"
            assert str(stopped.value).endswith(ways)
            check_health(state, SETTINGS)  # a warning, and it goes on
            return
        check_health(state, settings)
    raise AssertionError("it did not stop")


def test_an_alarm_is_raised_anew_after_it_was_over() -> None:
    series = spoilt(ratio_max=lambda step: 20.0 if step in (3, 4, 5, 9) else 1.1)
    assert [alarm.iteration for alarm in alarms(series)] == [3, 9]


@pytest.mark.parametrize("name", SICK)
@pytest.mark.parametrize("resumed_at", [1, 6, 19])
def test_a_resumed_run_raises_the_same_alarms(name: str, resumed_at: int) -> None:
    """Through the JSON of a checkpoint; the state says the same to the bit."""
    series = SICK[name][0]
    whole, raised = HealthState(), []
    for step in range(40):
        if step == resumed_at:
            text = json.dumps(LoopState(iteration=step, health=whole).model_dump(mode="json"))
            assert LoopState.model_validate_json(text).health == whole
            whole = LoopState.model_validate_json(text).health
        whole, new = observe(whole, series(step), settings=SETTINGS, iteration=step)
        raised += new
    assert raised == alarms(series, steps=40)


def test_a_run_that_goes_on_with_a_longer_window_keeps_its_start() -> None:
    """Iterations 0 to 99 in windows of 5: the next ones are no part of the start."""
    state = HealthState()
    for step in range(110):
        window = 5 if step < 100 else 10
        settings = SETTINGS.model_copy(update={"window": window})
        state, _ = observe(state, {"entropy": 1.0 + step}, settings=settings, iteration=step)
    assert state.series["entropy"].first == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert state.series["entropy"].last[-10:] == [101.0 + n for n in range(10)]


def test_the_state_does_not_grow_with_the_run() -> None:
    state, sizes = HealthState(), []
    for step in range(200):
        state, _ = observe(state, sound(step), settings=SETTINGS, iteration=step)
        sizes.append(len(state.model_dump_json()))
    assert max(sizes[150:]) < 1.1 * max(sizes[20:50])


def test_conditions_found_elsewhere_are_alarms_too() -> None:
    found = {"logprob_mismatch": "0.4 nats apart"}
    state, [alarm] = observe(HealthState(), {}, settings=SETTINGS, iteration=2, found=found)
    assert (alarm.name, alarm.action, alarm.reason) == ("logprob_mismatch", "stop", "0.4 nats apart")
    assert alarm.title == "PPO: logprob mismatch at iteration 2"
    assert len(alarm.title) < 64, "W&B refuses longer ones"
    state, raised = observe(state, {}, settings=SETTINGS, iteration=3, found=found)
    assert raised == []
    assert observe(state, {}, settings=SETTINGS, iteration=4)[0].active == {}


def test_flat_gold_with_a_rising_score_is_no_drift() -> None:
    """Of 200 gold scorers that tell nothing, over 20 measurements, the alarm may believe one in ten."""
    false = 0
    for seed in range(200):
        draw = random.Random(seed)
        values = [{"gold_mean": draw.gauss(0, 1), "gold_training_mean": 0.3 * step} for step in range(20)]
        false += any(alarms(lambda step, values=values: values[step], steps=20))
    assert false <= 20


@pytest.mark.parametrize("seed", range(5))
def test_trend_is_the_t_statistic_of_a_regression(seed: int) -> None:
    draw = random.Random(seed)
    values = [0.3 * step + draw.gauss(0, 2) for step in range(5 + seed)]
    (slope, _), covariance = np.polyfit(range(len(values)), values, 1, cov=True)
    assert trend(values) == pytest.approx(slope / covariance[0, 0] ** 0.5, rel=1e-6)


def test_trend_by_hand() -> None:
    # 0 1 1 2: slope 0.6, residuals -0.1 0.3 -0.3 0.1, s^2 = 0.2 / 2, standard error sqrt(0.1 / 5)
    assert trend([0, 1, 1, 2]) == pytest.approx(0.6 / (0.1 / 5) ** 0.5)
    assert trend([1, 2, 3]) == float("inf")
    assert trend([3, 2, 1]) == float("-inf")
    assert trend([2, 2, 2]) == 0
