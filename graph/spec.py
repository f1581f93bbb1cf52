"""pipeline.yaml, read and checked once. Afterwards nobody checks again.

Rules:
- All problems are reported at once, each with line and column (or the `--set` it came from).
- A `PipelineSpec` says what runs: a stage with `replicas: 0` and its edges are not in it.

How the file spells it is in graph/sections.py, which stages and ports there are in graph/ports.py.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ruamel.yaml import YAML

from graph.credit import Limit
from graph.errors import GraphError, Problem, SpecError
from graph.kinds import Kind, WhenFull
from graph.ports import (
    CAN_BE_OFF,
    NO_SENSES,
    STAGES,
    InPort,
    OutPort,
    full_graph,
    lacks_senses,
    off_with,
    wiring_of,
)
from graph.secret import KNOWN, mask_urls
from graph.sections import (
    BUILT_IN,
    VERSION,
    AdmissionSpec,
    CameraSpec,
    ConsoleSpec,
    FileSpec,
    Section,
    SheddingSpec,
    StageSpec,
    TailSpec,
    WindowSpec,
    WrittenEdge,
)
from graph.spec_check import findings, least_chunks
from graph.units import format_duration
from graph.window import Late
from graph.wiring import Wiring
from graph.wording import listed
from graph.yaml_check import check_document
from graph.yaml_file import MAX_BYTES, Document, apply_override, in_file_order, read_yaml

# ---- What runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EdgeSpec:
    """One edge. credit: what may be in flight per session. late: what happens to a chunk whose window has left."""

    source: OutPort
    target: InPort
    credit: Limit
    when_full: WhenFull
    late: Late

    @property
    def id(self) -> str:
        return f"{self.source}->{self.target}"

    @property
    def kind(self) -> Kind:
        return self.source.kind


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A checked pipeline. `stages` and `edges` hold what runs; `model` is one of BUILT_IN, a folder, or a hub id.

    wiring: what follows from the edges.
    """

    version: int
    model: str
    window: WindowSpec
    tail: TailSpec
    cameras: Mapping[str, CameraSpec]
    stages: Mapping[str, StageSpec]
    edges: tuple[EdgeSpec, ...]
    admission: AdmissionSpec
    shedding: SheddingSpec
    console: ConsoleSpec
    wiring: Wiring = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        ends = [(edge.source, edge.target) for edge in self.edges]
        object.__setattr__(self, "wiring", wiring_of(self.stages, ends))

    def without(self, stages: Collection[str]) -> PipelineSpec:
        """The same with these stages off, and with them those which then have nothing to do; GraphError if it can't."""
        if stuck := set(stages) - CAN_BE_OFF:
            raise GraphError(f"{listed(stuck)} can't be switched off; these can: {listed(CAN_BE_OFF)}")
        off = off_with(stages) | (STAGES.keys() - self.stages.keys())
        if lacks_senses(off):
            raise GraphError(NO_SENSES)
        return dataclasses.replace(
            self,
            stages={name: stage for name, stage in self.stages.items() if name not in off},
            edges=tuple(edge for edge in self.edges if not {edge.source.stage, edge.target.stage} & off),
        )


def _written_edges(file: FileSpec) -> list[WrittenEdge]:
    return [WrittenEdge.between(*ports) for ports in full_graph()] if file.edges is None else file.edges


def _edge_spec(edge: WrittenEdge, file: FileSpec) -> EdgeSpec:
    kind = edge.source.kind
    chunks = edge.credit.chunks or max(kind.credit.chunks, least_chunks(kind, file))
    credit = Limit(chunks, edge.credit.time_ns or kind.credit.duration_ns)
    return EdgeSpec(edge.source, edge.target, credit, edge.when_full or kind.when_full, edge.late or kind.late)


def _build(file: FileSpec) -> PipelineSpec:
    stages = file.stages.by_name()
    spec = PipelineSpec(
        version=VERSION,
        model=file.model if file.model in BUILT_IN else str(Path(file.model).expanduser()),
        window=file.window,
        tail=file.tail,
        cameras=dict(file.cameras),
        stages=stages,
        edges=tuple(_edge_spec(edge, file) for edge in _written_edges(file)),
        admission=file.admission,
        shedding=file.shedding,
        console=file.console,
    )
    return spec.without([name for name, stage in stages.items() if stage.replicas == 0])


# ---- Reading --------------------------------------------------------------------------------------------------------


def default_spec_path() -> Path:
    """./pipeline.yaml where there is one, else the one that is shipped."""
    root = Path(__file__).resolve().parent.parent
    shipped = root / "pipeline.yaml"  # in a checkout; in a wheel it lies in deploy/
    candidates = (Path("pipeline.yaml"), shipped, root / "deploy" / "default_pipeline.yaml")
    return next((path for path in candidates if path.is_file()), shipped)


def load_spec(path: Path, overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read and check a pipeline.yaml; overrides are `--set` strings like "stages.llm.gpus=1". Raises SpecError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise SpecError([Problem(str(path), f"can't be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise SpecError([Problem(str(path), f"not UTF-8 text: byte {error.start + 1}")]) from None
    return parse_spec(text, str(path), overrides)


def parse_spec(
    text: str, name: str, overrides: Sequence[str] = (), environment: Mapping[str, str] = os.environ
) -> PipelineSpec:
    """Check a pipeline description. Raises SpecError with all problems, each as `name:line:column: message`."""
    try:
        return _parsed(text, name, overrides, environment)
    except SpecError:
        for unread in (text, *overrides):  # what is told of it may quote a part of a password
            KNOWN.add_text(unread)
        raise


def _parsed(text: str, name: str, overrides: Sequence[str], environment: Mapping[str, str]) -> PipelineSpec:
    document = read_yaml(text, name, environment)
    if not isinstance(document.tree, dict):
        document.problems.append((document.place(()), _NOT_A_MAPPING if document.tree is not None else _EMPTY))
        raise SpecError(in_file_order(document.problems))
    for assignment in overrides:
        apply_override(document, assignment, environment)
    file = _check(document)
    if document.problems:
        raise SpecError(in_file_order(document.problems))
    return _build(file)


_EMPTY: Final = "the file is empty; the least is `version: 1` and one camera"
_NOT_A_MAPPING: Final = "must be a mapping: version: 1, cameras: …"


def _check(document: Document) -> FileSpec:
    """The file's values, with every problem noted in the document."""
    file, wrong = check_document(document, FileSpec)
    for finding in findings(file, wrong):
        document.problems.append((document.place(finding.path), mask_urls(finding.message)))
    return file


# ---- Writing --------------------------------------------------------------------------------------------------------


def render(spec: PipelineSpec) -> str:
    """The whole description as YAML, defaults filled in, secrets masked; `parse_spec` reads it back."""
    stages: dict[str, object] = {name: _dump(stage) for name, stage in spec.stages.items()}
    stages |= {name: {"replicas": 0} for name in sorted(CAN_BE_OFF - spec.stages.keys())}
    tree = {
        "version": spec.version,
        "model": spec.model,
        "window": _dump(spec.window),
        "tail": _dump(spec.tail),
        "cameras": {name: _dump(camera) for name, camera in spec.cameras.items()},
        "stages": stages,
        "edges": [_edge_as_written(edge) for edge in spec.edges],
        "admission": _dump(spec.admission),
        "shedding": _dump(spec.shedding),
        "console": _dump(spec.console),
    }
    yaml = YAML()
    yaml.width = 4096
    text = io.StringIO()
    yaml.dump(tree, text)
    return text.getvalue()


def _dump(section: Section) -> dict[str, object]:
    return section.model_dump(by_alias=True)


def _edge_as_written(edge: EdgeSpec) -> dict[str, object]:
    credit: dict[str, object] = {"chunks": edge.credit.chunks}
    if edge.credit.duration_ns is not None:
        credit["time"] = format_duration(edge.credit.duration_ns)
    ports = {"from": str(edge.source), "to": str(edge.target)}
    return {**ports, "credit": credit, "when_full": edge.when_full, "late": edge.late}
