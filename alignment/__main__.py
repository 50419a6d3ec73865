"""Run one stage:

`accelerate launch --config_file launch/X.yaml -m alignment --config RECIPE.yaml [--section.key value ...]`

Exit codes: 0 done (or complete already), 2 the recipe or an input cannot be used (nothing was loaded), 3 stopped by an
alarm of PPO with everything saved, 75 stopped by SIGTERM with everything saved (the same command goes on), 1 anything
else (one line for a model, scorer, tracker or rollout server that cannot be used, else a traceback).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.artifact import ArtifactError
from alignment.distributed import is_main_process, launched, world_size
from alignment.health import EXIT_UNHEALTHY, Unhealthy
from alignment.inputs import InputError, check_inputs, missing_inputs
from alignment.number_format import check_number_format
from alignment.recipe import StageRecipe
from alignment.recipe_file import Arguments, RecipeError, dump_recipe, load_recipe
from alignment.recipe_fit import check_batches
from alignment.rollout_server import check_rollout_server
from alignment.sharding import check_sharding
from alignment.sources import SourceError, account_lines
from alignment.stopping import EXIT_STOPPED, Stopped
from alignment.workspace import complete_artifact

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


def parse_arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of our own and, apart, the overrides of the recipe."""
    parser = Arguments(prog="alignment", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE.yaml", help="the recipe of the stage")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe and its inputs, print it, load nothing"
    )
    return parser.parse_known_args(words)


def main(words: Sequence[str] | None = None) -> int:
    try:
        arguments, overrides = parse_arguments(sys.argv[1:] if words is None else words)
        recipe = load_recipe(arguments.config, overrides)
        if arguments.dry_run:
            return dry_run(recipe)
        check_inputs(recipe)
        check_batches(recipe, processes=world_size())
        check_sharding(recipe)
        check_number_format(recipe)
        return run(recipe)
    except (RecipeError, InputError, ArtifactError, SourceError) as error:
        if is_main_process():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT


def run(recipe: StageRecipe) -> int:
    if complete_artifact(recipe) is not None:
        if is_main_process():
            print(f"{recipe.output_dir} is complete: same recipe, data and parents", flush=True)
        return 0
    check_rollout_server(recipe)
    quiet_libraries()
    from alignment.embedded import EmbeddedModelError
    from alignment.policy import ModelError
    from alignment.stages import run_stage
    from alignment.tracking import TrackingError
    from alignment.vllm_rollout import RolloutServerError
    from reward.scorer import ScorerError

    try:
        artifact = run_stage(recipe)
    except Unhealthy as alarm:
        if is_main_process():
            print(f"{recipe.output_dir}: {alarm}", file=sys.stderr, flush=True)
        return EXIT_UNHEALTHY
    except Stopped as stopped:
        if is_main_process():
            print(f"{stopped}; all is saved, run the same command to go on", flush=True)
        return EXIT_STOPPED
    except (ModelError, EmbeddedModelError, ScorerError, TrackingError, RolloutServerError) as error:
        print(f"error: {recipe.output_dir}: {error}", file=sys.stderr, flush=True)  # maybe of this process alone
        return EXIT_FAILED
    if artifact is not None:
        print(f"{recipe.stage}: {artifact.kind} in {artifact.path}", flush=True)
        for line in (*account_lines(artifact.data), *outcome_lines(artifact.metrics)):
            print(f"  {line}", flush=True)
    return 0


def outcome_lines(metrics: Mapping[str, Any]) -> Iterator[str]:
    """What became of the rows that a stage made or judged, where it counts that."""
    for name in ("outcomes", "counts", "dropped"):
        if metrics.get(name):
            yield f"{name}: " + ", ".join(f"{reason}: {number}" for reason, number in metrics[name].items())
    if metrics.get("num_unscored"):
        yield f"answers without a score: {metrics['num_unscored']}"


def quiet_libraries() -> None:
    """Keep notices about other people's deprecations and loading bars out of the progress that users read."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("DeepSpeed", "accelerate.utils.other"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def dry_run(recipe: StageRecipe) -> int:
    """Check everything that can be checked without loading; inputs below `run_dir` may still have to be made."""
    planned = missing_inputs(recipe)
    check_inputs(recipe, planned=planned)
    if launched():
        check_batches(recipe, processes=world_size())
    print(dump_recipe(recipe), end="")
    for path, kind in planned.items():
        print(f"# to be made first: {path} ({kind})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
