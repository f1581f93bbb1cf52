"""The checkpoint a pipeline runs on: found, or made; and what it lacks is switched off."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.actor.build import device_of
from deploy.run.hub import HubId, fetch
from deploy.run.memory import available_memory, needed_memory
from graph.chunk import NS_PER_S
from graph.errors import GraphError
from graph.sections import NANO, TINY, StageOptions
from graph.spec import PipelineSpec

if TYPE_CHECKING:
    from model_shards.checkpoint import ComponentInfo
    from model_shards.config import ModelConfig

MAX_DIFFERENCES_SHOWN = 10
UNTRAINED = "UNTRAINED: random weights, for trying the machinery; what it says means nothing"
OF_THE_ROOM = "trained on a synthetic room (synthetic://room); it knows nothing else"


class CheckpointError(GraphError):
    """The checkpoint does not fit the pipeline or the machine."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder. bytes_of: by stage, what its weights take where they are loaded."""

    path: Path
    config: ModelConfig
    bytes_of: dict[str, int]

    @property
    def trained(self) -> bool:
        return not self.config.untrained

    @property
    def caution(self) -> str:
        """What whoever listens to it should know; "" for a checkpoint of the real world."""
        if self.config.untrained:
            return UNTRAINED
        return OF_THE_ROOM if self.config.nano else ""

    def fit(self, spec: PipelineSpec) -> PipelineSpec:
        """The pipeline without the stages whose component the checkpoint switches off (`init_vision: false` …)."""
        config = self.config
        parts = {"vision": config.vision, "audio": config.audio, "tts": config.tts, "vocoder": config.vocoder}
        off = {stage for name, part in parts.items() if part is None for stage in stages_with(spec, name)}
        if config.audio is not None and stages_with(spec, "audio"):
            window_ns = round(config.audio.chunk_length_s * NS_PER_S)
            if spec.window.length_ns != window_ns:
                raise CheckpointError(
                    f"window.length is {spec.window.length_ns / NS_PER_S:g}s, but the model of {self.path} works in "
                    f"windows of {window_ns / NS_PER_S:g}s; set window.length: {window_ns / NS_PER_S:g}s"
                )
        codes = config.llm.quantization
        for name in stages_with(spec, "llm") if codes is not None else ():
            if spec.stages[name].dtype == "float32":
                raise CheckpointError(
                    f"stages.{name}.dtype is float32, but the LLM of {self.path} is in {codes}, which is computed with "
                    f"in bfloat16; set stages.{name}.dtype: auto"
                )
        return spec.without(off) if off else spec

    def check_tensors(self, spec: PipelineSpec) -> None:
        """Raises ModelError when the tensors of a stage don't fit the config; no weight is read for that.

        And CheckpointError when speech has no voice.
        """
        from model_shards.checkpoint import COMPONENTS, VOICE_FILE, check

        if stages_with(spec, "vocoder") and not (self.path / VOICE_FILE).is_file():
            raise CheckpointError(
                f"{self.path} holds no voice ({VOICE_FILE}); make one with `pipeline shards voice {self.path} "
                "--from speech.wav`, or run without speech: --set stages.tts.replicas=0"
            )
        check(self.path, [component for component in COMPONENTS if stages_with(spec, component)])

    def check_memory(self, spec: PipelineSpec, root: Path = Path("/")) -> None:
        """Raises CheckpointError when a pipeline of its own will not fit here. root: where /proc and /sys are."""
        needed, available = needed_memory(spec, self.bytes_of), available_memory(root)
        if needed.num_bytes <= available.num_bytes:
            return
        kv_memory = needed.kv_memory_that_fits(available)
        instead = f"set stages.llm.kv_memory to at most {kv_memory}" if kv_memory else "take a smaller checkpoint"
        raise CheckpointError(
            f"{self.path} needs about {needed} and {available}; {instead}, close other programs, take fewer cameras, "
            "or join a cluster (--address)"
        )


def open_checkpoint(spec: PipelineSpec, tell: Callable[[str], None]) -> Checkpoint:
    """The checkpoint of `spec.model`; `nano` is shipped, `tiny` is made on first use, one of the hub is downloaded.

    Raises ModelError, HubError or CheckpointError.
    """
    from model_shards.checkpoint import inspect
    from model_shards.config import load_config

    path = _folder_of(spec.model, tell)
    config = load_config(path)
    sizes = {
        stage: _loaded_bytes(info, spec.stages[stage], config)
        for info in inspect(path)
        for stage in stages_with(spec, info.component)
    }
    checkpoint = Checkpoint(path, config, sizes)
    tell(": ".join(filter(None, (f"model {spec.model}", checkpoint.caution))))
    tell_differences(config, tell)
    return checkpoint


def config_of(spec: PipelineSpec, tell: Callable[[str], None]) -> ModelConfig:
    """Of `spec.model`, without a download: of one of the hub that is not here, the released one's.

    Raises ModelError or CheckpointError.
    """
    from model_shards.config import RELEASED, load_config

    if HubId.parse(spec.model) is None or Path(spec.model).is_dir():
        return load_config(_folder_of(spec.model, tell))
    tell(f"{spec.model} is not looked at: reckoned with the sizes of the released MiniCPM-o 4.5")
    return RELEASED


def stages_with(spec: PipelineSpec, component: str) -> list[str]:
    """The stages that compute with a part of the checkpoint."""
    return [name for name, each in spec.types.items() if each.component == component]


def _loaded_bytes(info: ComponentInfo, stage: StageOptions, config: ModelConfig) -> int:
    """Codes stay what they are; other weights take the type in which they are computed with."""
    from stages.tensors import runtime

    if info.component == "llm" and config.llm.quantization is not None:
        return info.num_bytes
    dtype = "float32" if info.component == "vocoder" else stage.dtype
    return info.num_parameters * runtime(device_of(stage), dtype).dtype.itemsize


def tell_differences(config: ModelConfig, tell: Callable[[str], None]) -> None:
    """Say where a checkpoint that says it is the released one has other sizes; nothing is refused for that."""
    from model_shards.config import differences

    deviations = differences(config) if config.official else []
    for difference in deviations[:MAX_DIFFERENCES_SHOWN]:
        tell(f"not as released: {difference}")
    if len(deviations) > MAX_DIFFERENCES_SHOWN:
        tell(f"not as released: {len(deviations) - MAX_DIFFERENCES_SHOWN} more")


def cache_folder() -> Path:
    """Where made checkpoints are kept: $XDG_CACHE_HOME/omni-pipeline, by default in ~/.cache.

    Raises CheckpointError where there is no home.
    """
    theirs = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if theirs.is_absolute():  # a relative one means nothing, says the specification
        return theirs / "omni-pipeline"
    try:
        return Path.home() / ".cache" / "omni-pipeline"
    except RuntimeError:
        problem = f"HOME is not set, and user {os.getuid()} has no home; set XDG_CACHE_HOME to a folder for checkpoints"
        raise CheckpointError(problem) from None


def shipped() -> Path:
    """The folder of the nano checkpoint, which lies beside its code, in a checkout as in a wheel. It is only read."""
    import model_shards.nano

    path = Path(model_shards.nano.__path__[0]) / "checkpoint"
    if not (path / "config.json").is_file():
        raise CheckpointError(f"this installation lacks the nano checkpoint ({path}); take another: --set model=tiny")
    return path


def _folder_of(model: str, tell: Callable[[str], None]) -> Path:
    if model == NANO:
        return shipped()
    if model == TINY:
        return _tiny(tell)
    hub_id = HubId.parse(model)
    return Path(model) if hub_id is None or Path(model).is_dir() else fetch(hub_id, tell)


def _tiny(tell: Callable[[str], None]) -> Path:
    from model_shards.init import init_checkpoint

    path = cache_folder() / "tiny"
    if not (path / "config.json").is_file():
        tell(f"making the tiny checkpoint in {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        init_checkpoint(path, "tiny")
    return path
