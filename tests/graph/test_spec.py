"""graph/spec.py, and through it graph/sections.py, spec_check.py, yaml_check.py, yaml_file.py and units.py.

`specs/` is a corpus of broken files: each `.yaml` has a sibling `.txt` with everything that must be said about it, word
for word. Lines `# --set a.b=c` in a file are overrides.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graph.credit import Limit
from graph.errors import GraphError, SpecError
from graph.ladder import STEPS
from graph.spec import PipelineSpec, default_spec_path, render
from graph.stage_type import can_be_off
from graph.units import format_bytes, format_duration, parse_bytes, parse_duration
from stages.catalog import CATALOG
from stages.llm import LlmOptions
from stages.speaker import SpeakerOptions
from stages.vision_encoder import VisionOptions
from tests.support.specs import load_spec, parse_spec

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
MINIMAL = "version: 1\ncameras: {test: {source: 'test://pattern'}}\n"
PASSWORD = "hunter2"
ENVIRONMENT = {"LOGIN": f"admin:{PASSWORD}"}
CORPUS = sorted((Path(__file__).parent / "specs").glob("*.yaml"))
STATIC_EDGES = {
    "camera.frames->vision_encoder.frames",
    "camera.events->events.events",
    "microphone.sound->audio_encoder.sound",
    "vision_encoder.image->llm.image",
    "audio_encoder.audio->llm.audio",
    "llm.text->tts.text",
    "llm.events->events.events",
    "tts.codes->vocoder.codes",
    "vocoder.speech->speaker.speech",
    "speaker.playback->camera.playback",
    "speaker.playback->llm.playback",
    "speaker.playback->tts.playback",
    "speaker.playback->vocoder.playback",
    "speaker.events->events.events",
}
WRITTEN_EDGES = "edges:\n" + "".join(
    f"  - {{from: {source}, to: {target}}}\n" for source, target in (edge.split("->") for edge in sorted(STATIC_EDGES))
)
# The machine that tests may be busy; what is slow shows in test_a_hostile_file_costs_….
unhurried = settings(deadline=None, max_examples=50)


def parse(text: str, *overrides: str) -> PipelineSpec:
    return parse_spec(text, "pipeline.yaml", overrides, ENVIRONMENT)


def errors_of(text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse(text, *overrides)
    return str(caught.value)


# ---- The corpus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_every_mistake_in_a_broken_file_is_told_with_its_place(path: Path) -> None:
    text = path.read_text()
    overrides = [line.removeprefix("# --set ") for line in text.splitlines() if line.startswith("# --set ")]
    with pytest.raises(SpecError) as caught:
        parse_spec(text, path.name, overrides, ENVIRONMENT)
    assert f"{caught.value}\n" == path.with_suffix(".txt").read_text()


def test_the_corpus_has_no_password_in_what_is_said() -> None:
    assert len(CORPUS) >= 40
    assert not [path.name for path in CORPUS if PASSWORD in path.with_suffix(".txt").read_text()]


# ---- What a file without mistakes becomes ---------------------------------------------------------------------------


def test_the_shipped_file_spells_out_the_defaults() -> None:
    shipped = load_spec(Path(__file__).parents[2] / "pipeline.yaml")
    assert dataclasses.replace(shipped, cameras=parse(MINIMAL).cameras) == parse(MINIMAL)


def test_the_shipped_file_watches_three_rooms() -> None:
    cameras = load_spec(Path(__file__).parents[2] / "pipeline.yaml").cameras
    assert len(cameras) == 3
    for camera in cameras.values():
        assert camera.source.reveal().startswith("synthetic://room?")
        assert camera == camera.model_copy(update={"fps": 1.0, "microphone": "embedded", "max_pixels": 4 * 448 * 448})


def test_default_path_prefers_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_spec_path() == Path(__file__).parents[2] / "pipeline.yaml"
    (tmp_path / "pipeline.yaml").write_text(MINIMAL)
    assert default_spec_path() == Path("pipeline.yaml")


def test_durations_and_sizes_are_ns_and_bytes() -> None:
    spec = parse(
        MINIMAL
        + "window: {length: 500ms, lateness: 0s}\ntail: {lead: 1.5s, delay: 300ms}\n"
        + "stages: {llm: {kv_memory: 1.5GiB, wait: 20ms}}\n"
    )
    assert (spec.window.length_ns, spec.window.lateness_ns) == (500 * NS_PER_MS, 0)
    assert (spec.tail.lead_ns, spec.tail.delay_ns) == (1500 * NS_PER_MS, 300 * NS_PER_MS)
    llm = spec.stages["llm"]
    assert isinstance(llm, LlmOptions)
    assert (llm.kv_memory_bytes, llm.wait_ns) == (3 << 29, 20 * NS_PER_MS)


def test_stage_options_have_their_types_and_defaults() -> None:
    spec = parse(MINIMAL + "stages:\n  llm: {gpus: 1, replicas: {min: 2, max: 4}, resources: {node_a: 1}}\n  tts:\n")
    assert list(spec.stages) == list(CATALOG.built_in)
    llm, vision, speaker = (spec.stages[name] for name in ("llm", "vision_encoder", "speaker"))
    assert (llm.replicas, llm.max_replicas, llm.gpus, llm.resources) == (2, 4, 1.0, {"node_a": 1.0})
    assert isinstance(vision, VisionOptions)
    assert (vision.max_slices, vision.batch, vision.replicas, vision.max_replicas, vision.process) == (
        1,
        16,
        1,
        1,
        None,
    )
    assert isinstance(speaker, SpeakerOptions)
    assert (speaker.sink, speaker.process) == ("virtual", "io")


def test_without_edges_every_output_goes_to_every_input_of_its_kind() -> None:
    edges = {edge.id: edge for edge in parse(MINIMAL).edges}
    assert edges.keys() == STATIC_EDGES
    frames, text = edges["camera.frames->vision_encoder.frames"], edges["llm.text->tts.text"]
    assert (frames.credit, frames.when_full, frames.late) == (Limit(4), "drop_oldest", "drop")
    assert (text.credit, text.when_full, text.late) == (Limit(8, 8 * NS_PER_S), "wait", "carry")
    assert edges["speaker.playback->llm.playback"].credit == Limit(64)


def test_written_edges_take_what_they_leave_out_from_their_kind() -> None:
    text = WRITTEN_EDGES.replace("to: llm.audio", "to: llm.audio, credit: {time: 2s}, late: drop")
    edges = {edge.id: edge for edge in parse(MINIMAL + text).edges}
    audio = edges.pop("audio_encoder.audio->llm.audio")
    assert (audio.credit, audio.when_full, audio.late) == (Limit(8, 2 * NS_PER_S), "wait", "drop")
    assert edges == {edge.id: edge for edge in parse(MINIMAL).edges if edge.id != audio.id}


def test_console_takes_ipv6_and_a_free_port() -> None:
    console = parse(MINIMAL + "console: {listen: '[::1]:0'}\n").console
    assert (console.host, console.port) == ("::1", 0)


@pytest.mark.parametrize("listen", ["127.0.0.1:8600", "127.8.7.6:80", "localhost:8600", "'[::1]:8600'"])
def test_console_listens_on_loopback(listen: str) -> None:
    assert parse(f"{MINIMAL}console: {{listen: {listen}}}\n").console.listen == listen.strip("'")


@pytest.mark.parametrize("listen", ["0.0.0.0:8600", "10.0.0.7:80", "'[::]:8600'", "example.org:80", "127.0.0.1.eu:80"])
def test_console_listens_nowhere_else_for_now(listen: str) -> None:
    assert "write a loopback address" in errors_of(f"{MINIMAL}console: {{listen: {listen}}}\n")


def test_a_delay_that_is_not_written_is_told_where_the_window_is() -> None:
    message = errors_of(f"{MINIMAL}window: {{length: 200ms}}\n")
    assert message.startswith("pipeline.yaml:3:18: tail.delay: 300ms is not less than window.length (200ms)")


def test_what_follows_from_another_mistake_is_not_told() -> None:
    said = errors_of(f"{MINIMAL}window: {{length: soon}}\ntail: {{lead: 3s, delay: 2s}}\n")
    assert said == "pipeline.yaml:3:18: window.length: must be a duration like 1s, 150ms or 2m, not 'soon'"


def test_a_model_may_be_a_folder(tmp_path: Path) -> None:
    assert parse(f"{MINIMAL}model: {tmp_path}\n").model == str(tmp_path)


def test_aliases_are_read_and_do_not_share() -> None:
    spec = parse("version: 1\ncameras:\n  a: &a {source: 'test://pattern', fps: 2}\n  b: *a\n", "cameras.b.fps=3")
    assert [camera.fps for camera in spec.cameras.values()] == [2, 3]


def test_digits_are_a_camera_name() -> None:
    spec = parse("version: 1\ncameras: {1: {source: 'test://pattern'}}\n", "cameras.1.fps=5")
    assert spec.cameras["1"].fps == 5


def test_256_cameras_are_enough() -> None:
    cameras = [f"  c{i}: {{source: 'test://pattern'}}\n" for i in range(257)]
    assert len(parse("version: 1\ncameras:\n" + "".join(cameras[:256])).cameras) == 256
    message = errors_of("version: 1\ncameras:\n" + "".join(cameras))
    assert message == "pipeline.yaml:3:3: 257 cameras; one pipeline takes 256"


def test_a_spec_travels_to_another_process() -> None:
    spec = parse('version: 1\ncameras: {door: {source: "rtsp://${env:LOGIN}@h/x", fps: 2}}\n')
    assert pickle.loads(pickle.dumps(spec)) == spec


def test_errors_travel_to_another_process() -> None:
    with pytest.raises(SpecError) as caught:
        parse("version: 2\n")
    twin = pickle.loads(pickle.dumps(caught.value))
    assert twin.problems == caught.value.problems
    assert str(twin) == str(caught.value)


# ---- Switching off --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("off", "gone"),
    [
        ("vision_encoder", {"vision_encoder", "camera"}),
        ("audio_encoder", {"audio_encoder", "microphone"}),
        ("tts", {"tts", "vocoder", "speaker"}),
        ("vocoder", {"tts", "vocoder", "speaker"}),
    ],
)
def test_a_stage_that_is_off_takes_its_edges_and_the_idle_with_it(off: str, gone: set[str]) -> None:
    spec = parse(MINIMAL + f"stages: {{{off}: {{replicas: 0}}}}\n")
    assert CATALOG.built_in.keys() - spec.stages.keys() == gone
    assert {edge.id for edge in spec.edges} == {
        edge for edge in STATIC_EDGES if not any(port.split(".")[0] in gone for port in edge.split("->"))
    }
    assert {edge.id for edge in parse(MINIMAL).without([off]).edges} == {edge.id for edge in spec.edges}


def test_edges_of_a_stage_that_is_off_may_stay_in_the_file() -> None:
    spec = parse(MINIMAL + "stages: {tts: {replicas: 0}}\n" + WRITTEN_EDGES)
    assert {edge.id for edge in spec.edges} == {edge.id for edge in parse(MINIMAL).without(["tts"]).edges}


def test_without_refuses_what_the_pipeline_cannot_miss() -> None:
    with pytest.raises(GraphError, match="llm can't be switched off; these can: audio_encoder, tts"):
        parse(MINIMAL).without(["llm", "tts"])
    with pytest.raises(GraphError, match="nothing to see and nothing to hear"):
        parse(MINIMAL).without(["vision_encoder"]).without(["audio_encoder"])


# ---- Writing --------------------------------------------------------------------------------------------------------


@unhurried
@given(
    st.sets(st.sampled_from(sorted(can_be_off(CATALOG.built_in))), max_size=3).filter(
        lambda off: not {"vision_encoder", "audio_encoder"} <= off
    ),
    st.integers(10 * NS_PER_MS, 60 * NS_PER_S),
    st.integers(0, 1 << 50),
    st.sampled_from(["1", "7", "{min: 1, max: 3}"]),
)
def test_what_is_rendered_reads_back_the_same(off: set[str], length_ns: int, memory: int, replicas: str) -> None:
    text = f"""{MINIMAL}
window: {{length: {length_ns}ns}}
tail: {{lead: 60s, delay: {length_ns - 1}ns}}
stages:
  llm: {{kv_memory: {memory}B, replicas: {replicas}}}
  speaker: {{process: null}}
"""
    spec = parse(text).without(off)
    assert parse(render(spec)) == spec


def test_rendered_secrets_are_references_again() -> None:
    text = (
        'version: 1\ncameras: {door: {source: "rtsp://admin:${env:LOGIN}@h/x", microphone: none},'
        f' back: {{source: "rtsp://admin:{PASSWORD}@h/x?token={PASSWORD}"}}}}\n'
    )
    spec = parse(text)
    rendered = render(spec)
    assert PASSWORD not in rendered
    assert "rtsp://admin:${env:LOGIN}@h/x" in rendered
    assert "rtsp://***@h/x?***" in rendered
    assert parse(rendered).cameras["door"] == spec.cameras["door"]


# ---- Secrets --------------------------------------------------------------------------------------------------------


def test_a_secret_shows_itself_in_no_print(tmp_path: Path) -> None:
    (tmp_path / "login").write_text(f"admin:{PASSWORD}\n")
    spec = parse(
        f'version: 1\ncameras: {{a: {{source: "rtsp://${{env:LOGIN}}@h/x"}}, b: {{source: "rtsp://admin:{PASSWORD}@h"}},'
        f' c: {{source: "rtsp://${{file:{tmp_path}/login}}@h"}}, d: {{source: "rtsp://h/?password={PASSWORD}"}}}}\n'
    )
    prints = [repr(spec), str(spec), render(spec)]
    for camera in spec.cameras.values():
        prints += [
            repr(camera),
            str(camera.source),
            f"{camera.source}",
            camera.source.masked,
            camera.model_dump_json(),
        ]
        prints += [str(camera.model_dump()), repr(copy.deepcopy(camera.source))]
    assert not [text for text in prints if PASSWORD in text]
    revealed = [camera.source.reveal() for camera in spec.cameras.values()]
    assert revealed == [
        f"rtsp://admin:{PASSWORD}@h/x",
        f"rtsp://admin:{PASSWORD}@h",
        f"rtsp://admin:{PASSWORD}@h",
        f"rtsp://h/?password={PASSWORD}",
    ]


@pytest.mark.parametrize(("content", "reason"), [(b"", "1 byte to 64 KiB"), (b"\xff\xfe", "not UTF-8")])
def test_a_secret_file_must_hold_text(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "login").write_bytes(content)
    assert reason in errors_of(f'version: 1\ncameras: {{a: {{source: "${{file:{tmp_path}/login}}"}}}}\n')
    assert "no such file" in errors_of(f'version: 1\ncameras: {{a: {{source: "${{file:{tmp_path}}}"}}}}\n')


# ---- --set ----------------------------------------------------------------------------------------------------------


def test_set_reads_its_value_as_yaml_and_makes_what_is_absent() -> None:
    spec = parse(MINIMAL, "stages.llm={gpus: 1}", "stages.llm.batch=2", "cameras.door.source=rtsp://${env:LOGIN}@h")
    assert (spec.stages["llm"].gpus, spec.stages["llm"].batch) == (1, 2)
    assert spec.cameras["door"].source.masked == "rtsp://${env:LOGIN}@h"


def test_the_last_set_wins_and_repairs_the_file() -> None:
    spec = parse(MINIMAL + "window: {length: soon}\n", "window.length=2s", "window.length=3s")
    assert spec.window.length_ns == 3 * NS_PER_S


def test_set_reaches_into_lists() -> None:
    spec = parse(MINIMAL + WRITTEN_EDGES, "edges.0.credit.chunks=3")
    first = next(edge for edge in spec.edges if edge.id == min(STATIC_EDGES))
    assert first.credit.chunks == 3


# ---- Hostile files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x" * 10_000_000, "larger than 1 MiB"),
        ("a: [" + "x, " * 340_000 + "]", "more than 10000 values"),
        ("[" * 900_000, "deeper than 32"),
        ("".join(f"k{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(60)), "no '&a-1' before it"),
        ("a: &a [x, x]\n" + "".join(f"k{i}: &a [*a, *a]\n" for i in range(60)), "more than 10000 values"),
        (MINIMAL + "model: '" + "://" * 300_000 + "'", "no such folder"),
        (MINIMAL + "model: '" + "?pass" * 200_000 + "'", "no such folder"),
        (MINIMAL + "stages: {llm: {gpus: " + "9" * 900_000 + "}}", "must be a finite number"),
        (MINIMAL + "window: {length: '" + "1" * 900_000 + "'}", "must be a duration"),
        ("version: 1\n" * 80_000, "duplicate key"),
        ("a: \0", "not text"),
        (MINIMAL + "model: ~nobody_of_this_name/x", "no such folder"),
    ],
    ids=range(12),
)
def test_a_hostile_file_costs_a_short_message_and_little_time(text: str, message: str) -> None:
    started_s = time.process_time()
    said = errors_of(text)
    assert message in said
    assert max(map(len, said.splitlines())) < 600
    assert time.process_time() - started_s < 5  # a guard against quadratic time; typically 0.3


def test_a_file_that_cannot_be_read_is_a_spec_error(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"version: 1 # \xe9\n")
    for name, reason in (("none.yaml", "No such file"), ("", "Is a directory"), ("latin.yaml", "not UTF-8 text")):
        with pytest.raises(SpecError, match=reason):
            load_spec(tmp_path / name)


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_text(MINIMAL, encoding="utf-8-sig")
    assert load_spec(tmp_path / "bom.yaml") == parse(MINIMAL)


@unhurried
@given(st.text("ab:-[]{}&*!|>'\"%@` \n\t#,?0.1~<$", max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    with pytest.raises(SpecError):
        parse(text)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(["", "1s", "a.b", "llm.text", "${env:X}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["llm", "replicas", "min", "source", "from", "credit", "A b", "length"]), inner
        )
    ),
    max_leaves=6,
)


@unhurried
@given(st.dictionaries(st.sampled_from(["version", "cameras", "stages", "edges", "window", "console", "x"]), VALUES))
def test_any_tree_is_a_spec_or_a_spec_error(tree: dict[str, object]) -> None:
    overrides = [f"{key}={_flow(value)}" for key, value in tree.items()]
    try:
        parse("version: 1\ncameras: {}\n", *overrides)
    except SpecError as error:
        assert error.problems


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return "~" if value is None else repr(value)


# ---- Units ----------------------------------------------------------------------------------------------------------


@unhurried
@given(st.integers(0, 1 << 62))
def test_durations_and_sizes_are_written_as_they_are_read(amount: int) -> None:
    assert parse_duration(format_duration(amount % 10**18)) == amount % 10**18
    assert parse_bytes(format_bytes(amount % 10**18)) == amount % 10**18


def test_durations_are_written_short() -> None:
    amounts = [0, 150 * NS_PER_MS, NS_PER_S, 90 * NS_PER_S, 120 * NS_PER_S, 1]
    assert [format_duration(ns) for ns in amounts] == ["0s", "150ms", "1s", "90s", "2m", "1ns"]
    assert [format_bytes(size) for size in (0, 512 << 20, 10**9, 5)] == ["0B", "512MiB", "1GB", "5B"]


# ---- The shedding ladder --------------------------------------------------------------------------------------------


def test_the_ladder_is_all_that_a_session_can_do_without_unless_it_is_written() -> None:
    default, none, one = (
        parse(MINIMAL + text).shedding for text in ("", "shedding: {ladder: []}", "shedding: {ladder: [vision_off]}")
    )
    assert default.steps() == STEPS
    assert default.steps(keeps_pictures=True) == ("merged_windows", "listen_only")
    assert (none.steps(), one.steps(keeps_pictures=True)) == ((), ("vision_off",))
