"""Sections that recipes of several stages have: how models are loaded, adapters, where data come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from alignment.recipe_scorers import Fraction, PositiveFloat, PositiveInt, Section
from reward.conversation import MAX_GRADE
from reward.dtype import Dtype


class ModelInit(Section):
    """How weights are loaded."""

    dtype: Dtype = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Literal["int8", "nf4"] | None = None


class Lora(Section):
    """Low-rank adapters. `last_layers`: adapt only the last n layers (None: all)."""

    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Fraction = 0.0
    target_modules: str | list[str] = "all-linear"
    last_layers: PositiveInt | None = None


class Source(Section):
    """Where rows come from; see `alignment/sources.py` for the names.

    `path`: hub id or local file or folder in place of the source's own; `weight`: share of the mixture (None: all);
    `columns`: our field -> column of the file, for `name: file`; `grade`: of the harm in each of its conversations, for
    sources that bring none.
    """

    name: str
    path: str | None = None
    split: str = "train"
    weight: PositiveFloat | None = None
    max_rows: PositiveInt | None = None
    columns: dict[str, str] | None = None
    grade: Annotated[float, Field(ge=0, le=MAX_GRADE)] | None = None


class Data(Section):
    """A mixture of sources. Rows longer than `max_length` tokens are dropped and counted, never cut."""

    sources: Annotated[list[Source], Field(min_length=1)]
    max_length: PositiveInt = 4096
    shuffle: bool = True
