"""`reward.model`, `reward.collate` and `reward.train`: a reward model is a stock classifier, whoever loads it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from alignment.policy import add_lora, load_model, load_tokenizer, merge_adapter
from alignment.recipe import Lora, ModelInit
from reward.collate import PreferenceCollator, tokenize_preferences
from reward.conversation import Message, Preference, Prompt
from reward.losses import MARGINS, ranking_loss
from reward.model import RewardModel, pad_right
from reward.render import Renderer
from reward.scorer import Scorer, ScorerError, score_all
from tests.tiny import SENTENCES, make_tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from reward.conversation import Conversation

PAD = 3

CONVERSATIONS = [
    *(Prompt.of(question).answer(answer) for question, answer in zip(SENTENCES[:12:2], SENTENCES[1:12:2], strict=True)),
    Prompt.of("Hi").answer(""),
    Prompt.of("Hi").answer("<|pad|><|im_end|>"),
    Prompt.of("Thank you.").with_preprompt("You are safe.").answer("You are welcome."),
    Prompt((Message("user", "a"), Message("assistant", "b"), Message("user", "c"))).answer("d " * 60),
]
"""Of very different lengths, one empty and one with control tokens in its text."""


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random regression head."""
    folder = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(5)
    module = load_model(str(tiny_model), init=ModelInit(), head="sequence_classification", pad_token_id=PAD)
    module.save_pretrained(folder)
    load_tokenizer(str(tiny_model)).save_pretrained(folder)
    return folder


def values(scorer: Scorer, conversations: list[Conversation]) -> list[float]:
    found = [score.value for score in score_all(scorer, conversations)]
    assert None not in found
    return [value for value in found if value is not None]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[float]:
    """Scores by transformers alone, one conversation at a time, without padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    module = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    renderer = Renderer(AutoTokenizer.from_pretrained(checkpoint))
    with torch.no_grad():
        return [
            module(input_ids=torch.tensor([renderer.render(conversation).input_ids])).logits.item()
            for conversation in CONVERSATIONS
        ]


# ------------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_stock_classifier(checkpoint: Path, expected: list[float]) -> None:
    model = RewardModel.load(checkpoint, dtype="float32")
    assert isinstance(model, Scorer)
    assert model.scale == "logit"
    assert model.name == checkpoint.name
    assert values(model, CONVERSATIONS) == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.1  # so that a mix-up would show


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_do_not_depend_on_batch_size_order_or_padding(
    checkpoint: Path, expected: list[float], batch_size: int
) -> None:
    model = RewardModel.load(checkpoint, dtype="float32", batch_size=batch_size)
    order = np.random.default_rng(batch_size).permutation(len(CONVERSATIONS))
    shuffled = values(model, [CONVERSATIONS[i] for i in order])
    assert shuffled == pytest.approx([expected[i] for i in order], abs=1e-5)


def test_a_score_is_read_at_the_end_of_the_turn(checkpoint: Path) -> None:
    """By hand: the head's weights times the hidden state of the last token, which is the end token."""
    model = RewardModel.load(checkpoint, dtype="float32")
    ids = model.renderer.render(CONVERSATIONS[0]).input_ids
    assert ids[-1] == model.renderer.tokenizer.eos_token_id
    with torch.no_grad():
        hidden = model.module.model(torch.tensor([ids])).last_hidden_state[0, -1]
    assert values(model, CONVERSATIONS[:1]) == pytest.approx([float(hidden @ model.module.score.weight[0])], abs=1e-5)


def test_a_conversation_over_the_limit_is_unscored_in_its_place(checkpoint: Path, expected: list[float]) -> None:
    lengths = [len(RewardModel.load(checkpoint).renderer.render(c).input_ids) for c in CONVERSATIONS]
    limit = sorted(lengths)[-3]
    scores = score_all(RewardModel.load(checkpoint, dtype="float32", max_length=limit), CONVERSATIONS)
    for score, length, value in zip(scores, lengths, expected, strict=True):
        if length > limit:
            assert (score.value, score.reason) == (None, f"{length} tokens do not fit max_length={limit}")
        else:
            assert score.value == pytest.approx(value, abs=1e-5)
    assert sum(score.value is None for score in scores) == 2


@pytest.mark.parametrize("pad", [None, 2])
def test_padding_is_the_tokenizers_whatever_the_checkpoint_says(
    checkpoint: Path, expected: list[float], pad: int | None
) -> None:
    loaded = RewardModel.load(checkpoint, dtype="float32")
    loaded.module.config.pad_token_id = pad
    model = RewardModel(loaded.module, loaded.renderer.tokenizer)
    assert model.module.config.pad_token_id == PAD
    assert values(model, CONVERSATIONS) == pytest.approx(expected, abs=1e-5)


def test_no_conversations_have_no_scores(checkpoint: Path) -> None:
    assert RewardModel.load(checkpoint).score([]) == []


def test_a_loaded_model_is_frozen_and_of_the_dtype_asked_for(checkpoint: Path) -> None:
    module = RewardModel.load(checkpoint, dtype="bfloat16").module
    assert not module.training
    assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}


# ------------------------------------------------------------------------------------------------ refusals


def test_padding_with_the_end_token_is_refused(checkpoint: Path) -> None:
    """The head would read its score at the last token that is not padding: in front of the answer's end."""
    module = RewardModel.load(checkpoint).module
    tokenizer = make_tiny_tokenizer()
    for pad in (tokenizer.eos_token, None):
        tokenizer.pad_token = pad
        with pytest.raises(ScorerError, match="mine: pad token must be set and differ from eos"):
            RewardModel(module, tokenizer, name="mine")


def test_a_classifier_with_two_outputs_is_refused(checkpoint: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    module = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2, ignore_mismatched_sizes=True)
    with pytest.raises(ScorerError, match="has 2 outputs; a reward model has one"):
        RewardModel(module, make_tiny_tokenizer())


@pytest.mark.parametrize("max_shard_size", ["50GB", "20KB"])
def test_a_language_model_is_refused_since_its_head_would_be_random(
    tiny_model: Path, tmp_path: Path, max_shard_size: str
) -> None:
    load_model(str(tiny_model), init=ModelInit()).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "50GB"
    with pytest.raises(ScorerError, match="holds no regression head"):
        RewardModel.load(tmp_path)


def test_a_sharded_reward_model_is_accepted(checkpoint: Path, tmp_path: Path, expected: list[float]) -> None:
    model = RewardModel.load(checkpoint, dtype="float32")
    model.module.save_pretrained(tmp_path, max_shard_size="20KB")
    model.renderer.tokenizer.save_pretrained(tmp_path)
    assert values(RewardModel.load(tmp_path, dtype="float32"), CONVERSATIONS) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------------------------------------------- LoRA


def test_lora_trains_the_regression_head_and_keeps_it(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    base = load_model(str(tiny_model), init=ModelInit(), head="sequence_classification", pad_token_id=PAD)
    head_before = base.score.weight.detach().clone()
    model = add_lora(base, Lora(r=4, alpha=8), head="sequence_classification")
    renderer = Renderer(load_tokenizer(str(tiny_model)))
    ids = [renderer.render(conversation).input_ids for conversation in CONVERSATIONS[:4]]
    input_ids, attention_mask = pad_right(ids, pad_token_id=PAD)

    def scores() -> torch.Tensor:
        return model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)

    before = scores().detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        chosen, rejected = scores().chunk(2)
        ranking_loss(chosen, rejected).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = scores().detach()
    assert (after - before).abs().min() > 1e-3

    model.save_pretrained(tmp_path / "adapter")
    target = tmp_path / "merged"
    torch.manual_seed(2)  # the base's head is made up anew, so it must come from the adapter
    merge_adapter(
        str(tiny_model),
        tmp_path / "adapter",
        target,
        init=ModelInit(),
        head="sequence_classification",
        pad_token_id=PAD,
    )
    renderer.tokenizer.save_pretrained(target)
    head_after = AutoModelForSequenceClassification.from_pretrained(target).score.weight
    assert (head_after - head_before).abs().max() > 1e-3
    reloaded = RewardModel.load(target, dtype="float32")
    assert values(reloaded, CONVERSATIONS[:4]) == pytest.approx(after.tolist(), abs=1e-4)


def test_lora_leaves_all_but_adapters_and_head_as_they_are(tiny_model: Path) -> None:
    for head, extra in (("causal_lm", set()), ("sequence_classification", {"score"})):
        model = add_lora(load_model(str(tiny_model), init=ModelInit(), head=head), Lora(r=4, alpha=8), head=head)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert {"score" for name in trained if "lora_" not in name} == extra
        layers = {name.split(".layers.")[1].split(".lora_")[0] for name in trained if "lora_" in name}
        attention = [f"self_attn.{name}_proj" for name in "qkvo"]
        mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        assert layers == {f"{layer}.{name}" for layer in (0, 1) for name in attention + mlp}


def test_lora_can_be_kept_to_the_last_layers(tiny_model: Path) -> None:
    lora = Lora(r=4, alpha=8, last_layers=1)
    model = add_lora(load_model(str(tiny_model), init=ModelInit()), lora, head="causal_lm")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".layers.1." in name for name in trained)


# ------------------------------------------------------------------------------------------------- batches


def test_padding_on_the_right_by_hand() -> None:
    input_ids, attention_mask = pad_right([[5, 6, 7], [8]], pad_token_id=PAD)
    assert input_ids.tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def pairs() -> list[Preference]:
    prompt = Prompt.of("How?")
    return [
        Preference(prompt, "Like this.", "No.", "significantly_better", chosen_safe=True, rejected_safe=False),
        Preference(prompt, "Slowly.", "Soon.", "slightly_better", chosen_safe=False, rejected_safe=True),
        Preference(prompt, "Yes, you can.", "Yes.", chosen_safe=True),
        Preference(prompt, "long " * 50, "Yes.", "better"),
        Preference(prompt, "Yes.", "long " * 50, "better"),
        Preference(prompt, "Both.", "Fine.", "negligibly_better", chosen_safe=True, rejected_safe=True),
    ]


def test_pairs_become_rows_with_margins_and_labels_and_long_ones_are_counted() -> None:
    rows, too_long = tokenize_preferences(
        pairs(), Renderer(make_tiny_tokenizer()), max_length=60, margins=MARGINS["small"]
    )
    assert too_long == [3, 4]
    assert [row["margin"] for row in rows] == [1.0, pytest.approx(1 / 3), 0.0, 0.0]
    nan = math.nan  # of an unsafe answer that was chosen, or of a pair with one label, nothing is learned
    labels = [[row["chosen_safe"], row["rejected_safe"]] for row in rows]
    np.testing.assert_array_equal(labels, [[1.0, 0.0], [nan, nan], [nan, nan], [1.0, 1.0]])
    renderer = Renderer(make_tiny_tokenizer())
    for row, pair in zip(rows, [pair for pair in pairs() if "long" not in pair.chosen + pair.rejected], strict=True):
        assert row["chosen_ids"] == renderer.render(pair.prompt.answer(pair.chosen)).input_ids
        assert row["rejected_ids"] == renderer.render(pair.prompt.answer(pair.rejected)).input_ids
        assert row["length"] == max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def test_a_batch_holds_the_chosen_sides_first() -> None:
    rows: list[dict[str, Any]] = [
        {"chosen_ids": [5, 6], "rejected_ids": [7], "margin": 1.0, "chosen_safe": 1.0, "rejected_safe": 0.0},
        {"chosen_ids": [8], "rejected_ids": [9, 10, 11], "margin": 0.5, "chosen_safe": math.nan, "rejected_safe": 1.0},
    ]
    batch = PreferenceCollator(PAD)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, PAD], [8, PAD, PAD], [7, PAD, PAD], [9, 10, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 1, 1]]
    assert batch["margin"].tolist() == [1.0, 0.5]
    np.testing.assert_array_equal(batch["is_safe"].numpy(), [1.0, math.nan, 0.0, 1.0])


def test_the_trainers_loss_is_the_sum_of_its_three_parts(checkpoint: Path, tmp_path: Path) -> None:
    """From scores that transformers gives for each answer alone, in numpy."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig

    from reward.train import SafetyRewardTrainer

    tokenizer = load_tokenizer(str(checkpoint))
    rows, _ = tokenize_preferences(pairs(), Renderer(tokenizer), max_length=60, margins=MARGINS["large"])
    trainer = SafetyRewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(checkpoint),
        args=RewardConfig(output_dir=str(tmp_path), report_to="none", max_length=None, use_cpu=True),
        data_collator=PreferenceCollator(PAD),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        auxiliary_loss_weight=0.5,
        centering_coefficient=0.25,
    )
    loss = trainer.compute_loss(trainer.model.eval(), PreferenceCollator(PAD)(rows)).item()

    plain = AutoModelForSequenceClassification.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        chosen, rejected = (
            np.array([plain(input_ids=torch.tensor([row[side]])).logits.item() for row in rows])
            for side in ("chosen_ids", "rejected_ids")
        )
    ranking = np.logaddexp(0, -(chosen - rejected - np.array([3.0, 1.0, 0.0, 0.0]))).mean()
    safe, unsafe = [chosen[0], chosen[3], rejected[3]], [rejected[0]]
    auxiliary = np.concatenate([np.logaddexp(0, np.negative(safe)), np.logaddexp(0, unsafe)]).mean()
    centering = ((chosen + rejected) ** 2).mean()
    assert loss == pytest.approx(ranking + 0.5 * auxiliary + 0.25 * centering, abs=1e-5)
    logged = {name: found[-1] for name, found in trainer._metrics["eval"].items()}
    assert logged["ranking_loss"] == pytest.approx(ranking, abs=1e-5)
    assert logged["auxiliary_loss"] == pytest.approx(auxiliary, abs=1e-5)
    assert logged["accuracy"] == pytest.approx((chosen > rejected).mean())
    assert logged["safety_accuracy"] == pytest.approx(np.mean([*(s > 0 for s in safe), *(s <= 0 for s in unsafe)]))
