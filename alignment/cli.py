"""`sara`: the verbs that need no launcher."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from alignment.artifact import ArtifactError
from alignment.inputs import InputError
from alignment.judge_cli import JUDGE_VERBS, add_judge_verbs
from alignment.pipeline import run_pipeline
from alignment.plan_cli import add_plan, run_plan
from alignment.recipe_file import Arguments, RecipeError, load_pipeline, load_recipe
from alignment.reward_cli import VERBS, add_verbs
from alignment.source_files import SourceError
from reward.scorer import ScorerError

EXIT_BAD_INPUT = 2


def main(words: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a recipe or an input cannot be used, 75 stopped, else that of the step that failed."""
    try:
        arguments, overrides = _parser().parse_known_args(sys.argv[1:] if words is None else words)
        if arguments.verb == "pipeline":
            return _pipeline(arguments.recipe, overrides, dry_run=arguments.dry_run)
        if arguments.verb == "plan":
            return run_plan(arguments, overrides)
        if arguments.verb == "check":
            from alignment.__main__ import dry_run

            return dry_run(load_recipe(arguments.recipe, overrides))
        if overrides:
            raise RecipeError(f"command line: {overrides[0]!r} is no option of {arguments.verb}")
        if arguments.verb == "convert-checkpoint":
            return _convert(arguments.output_dir, processes=arguments.processes)
        if arguments.verb in VERBS | JUDGE_VERBS:
            return (VERBS | JUDGE_VERBS)[arguments.verb](arguments)
        return _report(arguments.run_dir)
    except (RecipeError, InputError, ArtifactError, SourceError, ScorerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = Arguments(prog="sara", description="Safety alignment after Llama 2.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    pipeline = verbs.add_parser("pipeline", help="run the steps of a pipeline in order")
    pipeline.add_argument("recipe", type=Path, metavar="PIPELINE.yaml")
    pipeline.add_argument("--dry-run", action="store_true", help="check everything and say what would run")
    report = verbs.add_parser("report", help="write report.html and report.json of a run folder")
    report.add_argument("run_dir", type=Path)
    check = verbs.add_parser("check", help="check the recipe of one stage and print it with its defaults")
    check.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="overrides may follow")
    convert = verbs.add_parser("convert-checkpoint", help="let an interrupted PPO stage go on with other processes")
    convert.add_argument("output_dir", type=Path, help="of the stage, in which `checkpoints` lies")
    convert.add_argument("--processes", type=int, required=True, help="how many the stage will be started with")
    add_plan(verbs)
    add_verbs(verbs)
    add_judge_verbs(verbs)
    return parser


def _convert(output_dir: Path, *, processes: int) -> int:
    from alignment.convert import convert_checkpoints

    for checkpoint in convert_checkpoints(output_dir, processes=processes):
        print(f"{checkpoint}: processes {processes}")
    return 0


def _pipeline(path: Path, overrides: Sequence[str], *, dry_run: bool) -> int:
    pipeline = load_pipeline(path, overrides)
    started = time.monotonic()
    code = run_pipeline(pipeline, dry_run=dry_run)
    if code == 0 and pipeline.report and not dry_run:
        print(f"\nfinished in {(time.monotonic() - started) / 60:.1f} minutes")
        return _report(Path(pipeline.run_dir))
    return code


def _report(run_dir: Path) -> int:
    import json

    from rich.console import Console

    from alignment.evaluation.report import build_report, summary_table

    page = build_report(run_dir)
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    Console().print(summary_table(report))
    print(f"report: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
