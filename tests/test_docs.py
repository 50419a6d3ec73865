"""docs/recipes.md and docs/data_formats.md say what the code does: every key with its default, every source."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from alignment import recipe as models
from alignment import recipe_health, recipe_scorers
from alignment.recipe import RECIPES, Source, StageRecipe
from alignment.recipe_file import parse_yaml
from alignment.source_catalog import SOURCES
from alignment.source_formats import check_columns
from reward.conversation import Conversation, Graded, Preference, Prompt
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


DOCUMENTED = {
    **{f"`{stage}`": recipe for stage, recipe in RECIPES.items()},
    "Every stage": StageRecipe,
    "pipeline": models.PipelineRecipe,
    "step": models.Step,
    "`model_init`": models.ModelInit,
    "`lora`": models.Lora,
    "`data`": models.Data,
    "`source`": models.Source,
    "`training`": models.Training,
    "`ppo` settings": models.Ppo,
    "`vllm`": models.Vllm,
    "`probes`": recipe_health.Probes,
    "`health`": recipe_health.Health,
    "`sampling`": models.Sampling,
    "`wandb`": models.WandbSettings,
    "Prompt set": models.PromptSet,
    "Preference set": models.PreferenceSet,
    "`type: reward_model`": recipe_scorers.RewardModelScorer,
    "`type: absolute_harmfulness`": recipe_scorers.HarmfulnessScorer,
    "`type: judge`": recipe_scorers.JudgeScorer,
    "`type: guard`": recipe_scorers.GuardScorer,
    "`type: moderation`": recipe_scorers.ModerationScorer,
    "`server`": recipe_scorers.Server,
    "`type: refusal`": recipe_scorers.RefusalScorer,
    "`type: python`": recipe_scorers.PythonScorer,
    "`type: http`": recipe_scorers.HttpScorer,
    "`type: llama2`": recipe_scorers.Llama2Scorer,
    "`type: weighted_sum`": recipe_scorers.WeightedSum,
    "`type: minimum`": recipe_scorers.Minimum,
    "`type: lagrangian`": recipe_scorers.Lagrangian,
}


def documented_keys() -> dict[str, dict[str, str]]:
    """Heading -> key -> default, from the tables of docs/recipes.md."""
    tables: dict[str, dict[str, str]] = {}
    heading = ""
    for line in Path("docs/recipes.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif match := re.match(r"\| `(\w+)` \|.*?\| (required|see there|`.*?`) \|", line):
            tables.setdefault(heading, {})[match[1]] = match[2].strip("`")
    return tables


def test_the_documentation_has_every_key_with_its_default() -> None:
    documented = documented_keys()
    assert documented.keys() == DOCUMENTED.keys()
    for heading, model in DOCUMENTED.items():
        of_every_stage = StageRecipe.model_fields if issubclass(model, StageRecipe) and model is not StageRecipe else {}
        expected: dict[str, str] = {}
        for key, field in model.model_fields.items():
            default = field.get_default(call_default_factory=True)
            if key in of_every_stage:
                continue
            if field.is_required():
                expected[key] = "required"
            elif isinstance(default, models.Section):
                expected[key] = "see there"
            else:
                expected[key] = json.dumps(default).strip('"')
        assert documented[heading] == expected, heading


def test_the_documentation_has_every_source_with_its_folder() -> None:
    text = Path("docs/data_formats.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:`(\w+)`)? ?\|$", text.partition("## Sources")[2], flags=re.MULTILINE)
    of_the_repository = {name for name, info in SOURCES.items() if info.package_file is not None}
    assert dict(rows[: len(SOURCES)]) == {name: info.folder or "" for name, info in SOURCES.items()}
    assert of_the_repository == {name for name in SOURCES if name.startswith("starter_")}


def test_the_documented_records_and_sources_are_read() -> None:
    text = Path("docs/data_formats.md").read_text(encoding="utf-8")
    records = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)]
    prompt, conversation, preference, graded = records
    assert Prompt.from_json(prompt).to_json() == prompt
    assert Conversation.from_json(conversation).to_json() == conversation
    assert Preference.from_json(preference).to_json() == preference
    assert Graded.from_json(graded).to_json() == graded
    sources = [
        Source.model_validate(source) for source in parse_yaml(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    ]
    for source in sources:
        check_columns(source.columns or {}, ("preferences", "prompts"))
