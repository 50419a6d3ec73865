"""What `sara judge-agreement`, and the stage of that name, measures: scorers, on conversations that people labelled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from alignment.recipe_parts import Data, StageRecipe
from alignment.recipe_scorers import JudgeScorer, PositiveInt, ScorerSpec, check_bounded

ScorerName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
"""What a report calls a scorer, and a part of file names."""


class JudgeAgreementRecipe(StageRecipe):
    """`name`: what the report calls `scorer`; `compare`: others on the same conversations.

    `limit`: so many conversations, drawn by seed (None: all); `threshold`: P(safe) from which on an answer is called
    safe; `fit_calibration`: half of the prompts fit a calibration of `scorer`, and the other half is reported.
    """

    stage: Literal["judge_agreement"] = "judge_agreement"
    name: ScorerName
    scorer: ScorerSpec
    compare: dict[ScorerName, ScorerSpec] = {}
    data: Data
    limit: PositiveInt | None = None
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    fit_calibration: bool = False

    @model_validator(mode="after")
    def _scorers_have_verdicts_and_names(self) -> JudgeAgreementRecipe:
        check_bounded(self.scorer, key="scorer")
        for name, spec in self.compare.items():
            check_bounded(spec, key=f"compare.{name}")
        if self.name in self.compare:
            raise ValueError(f"compare: {self.name!r} is the name of the scorer itself; give one of them another name")
        if self.fit_calibration and not isinstance(self.scorer, JudgeScorer):
            raise ValueError(
                f"fit_calibration: a calibration belongs to a judge, and the scorer is a {self.scorer.type}"
            )
        return self

    @property
    def scorers(self) -> dict[str, ScorerSpec]:
        """All scorers by name, the measured one first."""
        return {self.name: self.scorer, **self.compare}
