"""`pipeline stages` and `pipeline graph`: what they print is what runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from deploy.cli.app import app
from graph.spec import default_spec_path
from stages.catalog import CATALOG
from tests.support.specs import load_spec


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_every_stage_is_listed_with_its_ports_and_its_own_options() -> None:
    lines = invoke("stages").stdout.splitlines()
    (llm,) = [line for line in lines if line.startswith("llm ")]
    assert "image (optional), audio (optional), playback (feedback)" in llm and "text, events" in llm
    assert "kv_memory" in llm and "gpus" not in llm, "what all stages have is none of its own"
    described = json.loads(invoke("stages", "--json").stdout)
    assert described.keys() == CATALOG.built_in.keys() | CATALOG.installed.keys()
    assert described["vocoder"]["options"] == {"steps": 5, "seed": 0}
    assert described["vocoder"]["inputs"]["playback"] == {
        "kind": "playback",
        "feedback": True,
        "side": False,
        "many": False,
        "optional": True,
        "window_s": None,
    }


def test_stages_of_a_description_are_listed_with_the_kinds_of_their_ports(tmp_path: Path) -> None:
    (tmp_path / "gate.py").write_text(
        "from stages.api import FRAMES, NS_PER_S, SOUND, In, Out, Stage, StageOptions\n"
        "class Gate(Stage):\n"
        "    frames, noise, moving = In(FRAMES), In(SOUND, side=True, window_ns=2 * NS_PER_S), Out(FRAMES)\n"
        "    class Options(StageOptions):\n"
        "        threshold: float = 0.5\n"
        "    def process(self, units):\n"
        "        return []\n"
    )
    file = tmp_path / "pipeline.yaml"
    file.write_text('version: 1\nstages: {gate: {use: "gate:Gate", replicas: 0}, vision_encoder: {replicas: 0}}\n')
    lines = invoke("stages", "-f", str(file)).stdout.splitlines()
    (gate,) = [line for line in lines if line.startswith("gate ")]
    assert re.split(" {2,}", gate) == ["gate", "frames, noise (sound, side, 2 s)", "moving (frames)", "threshold"]


def test_a_stage_that_cannot_be_found_is_reported_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text('version: 1\nstages: {gate: {use: "nowhere:Gate"}}\n')
    result = invoke("stages", "-f", str(tmp_path / "pipeline.yaml"))
    assert result.exit_code == 2 and result.stdout == ""


def test_every_edge_of_what_runs_is_printed_upstream_first() -> None:
    spec = load_spec(default_spec_path())
    printed = json.loads(invoke("graph", "-f", str(default_spec_path()), "--json").stdout)
    assert sorted(f"{edge['from']}->{edge['to']}" for edge in printed["edges"]) == sorted(e.id for e in spec.edges)
    sources = [edge["from"].partition(".")[0] for edge in printed["edges"]]
    assert list(dict.fromkeys(sources)) == [stage for stage in printed["stages"] if stage in sources]
    (text,) = [edge for edge in printed["edges"] if edge["from"] == "llm.text"]
    assert text["credit"] == {"chunks": 8, "time_s": 8.0}


def test_the_table_has_a_line_per_edge() -> None:
    lines = invoke("graph", "-f", str(default_spec_path())).stdout.splitlines()
    assert [line.split() for line in lines if line.startswith("llm.text")] == [
        ["llm.text", "tts.text", "text", "8", "chunks,", "8", "s", "wait", "carry"]
    ]


def test_a_side_input_is_marked(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text('version: 1\ncameras: {a: {source: "test://pattern"}}\nstages: {census: {}}\n')
    assert "census.frames (side)" in invoke("graph", "-f", str(file)).stdout
    printed = json.loads(invoke("graph", "-f", str(file), "--json").stdout)
    assert [edge["to"] for edge in printed["edges"] if edge["side"]] == ["census.frames"]


def test_the_flowchart_has_whole_arrows_for_windows_and_dotted_ones_for_news() -> None:
    lines = invoke("graph", "-f", str(default_spec_path()), "--mermaid").stdout.splitlines()
    assert lines[0] == "flowchart LR"
    assert "    llm -->|text| tts" in lines
    assert "    speaker -.->|playback| llm" in lines


def test_what_is_off_is_not_in_it() -> None:
    printed = invoke("graph", "-f", str(default_spec_path()), "--set", "stages.tts.replicas=0").stdout
    assert "vocoder" not in printed and "llm.text" not in printed


def test_a_mistake_in_the_description_is_told_as_everywhere(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("version: 1\ncameras: {}\nstages: {lim: {}}\n")
    result = invoke("graph", "-f", str(tmp_path / "bad.yaml"))
    assert result.exit_code == 2
    assert result.stdout == ""
