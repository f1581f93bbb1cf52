"""Pipelines that are written in Python: which classes there are, and what is said of them. No YAML is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graph.edges import Edges
from graph.errors import GraphError
from graph.sections import VERSION, file_section
from graph.spec import PipelineSpec
from graph.stage_type import stage_type_of
from stages.catalog import stage_class

ROOT = Path(__file__).resolve().parents[2]


def written_spec(uses: Mapping[str, str], said: Mapping[str, Any]) -> PipelineSpec:
    """uses: by stage, in the order in which a window passes them, "module:Class". said: as pipeline.yaml says it.

    Inputs are wired by their kinds. Raises GraphError where one has no source.
    """
    types = {name: stage_type_of(stage_class(use), use) for name, use in uses.items()}
    section = file_section(tuple((name, each.options) for name, each in types.items()))
    file = section.model_validate({"version": VERSION, **said})
    edges = Edges(file, types)
    if edges.findings:
        raise GraphError("; ".join(finding.message for finding in edges.findings))
    return PipelineSpec(
        version=VERSION,
        model=file.model,
        window=file.window,
        tail=file.tail,
        cameras={},
        stages=file.stages.by_name(),
        types=types,
        edges=edges.all,
        admission=file.admission,
        shedding=file.shedding,
        console=file.console,
        modules=(str(ROOT),),
    )
