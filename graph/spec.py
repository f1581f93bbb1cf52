"""pipeline.yaml, read and checked once. Afterwards nobody checks again.

Rules:
- All problems are reported at once, each with line and column (or the `--set` it came from).
- A `PipelineSpec` says what runs: a stage with `replicas: 0` and its edges are not in it.

How the file spells it is in graph/sections.py, which stages it names in graph/stages_written.py, how they are wired in
graph/edges.py.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ruamel.yaml import YAML

from graph.edges import Edges, EdgeSpec, no_senses, wiring_of
from graph.errors import GraphError, Problem, SpecError
from graph.kinds import Kind
from graph.secret import KNOWN, mask_urls
from graph.sections import (
    BUILT_IN,
    VERSION,
    AdmissionSpec,
    CameraSpec,
    ConsoleSpec,
    FileSpec,
    ReplicasSpec,
    Section,
    SheddingSpec,
    StageOptions,
    TailSpec,
    WindowSpec,
    file_section,
)
from graph.spec_check import findings, source_findings
from graph.stage_type import Catalog, StageType, can_be_off, needed_among
from graph.stages_written import stages_of
from graph.units import format_duration
from graph.wiring import Wiring
from graph.wording import listed
from graph.yaml_check import check_document
from graph.yaml_file import MAX_BYTES, Document, apply_override, in_file_order, read_yaml

# ---- What runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PipelineSpec:
    """A checked pipeline. `stages` and `edges` hold what runs; `model` is one of BUILT_IN, a folder, or a hub id.

    types: what each stage is, by its name. off: stages that are off, of those that may be. off_classes: where their
    classes are, for those that name one. spread: stages with as many replicas as the cameras ask for.
    modules: folders in which the classes of stages may lie, beside the installed packages.
    wiring: what follows from the edges.
    """

    version: int
    model: str
    window: WindowSpec
    tail: TailSpec
    cameras: Mapping[str, CameraSpec]
    stages: Mapping[str, StageOptions]
    types: Mapping[str, StageType] = field(compare=False, repr=False)
    edges: tuple[EdgeSpec, ...]
    admission: AdmissionSpec
    shedding: SheddingSpec
    console: ConsoleSpec
    off: frozenset[str] = frozenset()
    off_classes: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    spread: frozenset[str] = field(default=frozenset(), compare=False)
    wiring: Wiring = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "wiring", wiring_of(self.types, self.edges))

    def without(self, stages: Collection[str]) -> PipelineSpec:
        """The same with these stages off, and with them those which then have nothing to do; GraphError if it can't."""
        possible = can_be_off(self.types)
        if stuck := set(stages) - possible - self.off:
            raise GraphError(f"{listed(stuck)} can't be switched off; these can: {listed(possible)}")
        off = self.wiring.idle(set(stages) & self.stages.keys(), needed_among(self.types))
        if off.issuperset(self.wiring.sources):
            raise GraphError(no_senses(self.wiring))
        return dataclasses.replace(
            self,
            stages={name: stage for name, stage in self.stages.items() if name not in off},
            types={name: each for name, each in self.types.items() if name not in off},
            edges=tuple(edge for edge in self.edges if not {edge.source.stage, edge.target.stage} & off),
            off=self.off | (off & possible),
            off_classes={**self.off_classes, **{name: use for name in off if (use := self.stages[name].use)}},
        )

    def with_cameras(self, cameras: Mapping[str, CameraSpec], num_cores: int = os.cpu_count() or 1) -> PipelineSpec:
        """The same with other cameras. num_cores: of the machines where they are opened."""
        stages = dict(self.stages)
        for name in self.spread & stages.keys():
            num_replicas = -(-len(cameras) // (self.types[name].sessions_per_replica or len(cameras) or 1))
            scale = ReplicasSpec(min=max(1, min(num_replicas, num_cores)))
            stages[name] = stages[name].model_copy(update={"scale": scale})
        return dataclasses.replace(self, cameras=cameras, stages=stages)

    @property
    def ends_windows(self) -> frozenset[str]:
        """The stages at which a window may have come to its end."""
        return frozenset(name for name, each in self.types.items() if each.ends_windows)

    @property
    def has_pictures(self) -> bool:
        """Whether something is seen."""
        return any(kind.is_picture for kind in self._made)

    @property
    def has_sound(self) -> bool:
        """Whether something is heard."""
        return any(kind.is_sound for kind in self._made)

    @property
    def has_speech(self) -> bool:
        """Whether there is a listener, of whom news come."""
        return any(kind.is_control for kind in self._made)

    @property
    def _made(self) -> list[Kind[Any]]:
        return [port.kind for each in self.types.values() for port in each.outputs.values()]

    @property
    def needed(self) -> set[str]:
        """The stages that are of use though nothing takes what they make."""
        return needed_among(self.types)


def _build(file: FileSpec, types: Mapping[str, StageType], edges: tuple[EdgeSpec, ...]) -> PipelineSpec:
    stages = file.stages.by_name()
    spec = PipelineSpec(
        version=VERSION,
        model=file.model if file.model in BUILT_IN else str(Path(file.model).expanduser()),
        window=file.window,
        tail=file.tail,
        cameras=dict(file.cameras),
        stages=stages,
        types=types,
        edges=edges,
        admission=file.admission,
        shedding=file.shedding,
        console=file.console,
        spread=frozenset(_spread(stages, types)),
    )
    return spec.without([name for name, stage in stages.items() if stage.replicas == 0]).with_cameras(file.cameras)


def _spread(stages: Mapping[str, StageOptions], types: Mapping[str, StageType]) -> Iterator[str]:
    """The stages whose replicas follow from the cameras: neither they nor those that share their process say it."""
    for name, stage in stages.items():
        beside = [n for n, other in stages.items() if n == name or (stage.process and other.process == stage.process)]
        if all(types[n].sessions_per_replica and "scale" not in stages[n].model_fields_set for n in beside):
            yield name


# ---- Reading --------------------------------------------------------------------------------------------------------


SPEC_FILE: Final = Path("pipeline.yaml")


def default_spec_path() -> Path:
    """./pipeline.yaml where there is one, else the one that is shipped."""
    root = Path(__file__).resolve().parent.parent
    shipped = root / "pipeline.yaml"  # in a checkout; in a wheel it lies in deploy/
    candidates = (SPEC_FILE, shipped, root / "deploy" / "default_pipeline.yaml")
    return next((path for path in candidates if path.is_file()), shipped)


def load_spec(path: Path, catalog: Catalog, overrides: Sequence[str] = ()) -> PipelineSpec:
    """Read and check a pipeline.yaml. Raises SpecError.

    catalog: the stages that there are. overrides: `--set` strings like "stages.llm.gpus=1".
    """
    return parse_spec(_text_of(path), str(path), catalog, overrides)


def load_types(path: Path, catalog: Catalog, overrides: Sequence[str] = ()) -> Mapping[str, StageType]:
    """What each stage of a pipeline.yaml is, also of those that are off. Raises SpecError where one can't be found."""
    document = _document(_text_of(path), str(path), overrides, os.environ)
    types, _ = stages_of(document, catalog)
    if document.problems:
        raise SpecError(in_file_order(document.problems))
    return types


def _text_of(path: Path) -> str:
    """Raises SpecError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1).decode("utf-8-sig")
    except OSError as error:
        raise SpecError([Problem(str(path), f"can't be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise SpecError([Problem(str(path), f"not UTF-8 text: byte {error.start + 1}")]) from None


def parse_spec(
    text: str,
    name: str,
    catalog: Catalog,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> PipelineSpec:
    """Check a pipeline description. Raises SpecError with all problems, each as `name:line:column: message`."""
    try:
        return _parsed(text, name, catalog, overrides, environment)
    except SpecError:
        for unread in (text, *overrides):  # what is told of it may quote a part of a password
            KNOWN.add_text(unread)
        raise


def _parsed(
    text: str, name: str, catalog: Catalog, overrides: Sequence[str], environment: Mapping[str, str]
) -> PipelineSpec:
    document = _document(text, name, overrides, environment)
    types, lost = stages_of(document, catalog)
    file, edges = _check(document, types, lost, catalog)
    if document.problems:
        raise SpecError(in_file_order(document.problems))
    return dataclasses.replace(_build(file, types, edges), modules=catalog.modules)


def _document(text: str, name: str, overrides: Sequence[str], environment: Mapping[str, str]) -> Document:
    """The file with what is set from outside. Raises SpecError where it is no mapping."""
    document = read_yaml(text, name, environment)
    if not isinstance(document.tree, dict):
        document.problems.append((document.place(()), _NOT_A_MAPPING if document.tree is not None else _EMPTY))
        raise SpecError(in_file_order(document.problems))
    for assignment in overrides:
        apply_override(document, assignment, environment)
    return document


_EMPTY: Final = "the file is empty; the least is `version: 1` and one camera"
_NOT_A_MAPPING: Final = "must be a mapping: version: 1, cameras: …"


def _check(
    document: Document, types: Mapping[str, StageType], lost: Collection[str], catalog: Catalog
) -> tuple[FileSpec, tuple[EdgeSpec, ...]]:
    """The file's values and edges, with every problem noted in the document. lost: stages that were taken out of it."""
    section = file_section(tuple((name, each.options) for name, each in types.items()))
    file, wrong = check_document(document, section)
    edges = Edges(file, types, lost)
    for finding in findings(file, types, edges, wrong):
        document.problems.append((document.place(finding.path), mask_urls(finding.message)))
    for finding in source_findings(file, catalog.source_problem):
        document.problems.append((document.place(finding.path), finding.message))  # masked; it may speak of '@'
    return file, edges.all


# ---- Writing --------------------------------------------------------------------------------------------------------


def render(spec: PipelineSpec) -> str:
    """The whole description as YAML, defaults filled in, secrets masked; `parse_spec` reads it back."""
    stages: dict[str, object] = {name: _dump(stage) for name, stage in spec.stages.items()}
    classes = {name: {"use": use} for name, use in spec.off_classes.items()}
    stages |= {name: {**classes.get(name, {}), "replicas": 0} for name in sorted(spec.off)}
    tree = {
        "version": spec.version,
        "model": spec.model,
        "window": _dump(spec.window),
        "tail": _dump(spec.tail),
        "cameras": {name: _camera(camera) for name, camera in spec.cameras.items()},
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


def _camera(camera: CameraSpec) -> dict[str, object]:
    """With its source, or its views."""
    return {key: value for key, value in _dump(camera).items() if value is not None and value != {}}


def _edge_as_written(edge: EdgeSpec) -> dict[str, object]:
    credit: dict[str, object] = {"chunks": edge.credit.chunks}
    if edge.credit.duration_ns is not None:
        credit["time"] = format_duration(edge.credit.duration_ns)
    ports = {"from": str(edge.source), "to": str(edge.target)}
    return {**ports, "credit": credit, "when_full": edge.when_full, "late": edge.late}
