"""The verbs of `sara` that look at judges: how far they agree with people, and how far attacks move them."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.data_file import read_labelled
from alignment.inputs import check_inputs
from alignment.recipe_agreement import JudgeAgreementRecipe
from alignment.recipe_attack import JudgeAttackRecipe
from alignment.recipe_file import RecipeError, validate
from alignment.recipe_scorers import ScorerSpec
from alignment.reward_cli import SCORER_HELP
from alignment.scorer_file import read_named_scorer, read_scorer


def add_judge_verbs(verbs: Any) -> None:
    """Add the parsers of `JUDGE_VERBS` to `verbs`, the subparsers of `sara`."""
    agreement = verbs.add_parser(
        "judge-agreement",
        help="measure a judge, or any scorer, against human labels; agreement.html and agreement.json",
    )
    agreement.add_argument("scorer", metavar="[NAME=]SCORER", help=SCORER_HELP)
    agreement.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE[:PATH]",
        help="sources with human labels, a source in braces, or one YAML file with a data section",
    )
    agreement.add_argument("--split", default="test", help="of every source (default: %(default)s)")
    agreement.add_argument("--limit", type=int, help="so many conversations, drawn by --seed (default: all)")
    agreement.add_argument("--seed", type=int, default=42)
    agreement.add_argument(
        "--compare", nargs="+", default=[], metavar="[NAME=]SCORER", help="others on the same conversations"
    )
    agreement.add_argument(
        "--threshold", type=float, default=0.5, help="P(safe) from which on an answer is called safe (default: 0.5)"
    )
    agreement.add_argument(
        "--fit-calibration",
        type=Path,
        metavar="FILE",
        help="fit a calibration of the judge on half of the prompts, report on the other half",
    )
    agreement.add_argument("--output", required=True, metavar="DIR", help="what else is there moves to DIR.1")
    agreement.add_argument("--wandb", action="store_true", help="log to W&B as well")
    _add_attack(verbs)


def _agreement(arguments: argparse.Namespace) -> int:
    """Measure, unless the folder holds this very report already, and print the table."""
    import json

    from rich.console import Console

    from alignment.__main__ import quiet_libraries
    from alignment.agreement_file import AGREEMENT_JSON
    from alignment.evaluation.agreement_report import AGREEMENT_HTML, CALIBRATION_JSON, run, summary_table
    from alignment.workspace import complete_artifact

    recipe = _recipe(arguments)
    check_inputs(recipe)
    if complete_artifact(recipe) is None:
        quiet_libraries()
        run(recipe)
    folder = Path(arguments.output)
    Console().print(summary_table(json.loads((folder / AGREEMENT_JSON).read_text(encoding="utf-8"))))
    if arguments.fit_calibration is not None:
        arguments.fit_calibration.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / CALIBRATION_JSON, arguments.fit_calibration)
        print(f"calibration: {arguments.fit_calibration}")
    print(f"report: {folder / AGREEMENT_HTML}")
    return 0


def _recipe(arguments: argparse.Namespace) -> JudgeAgreementRecipe:
    name, scorer = read_named_scorer(arguments.scorer)
    values = {
        "output_dir": arguments.output,
        "seed": arguments.seed,
        "name": name,
        "scorer": scorer,
        "compare": _by_name(arguments.compare),
        "data": read_labelled(arguments.data, split=arguments.split),
        "limit": arguments.limit,
        "threshold": arguments.threshold,
        "fit_calibration": arguments.fit_calibration is not None,
        "report_to": "wandb" if arguments.wandb else "none",
    }
    return validate(JudgeAgreementRecipe, values, where="command line")


def _by_name(words: Sequence[str]) -> dict[str, ScorerSpec]:
    scorers: dict[str, ScorerSpec] = {}
    for word in words:
        name, spec = read_named_scorer(word)
        if name in scorers:
            raise RecipeError(f"command line: two scorers are called {name!r}; name them, as in before={word}")
        scorers[name] = spec
    return scorers


def _add_attack(verbs: Any) -> None:
    attack = verbs.add_parser(
        "judge-attack", help="attack a judge, or any scorer, with injected texts; exits 1 if one leaves its slot"
    )
    attack.add_argument("scorer", metavar="SCORER", help=SCORER_HELP)
    attack.add_argument(
        "--data",
        nargs="+",
        default=["starter_safety"],
        metavar="SOURCE[:PATH]",
        help="sources with human labels, or one YAML file with a data section (default: starter_safety)",
    )
    attack.add_argument("--split", default="test", help="of every source (default: %(default)s)")
    attack.add_argument("--families", nargs="+", default=[], metavar="NAME", help="families or kinds (default: all)")
    attack.add_argument("--limit", type=int, default=25, help="transcripts of each label (default: %(default)s)")
    attack.add_argument("--seed", type=int, default=42)
    attack.add_argument("--output", required=True, metavar="DIR", help="what else is there moves to DIR.1")


def _attack(arguments: argparse.Namespace) -> int:
    """Attack, unless the folder holds this very report already, and print the table."""
    import json

    from rich.console import Console

    from alignment.__main__ import quiet_libraries
    from alignment.evaluation.attack_report import ATTACK_HTML, ATTACK_JSON, run, summary_table
    from alignment.workspace import complete_artifact

    values = {
        "output_dir": arguments.output,
        "seed": arguments.seed,
        "scorer": read_scorer(arguments.scorer),
        "data": read_labelled(arguments.data, split=arguments.split),
        "families": arguments.families,
        "limit": arguments.limit,
    }
    recipe = validate(JudgeAttackRecipe, values, where="command line")
    check_inputs(recipe)
    if complete_artifact(recipe) is None:
        quiet_libraries()
        run(recipe)
    folder = Path(arguments.output)
    report = json.loads((folder / ATTACK_JSON).read_text(encoding="utf-8"))
    Console().print(summary_table(report))
    print(f"report: {folder / ATTACK_HTML}")
    return 1 if report["structural"]["flips"] else 0


JUDGE_VERBS: dict[str, Callable[[argparse.Namespace], int]] = {"judge-agreement": _agreement, "judge-attack": _attack}
"""Verb -> what runs it: takes the parsed options, returns the exit code."""
