"""Which stages a description names, and what each of them is. Pure, but for the classes that are looked up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graph.sections import class_path, name_of
from graph.stage_type import Catalog, StageType, StageTypeError
from graph.wording import listed, suggest
from graph.yaml_file import Document, KeyPath


def stages_of(document: Document, catalog: Catalog) -> tuple[dict[str, StageType], set[str]]:
    """What each stage is, by its name: those that every pipeline has, and those that the document adds.

    What can't be found is noted as a problem of the document, and taken out of it. returns: the stages, and the names
    of those that were taken out.
    """
    types = dict(catalog.built_in)
    written = document.tree.get("stages") if isinstance(document.tree, dict) else None
    if not isinstance(written, dict):
        return types, set()
    names = set(written)
    for name in list(written):
        section = written[name]
        use = section.get("use") if isinstance(section, dict) else None
        path: KeyPath = ("stages", name)
        if use is None and name in catalog.built_in:
            continue
        problem = _misnamed(name) if use is not None else ""
        is_of_key = use is None or bool(problem)
        problem = problem or _problem(name, use, types, catalog)
        if problem:
            place = document.place(path if is_of_key else (*path, "use"), of_key=is_of_key)
            document.problems.append((place, problem))
            del written[name]
            types.pop(name, None) if name not in catalog.built_in else None
    _check_replaced(document, written, types, catalog)
    return types, names - set(written)


def _check_replaced(document: Document, written: dict[str, Any], types: dict[str, StageType], catalog: Catalog) -> None:
    """A class that has a built-in stage's name, and makes nothing of what others take from that one."""
    is_off = {name for name, section in written.items() if isinstance(section, dict) and section.get("replicas") == 0}
    for name in [name for name in catalog.built_in if types[name].use != catalog.built_in[name].use]:
        makes = {port.kind for each in types.values() for port in each.outputs.values()}
        lost = {port.kind for port in catalog.built_in[name].outputs.values() if port.kind.is_windowed} - makes
        for kind in lost if name not in is_off else ():
            takers = [
                other
                for other in types.keys() - is_off
                if any(port.kind == kind and not (port.optional or port.many) for port in types[other].inputs.values())
            ]
            if takers:
                what = f"makes no {kind}, which {listed(takers)} takes from {name}"
                message = f"stages.{name}.use: {types[name].use} {what}; give it a name of its own to have both"
                document.problems.append((document.place(("stages", name, "use"), of_key=False), message))
                del written[name]
                types[name] = catalog.built_in[name]
                break


def _problem(name: str, use: Any, types: dict[str, StageType], catalog: Catalog) -> str:
    """Enter the stage into `types`, or say what is wrong with it."""
    try:
        types[name] = catalog.find(name if use is None else class_path(use))
    except (ValueError, StageTypeError) as error:
        if use is None and name not in catalog.installed:
            return _unknown(name, catalog.built_in, catalog.installed)
        return f"stages.{name}{'' if use is None else '.use'}: {error}"
    return ""


def _misnamed(name: str) -> str:
    try:
        name_of(name)
    except ValueError as error:
        return f"stages: {error}"
    return ""


def _unknown(name: str, built_in: Mapping[str, object], installed: Mapping[str, object]) -> str:
    instead = suggest(name, [*built_in, *installed], alone=False)
    return f"there is no stage {name!r}{instead or '; one of your own names its class: use: module:Class'}"
