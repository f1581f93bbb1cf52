"""What is asked of the cameras while the pipeline runs: whether it can be done, before anything of it is.

Rule: nothing here opens, ends or keeps anything; what holds is returned, what doesn't raises Refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from deploy.cameras.sources import Probed, SourceError, apart, check_sources, probe, probe_all
from deploy.control.capacity import CapacityError, Demand, admit
from graph.errors import GraphError, SpecError
from graph.secret import Secret, mask_urls
from graph.sections import CameraSpec
from graph.spec import PipelineSpec, parse_spec
from graph.spec_check import MAX_VIEWS
from graph.wording import listed
from stages.catalog import CATALOG
from stages.media.wire import is_control


class Refused(GraphError):
    """A camera that is not added, or not removed. status: HTTP's. retry_after_s: when to ask again; None: never."""

    def __init__(self, status: int, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after_s = status, retry_after_s


@dataclass(frozen=True, slots=True)
class Checks:
    """What the pipeline's description lets be added. paced: it goes by the clock."""

    spec: PipelineSpec
    paced: bool

    def camera(self, name: str, described: Mapping[str, object]) -> CameraSpec:
        """The camera that is described as in `cameras:`. Raises Refused."""
        camera = self._parsed(name, described)
        self._check_fps(name, camera)
        return camera

    def with_view(self, before: CameraSpec, name: str, view: str, described: Mapping[str, object]) -> CameraSpec:
        """The camera called `name` with one view more. Raises Refused."""
        whole = mask_urls(f"{name}/{view}")
        views = {"views": {view: described.get("source")}, "masked_source": described.get("masked_source")}
        source = self._parsed(name, views).views[view]
        if view in before.sources:
            raise Refused(409, f"camera {whole}: there is one of this name")
        if len(before.sources) >= MAX_VIEWS:
            raise Refused(409, f"camera {whole}: a camera has {MAX_VIEWS} views at most")
        camera = before.model_copy(update={"views": {**before.views, view: source}})
        self._check_fps(name, camera)
        return camera

    def admit(self, cameras: Iterable[tuple[str, CameraSpec]], retry_after_s: int | None) -> None:
        """Raises Refused where `admission.profile` says that all these can't be served on time.

        cameras: by their names, those that are open and those that come; views that come apart, by `porch/back`.
        """
        window_ns = self.spec.window.length_ns
        num_pictures: Counter[str] = Counter()
        for name, camera in cameras:
            num_pictures[name.partition("/")[0]] += camera.num_pictures(window_ns)
        try:
            admit(self.spec, Demand.of(num_pictures.values()))
        except CapacityError as error:
            raise Refused(503, str(error), retry_after_s) from None

    def _parsed(self, name: str, described: Mapping[str, object]) -> CameraSpec:
        template = described.get("masked_source")
        section = {key: value for key, value in described.items() if key != "masked_source"}
        text = json.dumps({"version": 1, "cameras": {name: section}}, ensure_ascii=False)
        if "${" in text:
            raise Refused(422, f"camera {mask_urls(name)}: ${{…}} is resolved by who asks, not here")
        try:
            cameras = parse_spec(text, "camera", CATALOG, environment={}).cameras
            check_sources(replace(self.spec, cameras=cameras), paced=self.paced)
        except SpecError as error:
            problems = [f"camera {mask_urls(name)}: {problem.message}" for problem in error.problems]
            raise Refused(422, "\n".join(problems)) from None
        except SourceError as error:
            raise Refused(422, str(error)) from None
        camera = cameras[name]
        if not isinstance(template, str) or any(map(is_control, template)) or len(camera.sources) > 1:
            return camera
        ((view, source),) = camera.sources.items()
        shown = Secret(template, source.reveal())
        return camera.model_copy(update={"views": {view: shown}} if view else {"source": shown})

    def _check_fps(self, name: str, camera: CameraSpec) -> None:
        """An edge's credit is for all sessions, and was made for the cameras of the beginning."""
        fps, num_views = camera.fps, len(camera.sources)
        num_pictures = camera.num_pictures(self.spec.window.length_ns)
        for edge in self.spec.edges:
            if edge.kind.is_picture and edge.credit.chunks < num_pictures:
                views = f" from {num_views} views" if num_views > 1 else ""
                why = f"a window has {num_pictures} pictures at fps {fps:g}{views}, {edge.id} has credit for "
                why += f"{edge.credit.chunks}; start the pipeline with such a camera, or with more credit"
                raise Refused(422, f"camera {name}: {why}")


def check_only_source(whole: str, described: Mapping[str, object]) -> None:
    """Raises Refused for what a view can't have of its own. whole: its name with that of the camera."""
    if others := described.keys() - {"source", "masked_source"}:
        raise Refused(422, f"camera {whole}: of a view only its source is said; {listed(others)} is the camera's")


def camera_of(cameras: Mapping[str, CameraSpec], name: str, whole: str = "") -> CameraSpec:
    """The open camera of this name. whole: the view that is asked for, with the camera's name. Raises Refused."""
    if name not in cameras:
        missing = (
            f"{whole}: there is no camera {name or repr(name)}" if whole else f"{name}: there is none of this name"
        )
        raise Refused(404, f"camera {missing}; there are: {', '.join(sorted(cameras)) or 'none'}")
    return cameras[name]


def check_spare(whole: str, view: str, camera: CameraSpec) -> None:
    """Raises Refused for a view that is not there, or that the camera can't be without."""
    if not view or view not in camera.sources:
        has = ", ".join(camera.views) or "one source only"
        name = whole.partition("/")[0]
        raise Refused(404, f"camera {whole}: camera {name} has no view {view or repr(view)}; it has: {has}")
    if len(camera.sources) == 1:
        raise Refused(409, f"camera {whole}: it is the last view; remove the whole camera")
    if camera.has_sound and view == camera.heard:
        raise Refused(409, f"camera {whole}: its sound is what is heard of the camera; remove the whole camera")


def look_at(sources: Mapping[str, CameraSpec], is_ending: Callable[[], bool]) -> tuple[str, ...]:
    """Look at each source; returns warnings, of live cameras that don't answer: they are looked for, as in `up`.

    is_ending: asked again and again, so that an end waits for no camera. Raises Refused for a broken file.
    """

    def look(camera: CameraSpec, is_over: Callable[[], bool]) -> Probed:
        return probe(None, camera, lambda: is_over() or is_ending())

    probed = probe_all(apart(sources), look)
    if broken := [f"camera {source}: {why}" for source, (why, is_live) in probed.items() if why and not is_live]:
        raise Refused(422, "\n".join(broken))
    return tuple(f"camera {source}: {why}; it is looked for again" for source, (why, _) in probed.items() if why)
