"""What a reward model on disk is, told from its small files and weight names before any weight loads.

Four families are read, each as its makers write it:
* `classifier`: a stock sequence classifier that reads a chat template (most reward models on the hub, and ours)
* `pair`: an encoder that reads question and answer as a text pair and has no chat template (OpenAssistant's DeBERTa)
* `value_head`: a causal model or a LoRA adapter with `value_head.safetensors` beside it (LLaMA-Factory)
* `beaver`: a score model of safe-rlhf, with `score_head.*` and an optional normaliser (arXiv 2310.12773)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from reward.scorer import ScorerError

Family = Literal["classifier", "pair", "value_head", "beaver"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Direction = Literal["higher", "lower"]
"""Which scores are better; `lower` is that of cost and harmfulness models."""

HEAD_NAMES = ("score", "classifier")
"""First part of the names of a stock classifier's head."""
VALUE_HEAD_FILE, VALUE_HEAD = "value_head.safetensors", "v_head.summary"
BEAVER_HEAD = "score_head"

_ENCODERS = ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")
"""`model_type` of models that read a text pair unless their tokenizer has a chat template."""
HARMFULNESS = "harmfulness"
"""Key that a harmfulness model of ours has in its config: how its texts were cut."""
_PUBLISHED_HARMFULNESS = "absolute-harmfulness-predictor"
"""In the names of the models of Safety-Tuned LLaMAs, whose files look like those of a pair model."""
_LONGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format."""
_ACCEPTED = (
    "a *ForSequenceClassification checkpoint with score.* or classifier.* weights (classifier, pair), "
    f"{VALUE_HEAD_FILE} beside a causal model or adapter (value_head), or {BEAVER_HEAD}.* weights (beaver)"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model folder or hub id and what its small files say. `weights`: name -> file; empty where that is unknown."""

    model: str
    config: Mapping[str, Any]
    adapter: Mapping[str, Any]
    weights: Mapping[str, str]
    value_head: Path | None
    has_chat_template: bool

    @classmethod
    def read(cls, model: str | Path) -> Checkpoint:
        """ScorerError when there is neither a config.json nor an adapter_config.json, or a value head is a pickle."""
        model = str(model)
        config, adapter = _json(model, "config.json"), _json(model, "adapter_config.json")
        if config is None and adapter is None:
            raise ScorerError(f"{model} holds no config.json and no adapter_config.json: not a model")
        value_head = model_file(model, VALUE_HEAD_FILE)
        if value_head is None and (Path(model) / "value_head.bin").is_file():
            raise ScorerError(
                f"{model} keeps its head in value_head.bin, a pickle, which may run code; save it as {VALUE_HEAD_FILE}"
            )
        tokenizer = _json(model, "tokenizer_config.json") or {}
        template = bool(tokenizer.get("chat_template")) or model_file(model, "chat_template.jinja") is not None
        return cls(model, config or {}, adapter or {}, _weights(model), value_head, template)

    @property
    def architecture(self) -> str:
        return next(iter(self.config.get("architectures") or ()), "")

    @property
    def labels(self) -> dict[int, str]:
        """Names of a classifier's outputs, where the config gives them."""
        return {int(index): name for index, name in (self.config.get("id2label") or {}).items()}

    @property
    def harmfulness(self) -> Mapping[str, Any]:
        """What the config of a harmfulness model of ours says of its training; empty for all others."""
        said = self.config.get(HARMFULNESS)
        return said if isinstance(said, Mapping) else {}

    def family(self) -> Family:
        """The family that the files show; ScorerError, naming what was found and what is accepted, when none does."""
        if self.harmfulness or _PUBLISHED_HARMFULNESS in self.model:
            raise ScorerError(
                f"{self.model} is a harmfulness model, whose text is a transcript and whose high scores are bad; use "
                f"{{type: absolute_harmfulness, model: {self.model}}}"
            )
        if self.value_head is not None:
            return "value_head"
        if self.architecture.endswith("ForScore") or self._has(BEAVER_HEAD):
            return "beaver"
        if self.architecture.endswith("ForSequenceClassification") or any(map(self._has, HEAD_NAMES)):
            reads_pairs = self.config.get("model_type") in _ENCODERS and not self.has_chat_template
            return "pair" if reads_pairs else "classifier"
        if self.weights:
            found = f"{self.architecture or 'no architecture'} and no weights of a head"
        else:
            found = f"{self.architecture or 'an adapter'} and no *.safetensors"
        raise ScorerError(f"{self.model} holds no regression head: found {found}; accepted are {_ACCEPTED}")

    def check_head(self, family: Family) -> None:
        """Refuse a checkpoint without the head of its family; libraries would make one up at random."""
        if family == "value_head":
            if self.value_head is None:
                raise ScorerError(f"{self.model} holds no regression head: a value_head model has {VALUE_HEAD_FILE}")
            self._check_one_output(f"{VALUE_HEAD}.weight", _shapes(self.value_head))
        if self.adapter:
            self._check_adapter(family)
            return
        if not self.weights:
            raise ScorerError(f"{self.model} holds no *.safetensors; weights are read from no other files")
        if family == "value_head":
            return
        heads = (BEAVER_HEAD,) if family == "beaver" else HEAD_NAMES
        if not any(map(self._has, heads)):
            names = " or ".join(f"{head}.*" for head in heads)
            raise ScorerError(
                f"{self.model} holds no regression head (no weight named {names}): it is a language model; "
                "train a reward model from it first"
            )
        if family == "beaver":
            self._check_one_output(f"{BEAVER_HEAD}.weight", self._shapes_beside(f"{BEAVER_HEAD}.weight"))

    def num_outputs(self) -> int | None:
        """Outputs of a stock classifier by the shape of its head, else by its config; None when neither tells."""
        for name in ("score.weight", "classifier.weight", "classifier.out_proj.weight"):
            shape = self._shapes_beside(name).get(name)
            if shape is not None:
                return shape[0]
        return len(self.labels) or None

    def label_index(self, label: int | str | None) -> int | None:
        """Which of a classifier's outputs is the score; None for its only one."""
        outputs = self.num_outputs()
        if label is None:
            if outputs in (None, 1):
                return None
            named = f" ({', '.join(self.labels.values())})" if self.labels else ""
            raise ScorerError(f"{self.model} has {outputs} outputs{named}; a reward model has one: name it by `label`")
        if outputs == 1:
            raise ScorerError(f"{self.model} has one output, so `label: {label}` says nothing; leave it out")
        index = label if isinstance(label, int) else {name: i for i, name in self.labels.items()}.get(label)
        if index is None or not 0 <= index < (outputs or index + 1):
            names = ", ".join(f"{i} {name}" for i, name in self.labels.items()) or f"0 to {(outputs or 1) - 1}"
            raise ScorerError(f"{self.model} has no label {label!r}; it has {names}")
        return index

    def _check_adapter(self, family: Family) -> None:
        if family != "value_head":
            raise ScorerError(f"{self.model} is an adapter; of a {family} model only merged weights are read")
        _check_adapter(self.model, self.adapter)

    def _has(self, head: str) -> bool:
        return any(name.split(".")[0] == head for name in self.weights)

    def _shapes_beside(self, name: str) -> dict[str, list[int]]:
        file = model_file(self.model, self.weights[name]) if name in self.weights else None
        return {} if file is None else _shapes(file)

    def _check_one_output(self, name: str, shapes: Mapping[str, list[int]]) -> None:
        if shapes.get(name, [0])[0] != 1:
            found = f"is {shapes[name]}" if name in shapes else "is absent"
            raise ScorerError(f"{self.model}: the head {name} {found}; a reward model's is (1, hidden size)")


def check_checkpoint(
    model: str | Path,
    *,
    family: Family | Literal["auto"] = "auto",
    direction: Direction = "higher",
    label: int | str | None = None,
) -> tuple[Checkpoint, Family]:
    """Refuse, before weights load, what cannot be read as a reward model; else the checkpoint and its family."""
    checkpoint = Checkpoint.read(model)
    found = checkpoint.family() if family == "auto" else family
    checkpoint.check_head(found)
    if found in ("classifier", "pair"):
        checkpoint.label_index(label)
    elif label is not None:
        raise ScorerError(f"{model}: `label` chooses an output of a classifier; a {found} model has one output")
    if checkpoint.config.get("score_type") == "cost" and direction == "higher":
        raise ScorerError(f"{model} is a cost model by its config (score_type: cost); declare `direction: lower`")
    return checkpoint, found


def check_harmfulness_model(model: str | Path) -> Checkpoint:
    """Refuse, before weights load, what is no classifier with one output, whoever trained it; else the checkpoint."""
    checkpoint = Checkpoint.read(model)
    checkpoint.check_head("classifier")
    if checkpoint.num_outputs() not in (None, 1):
        raise ScorerError(f"{model} has {checkpoint.num_outputs()} outputs; a harmfulness model has one, the grade")
    return checkpoint


def model_file(model: str, name: str) -> Path | None:
    """A file of a model folder or, fetched on first use, of a hub id; None when there is none."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file, has_file

    found = cached_file(model, name) if has_file(model, name) else None
    return None if found is None else Path(found)


def adapter_base(model: str | Path) -> str | None:
    """The base model of a LoRA adapter, by folder or hub id; None when `model` is no adapter but a model.

    ScorerError when the adapter's weights are not safetensors, or its base is a folder that does not exist.
    """
    model = str(model)
    adapter = _json(model, "adapter_config.json")
    if adapter is None or model_file(model, "config.json") is not None:
        return None
    return _check_adapter(model, adapter)


def _check_adapter(model: str, adapter: Mapping[str, Any]) -> str:
    """The name of its base."""
    if model_file(model, "adapter_model.safetensors") is None:
        raise ScorerError(f"{model} holds no adapter_model.safetensors; weights are read from no other files")
    base = adapter.get("base_model_name_or_path")
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise ScorerError(f"{model}: the base model of its adapter_config.json, {base!r}, does not exist")
    return base


def _json(model: str, name: str) -> dict[str, Any] | None:
    file = model_file(model, name)
    if file is None:
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ScorerError(f"{file} is not JSON: {error}") from error


def _weights(model: str) -> dict[str, str]:
    index = _json(model, "model.safetensors.index.json")
    if index is not None:
        return dict(index["weight_map"])
    single = model_file(model, "model.safetensors")
    return {} if single is None else dict.fromkeys(_shapes(single), single.name)


def _shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of the tensors of a safetensors file, from its header: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(min(length, _LONGEST_HEADER)))
    except ValueError as error:
        raise ScorerError(f"{file} is no safetensors file: {error}") from error
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
