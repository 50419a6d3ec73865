"""What `sara judge-attack` measures: a scorer, labelled conversations, and the attacks on them."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from alignment.recipe import Data, StageRecipe
from alignment.recipe_scorers import PositiveInt, ScorerSpec, check_bounded
from reward.attacks import select_attacks


class JudgeAttackRecipe(StageRecipe):
    """Not a stage of a pipeline. `families`: names or kinds of attacks (none: all of them).

    `limit`: so many transcripts of each label, the first of the shuffled data.
    """

    stage: Literal["judge_attack"] = "judge_attack"
    scorer: ScorerSpec
    data: Data
    families: list[str] = []
    limit: PositiveInt = 25

    @model_validator(mode="after")
    def _verdicts_and_known_families(self) -> JudgeAttackRecipe:
        check_bounded(self.scorer, key="scorer")
        try:
            select_attacks(self.families)
        except ValueError as error:
            raise ValueError(f"families: {error}") from error
        return self
