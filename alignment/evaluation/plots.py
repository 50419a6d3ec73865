"""The plots of a report as SVG text: the same numbers give the same bytes. Shares are drawn in percent.

A rate is the JSON of `reward.metrics.Rate`; one without value is left out of its plot, never drawn as 0.
"""

from __future__ import annotations

import io
import itertools
import warnings
from typing import TYPE_CHECKING, Any, cast

from alignment.evaluation.wording import visible

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from alignment.evaluation.collect import JsonObject

MAX_LABEL = 32

INK, MUTED, RULE = "#22262b", "#6b7280", "#e3e5e8"
VIOLATION = ("#b4472e", "#d98a6a", "#7d3a5d", "#c9a227", "#8a6d5c")
REFUSAL, BEFORE, AFTER, GOOD = "#2c6a9f", "#9aa3ad", "#22577a", "#3b7d5b"

_FONT = "system-ui, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#c3c8ce",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "white",
}
_ERROR_BAR: dict[str, Any] = {"elinewidth": 1.4, "capsize": 2.5, "fmt": "none"}


def trade_off(points: Sequence[tuple[str, JsonObject, JsonObject]]) -> str | None:
    """The two rates against each other: (checkpoint, violation rate, false-refusal rate), in the order of training."""
    known = [point for point in points if point[1]["value"] is not None and point[2]["value"] is not None]
    if not known:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        xs = [100 * x_rate["value"] for _, x_rate, _ in known]
        ys = [100 * y_rate["value"] for _, _, y_rate in known]
        axes.plot(xs, ys, color="#c3c8ce", linewidth=1.2, zorder=1)
        for position, (name, x_rate, y_rate) in enumerate(known):
            color = AFTER if position == len(known) - 1 else BEFORE
            x, y = xs[position], ys[position]
            axes.errorbar(
                [x], [y], xerr=_errors([x_rate]), yerr=_errors([y_rate]), ecolor=color, alpha=0.55, **_ERROR_BAR
            )
            axes.plot([x], [y], "o", color=color, markersize=8, markeredgecolor="white", zorder=3)
            axes.annotate(_short(name), (x, y), xytext=(7, 7), textcoords="offset points", weight="bold", zorder=4)
        axes.set_xlabel("violation rate, % of adversarial prompts")
        axes.set_ylabel("false-refusal rate, % of benign prompts")
        axes.set_xlim(0, max(10.0, *(115 * x_rate["high"] for _, x_rate, _ in known)))
        axes.set_ylim(0, max(10.0, *(115 * y_rate["high"] for _, _, y_rate in known)))

    return _svg(draw, width=5.2, height=3.9)


def rate_bars(checkpoints: Sequence[str], series: Mapping[str, Sequence[JsonObject]], *, last_is_refusal: bool) -> str:
    """Grouped bars with intervals: a group per checkpoint, a bar per measure."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        width = 0.8 / len(series)
        for number, (label, rates) in enumerate(series.items()):
            refusal = last_is_refusal and number == len(series) - 1
            color = REFUSAL if refusal else VIOLATION[number % len(VIOLATION)]
            shown = [(position, rate) for position, rate in enumerate(rates) if rate["value"] is not None]
            xs = [position + (number - (len(series) - 1) / 2) * width for position, _ in shown]
            ys = [100 * rate["value"] for _, rate in shown]
            axes.bar(xs, ys, width=width * 0.9, color=color, label=_short(label))
            axes.errorbar(xs, ys, yerr=_errors([rate for _, rate in shown]), ecolor="#22262b99", **_ERROR_BAR)
        axes.set_xticks(range(len(checkpoints)), [_short(name) for name in checkpoints], color=INK)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel("% of answers")
        axes.set_ylim(0, 100)
        figure.legend(loc="outside upper left", ncols=2, fontsize=8.5, handlelength=1, handleheight=1)

    return _svg(draw, width=5.2, height=3.9)


def before_and_after(
    groups: Mapping[str, tuple[JsonObject, JsonObject]], *, before: str, after: str, rate_name: str
) -> str:
    """Two dots per group: the first checkpoint's rate above the last one's."""
    bottom_up = list(groups.items())[::-1]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for name, color in {before: BEFORE, after: AFTER}.items():
            axes.plot([], [], "o", color=color, markersize=7, label=_short(name))
        for row, (first, last) in enumerate(rates for _, rates in bottom_up):
            for rate, color, shift in ((first, BEFORE, 0.16), (last, AFTER, -0.16)):
                if rate["value"] is None:
                    continue
                x, y = [100 * rate["value"]], [row + (shift if before != after else 0)]
                axes.errorbar(x, y, xerr=_errors([rate]), ecolor=color, alpha=0.6, **_ERROR_BAR)
                axes.plot(x, y, "o", color=color, markersize=7, clip_on=False)
        axes.set_yticks(range(len(groups)), [_short(name) for name, _ in bottom_up], color=INK)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(groups) - 0.4)
        axes.set_xlabel(f"{rate_name}, %")
        figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, handletextpad=0.2)

    return _svg(draw, width=5.2, height=1.3 + 0.42 * len(groups))


def pair_accuracies(report: JsonObject) -> str:
    """Accuracy of a reward model by group, from `reward.metrics.pair_report`."""
    groups = {"all pairs": report["accuracy"]}
    for key in ("by_rating", "by_safety_bin", "by_risk_category"):
        groups |= {name.replace("_", " "): rate for name, rate in report[key].items()}
    return accuracies(groups, baseline=report["length_baseline"]["value"])


def accuracies(rates: Mapping[str, JsonObject], *, baseline: float | None) -> str:
    """Accuracy of a reward model by group, with the line of guessing and that of preferring the longer answer."""
    bottom_up = list(rates.items())[::-1]

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        shown = [(row, rate) for row, (_, rate) in enumerate(bottom_up) if rate["value"] is not None]
        rows, xs = [row for row, _ in shown], [100 * rate["value"] for _, rate in shown]
        axes.errorbar(xs, rows, xerr=_errors([rate for _, rate in shown]), ecolor=AFTER, alpha=0.6, **_ERROR_BAR)
        axes.plot(xs, rows, "o", color=AFTER, markersize=7, clip_on=False)
        axes.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="guessing")
        if baseline is not None:
            axes.axvline(
                100 * baseline, color=VIOLATION[0], linewidth=1.2, linestyle=(0, (4, 3)), label="longer answer"
            )
        axes.set_yticks(range(len(rates)), [_short(name) for name, _ in bottom_up], color=INK)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(rates) - 0.4)
        axes.set_xlabel("accuracy on held-out pairs, %")
        figure.legend(loc="outside upper right", ncols=2, fontsize=8.5)

    return _svg(draw, width=5.2, height=1.2 + 0.3 * len(rates))


def curves(steps: Sequence[int], panels: Mapping[str, Sequence[float | None]], *, unit: str = "iteration") -> str:
    """Small multiples over the steps of a training; one without value is a gap. `unit`: what a step is."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        for axes, (title, values) in zip(
            figure.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False
        ):
            known = [float("nan") if value is None else value for value in values]
            axes.plot(steps, known, color=AFTER, linewidth=1.5, marker="o", markersize=2.5)
            axes.set_title(title, color=INK)
            axes.margins(y=0.15)
        for axes in list(figure.axes)[len(panels) :]:
            axes.set_visible(False)
        figure.supxlabel(unit, fontsize=9, color=MUTED)

    return _svg(draw, width=10, height=2.15 * lines + 0.3)


def probe_rates(rates: Mapping[str, Sequence[tuple[int, float, float, float]]]) -> str:
    """Title -> (iteration, rate, low, high) of each measurement, side by side; the violation rate first."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(rates), squeeze=False).flat
        for axes, color, (title, points) in zip(panels, (VIOLATION[0], REFUSAL), rates.items(), strict=False):
            steps = [step for step, *_ in points]
            value, low, high = ([100 * point[column] for point in points] for column in (1, 2, 3))
            axes.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(steps, value, color=color, linewidth=1.5, marker="o", markersize=3.5)
            axes.set_title(title, color=INK)
            axes.set_ylim(0, 100)
        figure.supxlabel("iteration", fontsize=9, color=MUTED)

    return _svg(draw, width=7.5, height=2.6)


def score_scatter(scores: JsonObject, *, before: str, after: str) -> str:
    """Each prompt's score before (x) and after (y), with the box of prompts that went from unsafe to safe."""

    def draw(figure: Any) -> None:
        from matplotlib.patches import Rectangle

        axes = figure.subplots()
        low, high = scores["unsafe_below"], scores["safe_above"]
        axes.add_patch(Rectangle((0, high), low, 1 - high, facecolor="#3b7d5b1f", edgecolor=GOOD, linewidth=1.1))
        axes.plot([0, 1], [0, 1], color="#c3c8ce", linewidth=1)
        xs, ys = zip(*scores["points"], strict=True)
        axes.plot(xs, ys, "o", color=AFTER, markersize=5, alpha=0.5, markeredgewidth=0, clip_on=False)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.set_xlabel(f"score of the answer of {_short(before)}")
        axes.set_ylabel(f"score of the answer of {_short(after)}")

    return _svg(draw, width=4.4, height=4.2)


def gain_scatter(pairs: Sequence[Sequence[float]]) -> str:
    """What a safety preprompt changes (y) at each score of the plain answer (x), as figure 16b of Llama 2."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axhline(0, color="#aab1b9", linewidth=1)
        for better, color, label in ((True, GOOD, "better with the preprompt"), (False, VIOLATION[0], "no better")):
            points = [(plain, guided - plain) for plain, guided in pairs if (guided > plain) == better]
            axes.plot(*zip(*points, strict=True) if points else ([], []), "o", color=color, label=label, **_DOT)
        axes.set_xlabel("score of the plain answer")
        axes.set_ylabel("change with the preprompt")
        figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, handletextpad=0.2)

    return _svg(draw, width=5.2, height=3.8)


def calibration_curve(curve: JsonObject, *, happened: str) -> str | None:
    """How often it happened against the probability given, above the number of cases in each bin."""
    bins = [part for part in curve["bins"] if part["rate"]["n"]]
    if not bins:
        return None

    def draw(figure: Any) -> None:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        xs, rates = [100 * part["mean_probability"] for part in bins], [part["rate"] for part in bins]
        ys = [100 * rate["value"] for rate in rates]
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="calibrated")
        axes.errorbar(xs, ys, yerr=_errors(rates), ecolor=AFTER, alpha=0.6, **_ERROR_BAR)
        axes.plot(xs, ys, "o-", color=AFTER, markersize=6, linewidth=1.2, clip_on=False)
        axes.set_ylabel(f"{happened}, %")
        axes.set_ylim(0, 100)
        middles = [50 * (part["low"] + part["high"]) for part in bins]
        width = 100 * (bins[0]["high"] - bins[0]["low"])
        below.bar(middles, [rate["n"] for rate in rates], width=0.9 * width, color=BEFORE)
        below.set_ylabel("cases")
        below.set_xlim(0, 100)
        below.set_xlabel("probability given by the scorer, %")
        figure.legend(loc="outside upper right", fontsize=8.5)

    return _svg(draw, width=5.2, height=4.3)


def score_histograms(histogram: JsonObject | None, *, x_label: str) -> str | None:
    """Counts of two groups of answers by score, the better group first."""
    if histogram is None:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        edges = histogram["edges"]
        for (name, counts), color in zip(histogram["counts"].items(), (GOOD, VIOLATION[0]), strict=True):
            axes.stairs(counts, edges, fill=True, color=color, alpha=0.3)
            axes.stairs(counts, edges, color=color, linewidth=1.3, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel("answers")
        axes.locator_params(axis="y", integer=True)
        figure.legend(loc="outside upper right", ncols=2, fontsize=8.5, handlelength=1.2)

    return _svg(draw, width=5.2, height=3.4)


def score_cells(second: JsonObject, *, x: str, y: str) -> str | None:
    """Scores of the same answers by scorers `x` and `y`: a dot per cell, its area grows with the number of answers."""
    if not second["cells"]:
        return None
    groups = {"safe": GOOD, "unsafe": VIOLATION[0], "unlabelled": MUTED}
    most = max(sum(cell[name] for name in groups) for cell in second["cells"])

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        middles = {
            side: [(low + high) / 2 for low, high in itertools.pairwise(second[f"{side}_edges"])] for side in "xy"
        }
        for name, color in groups.items():
            cells = [cell for cell in second["cells"] if cell[name]]
            if cells:
                axes.scatter(
                    [middles["x"][cell["x"]] for cell in cells],
                    [middles["y"][cell["y"]] for cell in cells],
                    s=[130 * cell[name] / most for cell in cells],
                    color=color,
                    alpha=0.55,
                    linewidths=0,
                )
                axes.plot([], [], "o", color=color, label=name)
        axes.set_xlim(second["x_edges"][0], second["x_edges"][-1])
        axes.set_ylim(second["y_edges"][0], second["y_edges"][-1])
        axes.set_xlabel(f"score by {_short(x)}")
        axes.set_ylabel(f"score by {_short(y)}")
        figure.legend(loc="outside upper right", ncols=3, fontsize=8.5, handletextpad=0.2)

    return _svg(draw, width=4.8, height=4.6)


def roc_curves(curves: Mapping[str, Sequence[JsonObject]]) -> str | None:
    """Unsafe answers that are found against safe ones that are called unsafe, a line a scorer."""
    if not curves:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="guessing")
        for (name, points), color in zip(curves.items(), itertools.cycle((AFTER, *VIOLATION))):
            xs, ys = ([100 * point[key] for point in points] for key in ("false_alarms", "found"))
            axes.plot(xs, ys, color=color, linewidth=1.5, label=_short(name))
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        axes.set_aspect("equal")
        axes.set_xlabel("safe answers called unsafe, %")
        axes.set_ylabel("unsafe answers called unsafe, %")
        figure.legend(loc="outside upper left", ncols=2, fontsize=8.5)

    return _svg(draw, width=4.6, height=4.8)


def confusion_bars(confusions: Mapping[str, JsonObject]) -> str:
    """What scorers call the answers that people labelled safe, and those labelled unsafe: two stacked bars a scorer."""
    bars = [
        (f"{_short(name)}: {label}", label, counts[label]) for name, counts in confusions.items() for label in counts
    ]
    colors = {"right": GOOD, "wrong": VIOLATION[0], "no decision": BEFORE}

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        for row, (_, label, counts) in enumerate(bars[::-1]):
            start, total = 0.0, sum(counts.values()) or 1
            other = "unsafe" if label == "safe" else "safe"
            for (name, color), key in zip(colors.items(), (label, other, "no_decision"), strict=True):
                share = 100 * counts[key] / total
                axes.barh([row], [share], left=[start], color=color, height=0.7, label=name if row == 0 else None)
                start += share
        axes.set_yticks(range(len(bars)), [name for name, _, _ in bars[::-1]], color=INK)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 100)
        axes.set_xlabel("% of the answers with this label")
        figure.legend(loc="outside upper right", ncols=3, fontsize=8.5, handlelength=1, handleheight=1)

    return _svg(draw, width=5.2, height=1.2 + 0.3 * len(bars))


_DOT: dict[str, Any] = {"markersize": 5, "alpha": 0.55, "markeredgewidth": 0}


def _short(name: str) -> str:
    """A name as a label; the whole of it stands in the tables."""
    text = visible(name)
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "…"


def _errors(rates: Sequence[JsonObject]) -> list[list[float]]:
    """Distances from the values to the bounds of their intervals."""
    lower = [100 * max(0.0, rate["value"] - rate["low"]) for rate in rates]
    return [lower, [100 * max(0.0, rate["high"] - rate["value"]) for rate in rates]]


def _svg(draw: Callable[[Any], None], *, width: float, height: float) -> str:
    """The drawing as an `<svg>` element: no date, no version, no address; text stays text, in the reader's own font."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(cast("Any", _STYLE)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the reader's font draws the text
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue().replace("'DejaVu Sans'", _FONT)
    return text[text.index("<svg") :]
