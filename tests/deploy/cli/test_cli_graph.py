"""`pipeline stages` and `pipeline graph`: what they print is what runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from deploy.cli.app import app
from graph.spec import default_spec_path
from stages.catalog import CATALOG
from tests.support.specs import load_spec

MINIMAL = "version: 1\ncameras: {a: {source: 'test://pattern'}}\n"


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def blocks(*arguments: str) -> dict[str, list[str]]:
    """Of `pipeline stages`, by stage, its lines."""
    parts = invoke("stages", *arguments).stdout.strip().split("\n\n")
    return {part.split()[0]: part.splitlines() for part in parts}


def test_every_stage_is_listed_with_what_it_is_its_ports_and_its_own_options() -> None:
    head, about, inputs, outputs, options = blocks()["llm"]
    assert head == "llm  stages.llm:Llm"
    assert about.strip() == CATALOG.built_in["llm"].about
    assert inputs.split(maxsplit=1) == ["inputs:", "image (optional), audio (optional), playback (feedback)"]
    assert outputs.split(maxsplit=1) == ["outputs:", "text, events"]
    assert 'kv_memory: "512MiB"' in options and "decoding: null" in options
    assert "gpus" not in options, "what all stages have is none of its own"
    described = json.loads(invoke("stages", "--json").stdout)
    assert described.keys() == CATALOG.built_in.keys() | CATALOG.installed.keys()
    assert described["vocoder"]["options"] == {"steps": None, "seed": 0, "resident": 16}
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
    file.write_text(MINIMAL + 'stages: {gate: {use: "gate:Gate", replicas: 0}, vision_encoder: {replicas: 0}}\n')
    assert blocks("-f", str(file))["gate"] == [
        "gate  gate:Gate  (does not run here)",
        "    inputs:  frames, noise (sound, side, 2 s)",
        "    outputs: moving (frames)",
        "    options: threshold: 0.5",
    ]


def test_which_stages_run_here_is_said() -> None:
    described = json.loads(invoke("stages", "--set", "stages.tts.replicas=0", "--json").stdout)
    off = {name for name, stage in described.items() if not stage["runs"]}
    assert off == {"tts", "vocoder", "speaker"} | CATALOG.installed.keys()


def test_where_the_description_has_a_mistake_the_stages_are_listed_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text("version: 1\ncameras: {}\n")
    result = invoke("stages", "--json", "-f", str(tmp_path / "pipeline.yaml"))
    assert json.loads(result.stdout)["llm"]["runs"] is None
    assert "which of them run can't be said: " in result.stderr and "not one camera" in result.stderr


def test_what_a_module_prints_while_it_is_imported_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text(
        "import os\n"
        "from stages.api import FRAMES, In, Stage\n"
        "print('hello from import')\n"
        "os.system('echo hello from a child')\n"
        "class Loud(Stage):\n"
        "    frames = In(FRAMES)\n"
        "    def process(self, units):\n"
        "        return []\n"
    )
    (tmp_path / "pipeline.yaml").write_text(MINIMAL + 'stages: {loud: {use: "loud:Loud"}}\n')
    pipeline = [Path(sys.executable).parent / "pipeline", "stages", "--json"]
    result = subprocess.run(pipeline, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(result.stdout)["loud"]["class"] == "loud:Loud"
    assert sorted(result.stderr.splitlines()) == ["hello from a child", "hello from import"]


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
