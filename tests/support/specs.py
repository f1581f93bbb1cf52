"""Descriptions, read with the stages of this installation."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from graph import spec
from graph.spec import PipelineSpec
from stages.catalog import CATALOG


def parse_spec(
    text: str, name: str, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> PipelineSpec:
    return spec.parse_spec(text, name, CATALOG, overrides, environment)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> PipelineSpec:
    return spec.load_spec(path, CATALOG, overrides)


def model_stages() -> list[str]:
    """The stages that compute with a part of the checkpoint."""
    return [name for name, each in CATALOG.built_in.items() if each.component]
