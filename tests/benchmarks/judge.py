"""Verdicts on the first exchanges of HH dialogues: whole prompts, a shared prefix, and written explanations.

`python -m tests.benchmarks.judge --conversations 64 --rounds 3`

The arms take turns. `whole` reads every prompt from its first token on, bucketed by length, one row a conversation and
only the first token of each verdict: the least that can be done without a shared prefix. `shared` is the judge as it
is. `explained` writes 96 tokens for a few of the conversations. The bound of the speed-up of `shared` over `whole` is
the ratio of their tokens, (prefix + conversation) / conversation.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from alignment.policy import resolve_model
from alignment.recipe import Data, Source
from alignment.recipe_scorers import GUIDELINES
from alignment.sources import load_preferences
from reward.backends import TransformersBackend
from reward.conversation import Conversation, Prompt
from reward.judge import JudgeScorer
from reward.judge_prompt import Constitution, judge_prompt
from reward.verdict import BAD, GOOD, VERDICT_PREFIX

WRITTEN = 96
"""Tokens of an explanation."""


@dataclass
class Arm:
    """Work on so many conversations; `seconds` of each round."""

    work: Callable[[], object]
    num: int
    seconds: list[float]

    @property
    def rate(self) -> float:
        """Conversations a second, over all rounds."""
        return self.num * len(self.seconds) / sum(self.seconds)


def main() -> None:
    arguments = parse_arguments()
    data = Data(sources=[Source(name="hh_harmless", split="test", max_rows=arguments.conversations)])
    pairs = load_preferences(data, seed=arguments.seed).records
    conversations = [first_exchange(pair.prompt.answer(pair.chosen)) for pair in pairs]
    constitution = Constitution.read(GUIDELINES)
    prompts = [judge_prompt(constitution, conversation) for conversation in conversations]
    backend = TransformersBackend.load(
        resolve_model(arguments.model), dtype="float32", device="cpu", batch_size=arguments.batch_size
    )
    if backend.why_unshared is not None:
        raise SystemExit(f"the model cannot share a prefix: {backend.why_unshared}")
    whole = replace(backend, shared_prefix=False)
    started = time.perf_counter()
    backend.choice_logprobs(prompts[:1], VERDICT_PREFIX, (GOOD, BAD))
    print(f"prefix and one conversation: {time.perf_counter() - started:.2f} s, once a process")
    few = prompts[: arguments.explained]
    arms = {
        "whole": Arm(lambda: whole.choice_logprobs(prompts, VERDICT_PREFIX, first_words()), len(prompts), []),
        "shared": Arm(lambda: backend.choice_logprobs(prompts, VERDICT_PREFIX, (GOOD, BAD)), len(prompts), []),
        "explained": Arm(lambda: explain(whole, few), len(few), []),
    }
    take_turns(arms, rounds=arguments.rounds)
    report(arms, bound=token_bound(backend, prompts))
    compare(backend, whole, constitution, conversations[: arguments.compared])


def first_exchange(conversation: Conversation) -> Conversation:
    """The first question and its answer, as Safety LLaMA judges these dialogues."""
    return Conversation(tuple(m for m in conversation.messages if m.role != "system")[:2])


def first_words() -> tuple[str, str]:
    """The verdicts without their full stops: one token each."""
    return GOOD.rstrip("."), BAD.rstrip(".")


def explain(backend: TransformersBackend, prompts: Sequence[Prompt]) -> list[str]:
    backend.model.generation_config.min_new_tokens = WRITTEN
    return backend.generate(prompts, max_new_tokens=WRITTEN)


def take_turns(arms: dict[str, Arm], *, rounds: int) -> None:
    names = list(arms)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            started = time.perf_counter()
            arms[name].work()
            arms[name].seconds.append(time.perf_counter() - started)


def token_bound(backend: TransformersBackend, prompts: Sequence[Prompt]) -> float:
    lengths = [backend.num_tokens(prompt) for prompt in prompts]
    start = len(backend.renderer.render_start(prompts[0]))
    mean = sum(lengths) / len(lengths)
    print(f"{start} tokens of prefix, {mean - start:.0f} of a conversation on average")
    return mean / (mean - start)


def report(arms: dict[str, Arm], *, bound: float) -> None:
    for name, arm in arms.items():
        rounds = ", ".join(f"{arm.num / seconds:.2f}" for seconds in arm.seconds)
        print(f"{name}: {arm.rate:.2f} conversations/s (rounds: {rounds})")
    ratio = arms["shared"].rate / arms["whole"].rate
    print(f"shared / whole {ratio:.2f}, token bound {bound:.2f}, of the bound {ratio / bound:.2f}")
    print(f"shared / explained {arms['shared'].rate / arms['explained'].rate:.1f}")


def compare(
    backend: TransformersBackend,
    whole: TransformersBackend,
    constitution: Constitution,
    conversations: Sequence[Conversation],
) -> None:
    rows = [[score.value for score in JudgeScorer(b, constitution).score(conversations)] for b in (backend, whole)]
    differences = [abs(a - b) for a, b in zip(*rows, strict=True) if a is not None and b is not None]
    print(f"largest difference of P(good) {max(differences):.1e} over {len(differences)} conversations")


def parse_arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded:smollm2-135m-instruct")
    parser.add_argument("--conversations", type=int, default=64)
    parser.add_argument("--explained", type=int, default=8, help="conversations for which an explanation is written")
    parser.add_argument("--compared", type=int, default=16, help="conversations whose probabilities are compared")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


if __name__ == "__main__":
    main()
