"""RLOO and GRPO by TRL's trainers, with our scorers: baselines of PPO on the same prompts, sampling and adapters.

Neither has a value model: the advantage of an answer is its score against those of the other answers to its prompt
(Ahmadian et al. 2024, arXiv 2402.14740; Shao et al. 2024, arXiv 2402.03300).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from alignment.artifact import Artifact
from alignment.distributed import close, is_main_process, world_size
from alignment.fitting import SealCheckpoints, StopWhenNotFinite, fit, training_arguments, weight_files
from alignment.policy import load_model, load_tokenizer, lora_config
from alignment.ppo_data import read_data
from alignment.ppo_update import accumulation_steps
from alignment.recipe import PpoRecipe, Training
from alignment.scoring import build_scorer
from alignment.source_files import SourceError
from alignment.stopping import stop_on_sigterm
from alignment.tracking import open_tracker, trainer_callback
from alignment.workspace import open_workspace
from reward.conversation import Prompt
from reward.render import Renderer
from reward.scorer import Scorer, ScorerError, score_all

AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "rloo": {"normalize_advantages": False, "reward_clip_range": None},
    "grpo": {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "token",
        "use_bias_correction_kl": False,
    },
}
"""Keys of TRL that make a trainer the one of its paper, whatever TRL's defaults are.

RLOO's advantage is the score less the mean of the other answers, and nothing else (Ahmadian et al., section 2.3). GRPO
takes the mean over an answer's tokens, divides a group's scores by their deviation, has a ratio for each token, and
adds the KL unweighted (Shao et al., equation 3).
"""


def run_baseline(recipe: PpoRecipe) -> Artifact | None:
    """Tune `recipe.model` by `recipe.trainer` against `recipe.scorer` and leave a policy."""
    from datasets import Dataset

    tokenizer = load_tokenizer(recipe.model, init=recipe.model_init)
    renderer = Renderer(tokenizer)
    data = read_data(recipe, renderer)
    check_prompts(recipe, len(data.prompts))
    config_class, trainer_class = trl_classes(recipe.trainer)
    config = config_class(**arguments(recipe))
    workspace = open_workspace(recipe)
    model = load_model(recipe.model, init=recipe.model_init, pad_token_id=tokenizer.pad_token_id)
    model.generation_config.eos_token_id = sorted(renderer.end_ids)  # where TRL ends an answer
    rows = [
        {"prompt": renderer.prompt_messages(prompt), "position": number} for number, prompt in enumerate(data.prompts)
    ]
    with (
        open_tracker(recipe, workspace.path, parents=workspace.inputs, is_main_process=is_main_process()) as tracker,
        stop_on_sigterm() as stop,
    ):
        trainer = trainer_class(
            model=model,
            reward_funcs=[reward_function(build_scorer(recipe.scorer), data.prompts, renderer)],
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=None if recipe.lora is None else lora_config(recipe.lora, model, head="causal_lm"),
            callbacks=[SealCheckpoints(stop), trainer_callback(tracker)],
        )
        metrics = {"trainer": recipe.trainer} | fit(trainer, workspace, recipe, head="causal_lm")
        artifact = None
        if is_main_process():
            artifact = workspace.finish(
                "policy", data=data.account, metrics=metrics, files=weight_files(workspace.path)
            )
            tracker.artifact(artifact)
    close(trainer.accelerator, trainer.model_wrapped)
    return artifact


def trl_classes(trainer: str) -> tuple[Any, Any]:
    """Configuration and trainer of TRL, with our stop at a loss that is not finite; they import slowly."""
    if trainer == "rloo":
        from trl import RLOOConfig, RLOOTrainer

        class Rloo(StopWhenNotFinite, RLOOTrainer):
            pass

        return RLOOConfig, Rloo
    from trl import GRPOConfig, GRPOTrainer

    class Grpo(StopWhenNotFinite, GRPOTrainer):
        pass

    return GRPOConfig, Grpo


def arguments(recipe: PpoRecipe) -> dict[str, Any]:
    """Our keys -> keyword arguments of TRL's configuration. Batches count answers, of which a prompt has a group."""
    ppo = recipe.ppo
    steps = ppo.num_ppo_epochs * ppo.batch_size // ppo.mini_batch_size
    kept = {name: getattr(ppo, name) for name in Training.model_fields if name in type(ppo).model_fields}
    training = Training.model_validate(
        kept
        | {
            "max_steps": ppo.num_iterations * steps,
            "per_device_train_batch_size": min(ppo.per_device_batch_size, ppo.mini_batch_size // world_size()),
            "gradient_accumulation_steps": accumulation_steps(recipe),
            "group_by_length": False,
            "logging_steps": steps,
            "save_steps": ppo.save_steps * steps,
        }
    )
    common = training_arguments(
        training, init=recipe.model_init, output_dir=Path(recipe.output_dir), seed=recipe.seed, num_rows=ppo.batch_size
    )
    return common | {
        "num_generations": ppo.num_generations,
        "generation_batch_size": ppo.batch_size,
        "num_iterations": ppo.num_ppo_epochs,
        "epsilon": ppo.clip_range,
        "beta": ppo.kl_coef,
        "temperature": recipe.sampling.temperature,
        "top_p": recipe.sampling.top_p,
        "max_completion_length": recipe.sampling.max_new_tokens,
        "chat_template_kwargs": {"sanitize_control_tokens": True},  # as our renderer does
        "model_init_kwargs": reference_arguments(recipe),
        **AS_PUBLISHED[recipe.trainer],
    }


def reference_arguments(recipe: PpoRecipe) -> dict[str, Any] | None:
    """How TRL loads the reference of a KL penalty: the very files that the policy starts from (None: it loads none).

    With adapters the reference is the model without them. TRL takes over the policy's number format and attention.
    """
    if recipe.lora is not None or recipe.ppo.kl_coef == 0:
        return None
    init = recipe.model_init
    return {
        "revision": init.revision,
        "trust_remote_code": init.trust_remote_code,
        "use_safetensors": True,
        "device_map": None,  # TRL's own choice would spread it over all devices of a machine
    }


def check_prompts(recipe: PpoRecipe, number: int) -> None:
    """SourceError when the prompts do not fill one iteration, of which TRL would make none."""
    needed = recipe.ppo.batch_size // recipe.ppo.num_generations
    if number < needed:
        raise SourceError(
            f"{number} prompts do not fill an iteration of trainer {recipe.trainer}, which takes {needed} different "
            "ones (ppo.batch_size / ppo.num_generations); lower ppo.batch_size or read more prompts"
        )


def reward_function(scorer: Scorer, prompts: Sequence[Prompt], renderer: Renderer) -> Callable[..., list[float]]:
    """What TRL asks for the rewards of a batch: the scores of the texts, by our scorer.

    TRL would count an answer without a score as 0, so ScorerError is raised for it.
    """

    def reward(*, completion_ids: Sequence[Sequence[int]], position: Sequence[int], **_: Any) -> list[float]:
        answers = [renderer.decode(ids)[0] for ids in completion_ids]
        asked = [prompts[number].answer(text) for number, text in zip(position, answers, strict=True)]
        values: list[float] = []
        for score in score_all(scorer, asked):
            if score.value is None:
                raise ScorerError(f"{scorer.name} left an answer unscored, which this trainer cannot: {score.reason}")
            values.append(score.value)
        return values

    reward.__name__ = scorer.name
    return reward
