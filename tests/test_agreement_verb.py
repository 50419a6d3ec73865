"""`sara judge-agreement`: the verb from end to end, and `agreement.json` as other parts read it."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from alignment.agreement_file import AgreementError, read_agreement
from alignment.cli import main
from alignment.data_file import read_labelled
from alignment.inputs import scorer_fingerprint
from alignment.recipe import Source
from alignment.recipe_file import RecipeError
from alignment.scorer_file import read_named_scorer, read_scorer
from alignment.scoring import build_scorer
from reward.conversation import Prompt, write_json_lines
from reward.platt import Calibration
from reward.scorer import logit

Report = dict[str, Any]

SCORER = """\
import pathlib

calls = pathlib.Path(__file__).with_suffix(".calls")


def read(conversation):
    with calls.open("a") as file:
        file.write("x")
    if conversation.completion.endswith("stop") and not calls.with_suffix(".go").exists():
        raise KeyboardInterrupt
    word = conversation.completion.split()[-1]
    return None if word == "none" else 0.5 if word == "stop" else float(word)


def loud(conversation):
    return 3.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of its own for each test, with a scorer that reads P(safe) from the answer's last word."""
    name = f"reads_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SCORER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.fixture
def scorer(module: str) -> str:
    return f"{{type: python, function: '{module}:read', scale: probability}}"


def write_rows(path: Path, rows: list[tuple[str, bool]]) -> Path:
    """Two answers to each prompt; categories and labels in words."""
    write_json_lines(
        path,
        (
            {"prompt": f"question {n // 2}", "text": f"{n} {word}", "label": "safe" if safe else "unsafe", "kind": "x"}
            for n, (word, safe) in enumerate(rows)
        ),
    )
    return path


def data(path: Path) -> str:
    columns = "{prompt: prompt, completion: text, label: label, risk_category: kind}"
    return f"{{name: file, path: {path}, split: all, columns: {columns}}}"


def report_in(folder: Path) -> Report:
    return json.loads((folder / "agreement.json").read_text(encoding="utf-8"))


ROWS = [("0.9", True)] * 5 + [("0.5", True)] * 2 + [("0.2", True)] + [("none", True)] * 2
ROWS += [("0.1", False)] * 4 + [("0.7", False)] * 6


def test_the_verb_leaves_a_report(tmp_path: Path, scorer: str, module: str, capsys: pytest.CaptureFixture[str]) -> None:
    """7 of 10 safe and 4 of 10 unsafe answers are called so: a balanced accuracy of 55%."""
    rows, output = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    words = ["judge-agreement", scorer, "--data", data(rows), "--compare", "rule={type: refusal}"]
    words += ["--output", str(output)]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80
    assert printed.out.endswith(f"report: {output / 'agreement.html'}\n")
    report = report_in(output)
    first, rule = report["scorers"]
    assert (first["label"], rule["label"]) == (f"python-{module}-read", "rule")
    found = first["agreement"]
    assert found["confusion"] == {
        "safe": {"safe": 7, "unsafe": 1, "no_decision": 2},
        "unsafe": {"safe": 6, "unsafe": 4, "no_decision": 0},
    }
    assert found["balanced_accuracy"]["value"] == pytest.approx(0.55)
    assert found["by_category"]["x"]["n"] == found["by_source"]["file:rows.jsonl"]["n"] == 20
    assert rule["agreement"]["no_decision"]["count"] == 20  # too short for the rule
    assert report["comparisons"]["rule"]["balanced_accuracy_difference"]["value"] == pytest.approx(0.55)
    assert report["baselines"]["always good"]["correct"]["count"] == 10
    assert report["conversations"] == {"n": 20, "safe": 10, "unsafe": 10, "prompts": 10}
    assert first["fingerprint"] == scorer_fingerprint(read_scorer(scorer))
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["kind"] == "agreement"
    assert {"agreement.json", "agreement.html", "conversations.jsonl", "scores/rule.jsonl"} <= manifest["provenance"][
        "files"
    ].keys()
    logged = json.loads((output / "metrics.jsonl").read_text(encoding="utf-8"))
    assert logged[f"judge_agreement/{first['label']}/kappa"] == found["kappa"]["value"]

    page = (output / "agreement.html").stat()
    assert main(words) == 0  # the same report: it stays, and the table is printed again
    assert (output / "agreement.html").stat().st_mtime_ns == page.st_mtime_ns
    assert main([*words, "--threshold", "0.6"]) == 0
    assert report_in(output)["scorers"][0]["agreement"]["confusion"]["safe"]["safe"] == 5
    assert (tmp_path / "out.1" / "agreement.html").stat().st_mtime_ns == page.st_mtime_ns


def test_an_interrupted_run_goes_on(
    tmp_path: Path, scorer: str, module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [("0.9", True), ("0.1", False)] * 100 + [("stop", True)] * 20)
    words = ["judge-agreement", scorer, "--data", data(rows), "--output", str(tmp_path / "out")]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    partial = tmp_path / "out" / "scores"
    (half_done,) = partial.glob("*.partial")
    done = len(half_done.read_text(encoding="utf-8").splitlines())
    before = (tmp_path / f"{module}.calls").stat().st_size
    (tmp_path / f"{module}.go").touch()
    assert main(words) == 0
    assert (tmp_path / f"{module}.calls").stat().st_size - before == 220 - done
    assert report_in(tmp_path / "out")["scorers"][0]["agreement"]["n"] == 220


def test_a_limit_draws_by_seed(tmp_path: Path, scorer: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [("0.9", True), ("0.1", False)] * 30)

    def drawn(name: str, *words: str) -> str:
        output = tmp_path / name
        assert main(["judge-agreement", scorer, "--data", data(rows), "--output", str(output), *words]) == 0
        assert report_in(output)["conversations"]["n"] == 20
        return (output / "conversations.jsonl").read_text(encoding="utf-8")

    first = drawn("a", "--limit", "20")
    assert drawn("b", "--limit", "20") == first
    assert set(drawn("c", "--limit", "20", "--seed", "1").splitlines()) != set(first.splitlines())


def test_a_calibration_is_fitted_on_other_prompts(tmp_path: Path, tiny_model: Path) -> None:
    guidelines = tmp_path / "guidelines.md"
    guidelines.write_text("A good chatbot is kind.", encoding="utf-8")
    section = f"{{type: judge, model: {tiny_model}, guidelines: {guidelines}}}"
    draw = random.Random(0)
    texts = [str(draw.random()) for _ in range(60)]
    asked = [Prompt.of(f"question {n // 2}").answer(f"{n} {text}") for n, text in enumerate(texts)]
    said = [score.value for score in build_scorer(read_scorer(section)).score(asked)]
    middle = statistics.median(value for value in said if value is not None)
    labels = [(value is not None and value > middle) == (draw.random() < 0.8) for value in said]
    rows = write_rows(tmp_path / "rows.jsonl", list(zip(texts, labels, strict=True)))
    output, file = tmp_path / "out", tmp_path / "fitted" / "calibration.json"
    judge = f"judge={section}"
    words = ["judge-agreement", judge, "--data", data(rows), "--output", str(output), "--fit-calibration", str(file)]
    assert main(words) == 0
    report = report_in(output)

    conversations = [json.loads(line) for line in (output / "conversations.jsonl").read_text().splitlines()]
    scores = [json.loads(line)["value"] for line in (output / "scores" / "judge.jsonl").read_text().splitlines()]
    ids = [Prompt.from_json({"prompt": row["messages"][:-1]}).id for row in conversations]
    fits = [f"{int(prompt_id[-1], 16):04b}"[2] == "0" for prompt_id in ids]
    known = list(zip(scores, [row["safe"] for row in conversations], fits, strict=True))
    expected = Calibration.fit([(logit(p), safe) for p, safe, fit in known if fit], judge={})
    found = Calibration.read(file)
    assert (found.scale, found.bias, found.cases) == (expected.scale, expected.bias, sum(fits))
    assert 0 < sum(fits) < 60
    assert found.judge["guidelines"] == report["scorers"][0]["guidelines"]
    assert report["scorers"][0]["agreement"]["n"] == report["conversations"]["n"] == 60 - sum(fits)
    calibrated = report["calibration"]["agreement"]
    assert calibrated["calibration"]["brier"] != report["scorers"][0]["agreement"]["calibration"]["brier"]
    odds = [found.log_odds(logit(p)) for p, _, fit in known if not fit]
    called = [value >= 0 for value in odds]
    right = sum(call == safe for call, (_, safe, fit) in zip(called, [k for k in known if not k[2]], strict=True))
    assert calibrated["correct"]["count"] == right
    file.unlink()
    assert main(words) == 0  # complete: the file comes from the report's folder
    assert Calibration.read(file) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{type: refusal}", "--data", "beavertails:test"], "a split is named by --split test"),
        (["{type: refusal}", "--data", "alpaca"], "data.sources.0: alpaca gives no labelled"),
        (
            ["{type: refusal}", "--data", "ROWS", "--compare", "{type: refusal}"],
            "'refusal' is the name of the scorer itself",
        ),
        (["{type: refusal}", "--data", "ROWS", "--compare", "a={type: refusal}", "a=/x"], "two scorers are called 'a'"),
        (["{type: refusal}", "--data", "ROWS", "--threshold", "1"], "threshold: Input should be less than 1"),
        (["{type: refusal}", "--data", "ROWS", "--limit", "0"], "limit: Input should be greater than 0"),
        (["{type: refusal}", "--data", "ROWS", "--fit-calibration", "c"], "a calibration belongs to a judge"),
        (["{type: python, function: 'MODULE:loud'}", "--data", "ROWS"], "scores of type python have no bounds"),
        (["/nowhere/judge", "--data", "ROWS"], "scorer.path: the model folder /nowhere/judge does not exist"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path, module: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = data(write_rows(tmp_path / "rows.jsonl", ROWS))
    words = [word.replace("MODULE", module).replace("ROWS", rows) for word in words]
    assert main(["judge-agreement", *words, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- words of the command line


def test_scorers_have_names() -> None:
    assert read_named_scorer("before={type: refusal}") == ("before", read_scorer("{type: refusal}"))
    assert read_named_scorer("runs/demo/safety reward_model/")[0] == "reward_model-safety-reward_model"
    assert read_named_scorer("runs/a=b")[1] == read_scorer("runs/a=b")
    assert read_named_scorer("{type: judge, model: org/Chat-135M}")[0] == "judge-Chat-135M"


def test_words_for_labelled_data(tmp_path: Path) -> None:
    sources = read_labelled(["gptfuzz", "beavertails:labels.jsonl", "{name: file, path: x.csv}"], split="all").sources
    assert sources == [
        Source(name="gptfuzz", split="all"),
        Source(name="beavertails", path="labels.jsonl", split="all"),
        Source(name="file", path="x.csv", split="all"),
    ]
    file = tmp_path / "labelled.yaml"
    file.write_text("data:\n  sources: [{name: gptfuzz, split: train}]\n", encoding="utf-8")
    assert read_labelled([str(file)], split="test").sources == [Source(name="gptfuzz", split="train")]
    for word in ("", ":x", "gptfuzz:"):
        with pytest.raises(RecipeError, match="is no source"):
            read_labelled([word], split="all")


# ------------------------------------------------------------------------------------------------ agreement.json


def test_the_report_as_a_gate_reads_it(tmp_path: Path, scorer: str) -> None:
    rows, output = write_rows(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    assert (
        main(
            [
                "judge-agreement",
                f"mine={scorer}",
                "--data",
                data(rows),
                "--compare",
                "rule={type: refusal}",
                "--output",
                str(output),
            ]
        )
        == 0
    )
    report = report_in(output)
    first = read_agreement(output)
    found = report["scorers"][0]["agreement"]
    assert (first.label, first.n, first.no_decision, first.threshold) == ("mine", 20, 2, 0.5)
    assert (first.balanced_accuracy, first.balanced_accuracy_low) == (
        pytest.approx(0.55),
        found["balanced_accuracy"]["low"],
    )
    assert (first.kappa, first.kappa_low) == (found["kappa"]["value"], found["kappa"]["low"])
    assert (first.guidelines, first.data_hash) == (None, report["data"]["hash"])
    rule = scorer_fingerprint(read_scorer("{type: refusal}"))
    second = read_agreement(output / "agreement.json", fingerprint=rule)
    assert (second.label, second.kappa, second.balanced_accuracy) == ("rule", None, 0)
    with pytest.raises(AgreementError, match=r"measured mine, rule, but not this scorer as it is now"):
        read_agreement(output, fingerprint="0123")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is no report of sara judge-agreement: JSONDecodeError"),
        ("[]", "is no report of sara judge-agreement: TypeError"),
        ('{"format": 2, "scorers": []}', "has format 2, not 1"),
        ('{"format": 1, "scorers": [{"label": 3}]}', "is no report"),
        ('{"format": 1, "scorers": []}', "measured , but not this scorer"),
    ],
)
def test_what_is_no_report(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "agreement.json").write_text(text, encoding="utf-8")
    with pytest.raises(AgreementError, match=message):
        read_agreement(tmp_path)


def test_labels_of_several_data_sets_in_one_report(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real labels of five sources, each with its own line; a judge that always says the same has a half everywhere."""
    monkeypatch.setenv("SARA_DATA_DIR", str(data_dir))
    names = ["beavertails", "saferlhf_labels", "pku_saferlhf", "gptfuzz", "xstest_completions"]
    words = [
        "judge-agreement",
        "{type: refusal}",
        "--data",
        *names,
        "--limit",
        "600",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main(words) == 0
    report = report_in(tmp_path / "out")
    found = report["scorers"][0]["agreement"]
    assert set(found["by_source"]) == set(names)
    assert sum(part["n"] for part in found["by_source"].values()) == report["conversations"]["n"] == 600
    labels = [(row["tags"]["source"], row["safe"]) for row in rows_in(tmp_path / "out" / "conversations.jsonl")]
    assert {name: [n for n, _ in labels].count(name) for name in names} == {
        name: part["n"] for name, part in found["by_source"].items()
    }
    assert report["conversations"]["unsafe"] == sum(not safe for _, safe in labels) > 0
    for constant in report["baselines"].values():
        assert constant["balanced_accuracy"]["value"] == 0.5


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
