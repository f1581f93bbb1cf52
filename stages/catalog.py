"""Where stages are found: built in, brought by other packages (entry points `omni.stages`), or by "module:Class"."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import entry_points
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Final

from graph.stage_type import StageType, StageTypeError, stage_type_of
from graph.wording import clipped, suggest
from stages.stage import Stage

GROUP: Final = "omni.stages"
_BESIDE: Final[set[str]] = set()  # the folders that look_beside was given
# In the order in which a window passes them.
BUILT_IN: Final[Mapping[str, str]] = {
    "camera": "stages.camera:Camera",
    "microphone": "stages.microphone:Microphone",
    "vision_encoder": "stages.vision_encoder:VisionEncoder",
    "audio_encoder": "stages.audio_encoder:AudioEncoder",
    "llm": "stages.llm:Llm",
    "tts": "stages.tts:Tts",
    "vocoder": "stages.vocoder:Vocoder",
    "speaker": "stages.speaker:Speaker",
    "events": "stages.events:Events",
}


class StageCatalog:
    """The stages of this installation, and of a folder; a class is imported when it is looked up."""

    def __init__(self, beside: Path | None = None) -> None:
        """beside: where the pipeline.yaml is."""
        self._beside = beside

    @property
    def modules(self) -> tuple[str, ...]:
        return () if self._beside is None else (str(self._beside.absolute()),)

    @cached_property
    def built_in(self) -> Mapping[str, StageType]:
        return {name: self.find(use) for name, use in BUILT_IN.items()}

    @cached_property
    def installed(self) -> Mapping[str, str]:
        return {entry.name: entry.value for entry in entry_points(group=GROUP)}

    def find(self, use: str) -> StageType:
        """The stage of a class ("module:Class") or of a name. Raises StageTypeError: what is wrong with it."""
        path = BUILT_IN.get(use) or self.installed.get(use) or use
        if path not in BUILT_IN.values():
            for folder in self.modules:
                look_beside(folder)
        cls = stage_class(path)
        stage_type = stage_type_of(cls, path)
        needed = [each.name for each in signature(cls).parameters.values() if _is_needed(each)]
        if needed and "load" not in {name for base in cls.__mro__ if base is not Stage for name in vars(base)}:
            what = f"{path}: __init__ takes {', '.join(needed)}, but a stage is made without arguments"
            raise StageTypeError(f"{what}: read options from self.options, in open_session() or process()")
        if cls.process is Stage.process and cls.advance is Stage.advance:
            written = [name for name in vars(cls) if not name.startswith("_")]
            raise StageTypeError(f"{path} has no process(){suggest('process', written, alone=False)}")
        return stage_type

    def source_problem(self, source: str) -> str:
        """Why a camera's source can be read nowhere, secrets masked; "" where it depends on the machine, or can."""
        from stages.media.reader import url_problem

        return url_problem(source)


CATALOG: Final = StageCatalog()


def stage_class(path: str) -> type[Stage]:
    """The class at "module:Class". Raises StageTypeError: what is wrong with it."""
    module_name, colon, name = path.partition(":")
    if not colon:
        raise StageTypeError(f"there is no stage {path!r}{suggest(path, [*BUILT_IN, *CATALOG.installed])}")
    module = _module(module_name, path)
    cls = getattr(module, name, None)
    if cls is None:
        classes = [key for key, value in vars(module).items() if _is_stage(value) and value.__module__ == module_name]
        problem = f"module {module_name} has no {name!r}{suggest(name, classes) if classes else ''}"
        raise StageTypeError(problem + _shadowed(module))
    if not _is_stage(cls):
        raise StageTypeError(f"{path} is no Stage; derive it from stages.api.Stage")
    return cls  # type: ignore[no-any-return]


def _is_needed(parameter: Parameter) -> bool:
    """Must it be given?"""
    return parameter.default is Parameter.empty and parameter.kind not in (
        Parameter.VAR_POSITIONAL,
        Parameter.VAR_KEYWORD,
    )


def _shadowed(module: Any) -> str:
    """Where a module was found instead of one beside the pipeline.yaml that has its name."""
    file = getattr(module, "__file__", None) or "built in"
    beside = [folder for folder in _BESIDE if (Path(folder) / f"{module.__name__}.py").is_file()]
    if not beside or Path(file).parent in map(Path, beside):
        return ""
    return f"; another module has the name of the file beside the pipeline.yaml, and goes first ({file}): rename yours"


def _is_stage(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Stage)


def _module(name: str, path: str) -> object:
    """Raises StageTypeError."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            if name.endswith(".py"):
                meant = path.replace(".py:", ":", 1)
                raise StageTypeError(f"{path}: a module is written without .py: {meant}") from None
            where = "install it, or put it beside the pipeline.yaml"
            raise StageTypeError(f"there is no module {error.name!r} (of {path}); {where}") from None
        raise StageTypeError(f"{path} can't be imported: it needs {error.name!r}, which is not installed") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever a module of the user's raises
        raise StageTypeError(f"{path} can't be imported: {type(error).__name__}: {clipped(str(error))}") from error


def look_beside(folder: str) -> None:
    """Let modules of this folder be found, behind all others: none of them takes another one's place."""
    _BESIDE.add(folder)
    if folder not in sys.path:
        sys.path.append(folder)
