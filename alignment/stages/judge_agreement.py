"""How far judges agree with people, as a step of a pipeline; `sara judge-agreement` makes the same report."""

from __future__ import annotations

from alignment.artifact import Artifact
from alignment.distributed import close, make_accelerator, world_size
from alignment.evaluation import agreement_report
from alignment.inputs import InputError
from alignment.recipe import JudgeAgreementRecipe


def run(recipe: JudgeAgreementRecipe) -> Artifact:
    """Measure, and leave the report. InputError under a launch file of several processes."""
    accelerator = make_accelerator()
    if world_size() > 1:
        raise InputError("judge_agreement runs in one process; launch it by launch/gpu.yaml or launch/cpu.yaml")
    artifact = agreement_report.run(recipe)
    close(accelerator)
    return artifact
