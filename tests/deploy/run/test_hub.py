"""deploy/run/hub.py on the real library and its own cache; the hub is never reached, or one of our own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy.run.hub import ALLOWED, HubId, missing_files
from model_shards.checkpoint import inspect
from tests.support.specs import parse_spec
from tests.support.tiny import Tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OFFLINE = {"HF_HUB_OFFLINE": "1"}
UNREACHABLE = {"HF_ENDPOINT": "http://127.0.0.1:9"}
FETCH = (
    "import sys; from deploy.run.hub import HubId, fetch; "
    "print(fetch(HubId.parse(sys.argv[1]), lambda t: print('#', t)))"
)


def storage(home: Path) -> Path:
    return home / "hub" / "models--owner--name"


@pytest.fixture
def home(tiny: Tiny, tmp_path: Path) -> Path:
    """HF_HOME with the tiny checkpoint as commit COMMIT of owner/name's main branch."""
    shutil.copytree(tiny.path, storage(tmp_path) / "snapshots" / COMMIT)
    (storage(tmp_path) / "refs").mkdir()
    (storage(tmp_path) / "refs" / "main").write_text(COMMIT)
    return tmp_path


def python(home: Path, environment: dict[str, str], *arguments: str) -> tuple[int, list[str]]:
    """The library reads its environment when it is imported: a process of its own. Exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"HF_HOME": str(home), "XDG_CACHE_HOME": str(home)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("environment", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_a_pinned_commit_in_the_cache_is_taken_without_asking(home: Path, environment: dict[str, str]) -> None:
    result = python(home, environment, "-c", FETCH, f"owner/name@{COMMIT}")
    assert result == (0, [str(storage(home) / "snapshots" / COMMIT)])


@pytest.mark.parametrize(
    ("environment", "reason"), [(OFFLINE, "HF_HUB_OFFLINE is set"), (UNREACHABLE, "ConnectError: ")]
)
def test_a_branch_in_the_cache_is_taken_when_the_hub_is_away_and_that_is_told(
    home: Path, environment: dict[str, str], reason: str
) -> None:
    folder = storage(home) / "snapshots" / COMMIT
    code, (notice, printed) = python(home, environment, "-c", FETCH, "owner/name")
    assert (code, printed) == (0, str(folder))
    assert notice.startswith(f"# model owner/name@main: the hub does not give it ({reason}")
    assert notice.endswith(f"taking {folder} from the cache")


@pytest.mark.parametrize("revision", ["main", COMMIT])
@pytest.mark.parametrize("environment", [OFFLINE, UNREACHABLE], ids=["offline", "unreachable"])
def test_without_a_cache_every_file_and_its_folder_are_named(
    tmp_path: Path, environment: dict[str, str], revision: str
) -> None:
    arguments = ["-m", "deploy", "up", "--camera", "door=test://pattern", "--set", f"model=owner/name@{revision}"]
    code, lines = python(tmp_path, environment, *arguments)
    assert code == 1
    assert lines[0].startswith(f"pipeline: model owner/name@{revision}: no such folder, and the hub does not give it (")
    assert lines[0].endswith(f"); put these files into {storage(tmp_path) / 'snapshots' / revision}:")
    assert lines[1:] == [
        "pipeline: config.json",
        "pipeline: tokenizer.json (or vocab.json, merges.txt, added_tokens.json)",
        "pipeline: model.safetensors (or model.safetensors.index.json and the files it names)",
        "pipeline: assets/token2wav/flow.pt (or .safetensors)",
        "pipeline: assets/token2wav/hift.pt (or .safetensors)",
    ]


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_files_put_where_they_were_wanted_are_found(tiny: Tiny, tmp_path: Path, revision: str) -> None:
    folder = shutil.copytree(tiny.path, storage(tmp_path) / "snapshots" / revision)
    code, lines = python(tmp_path, OFFLINE, "-c", FETCH, f"owner/name@{revision}")
    assert (code, lines[-1]) == (0, str(folder))


def test_the_shards_that_an_index_names_are_wanted_by_their_names(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.path, tmp_path / "cut")
    (folder / "model.safetensors").rename(folder / "model-1-of-2.safetensors")
    names = ["model-1-of-2.safetensors", "model-2-of-2.safetensors"]
    index = {"weight_map": {"llm.model.norm.weight": names[0], "llm.lm_head.weight": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert missing_files(folder) == names[1:]


def test_a_checkpoint_that_does_not_speak_needs_no_vocoder(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny.path, tmp_path / "mute")
    shutil.rmtree(folder / "assets")
    assert len(missing_files(folder)) == 2
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"init_tts": False}))
    assert missing_files(folder) == []


def test_neither_code_nor_other_formats_are_downloaded() -> None:
    from huggingface_hub.utils import filter_repo_objects

    required = ["config.json", "model-00001-of-00004.safetensors", "assets/token2wav/flow.pt", "merges.txt"]
    others = ["modeling_minicpmo.py", "pytorch_model.bin", "assets/demo.mp4", "README.md"]
    assert list(filter_repo_objects([*required, *others], allow_patterns=list(ALLOWED))) == required


@pytest.mark.parametrize("model", ["owner/name", "owner/name@v1.0", f"openbmb/MiniCPM-o-4_5@{COMMIT}"])
def test_a_hub_id_is_a_model(model: str) -> None:
    text = f"version: 1\nmodel: {model}\ncameras: {{test: {{source: 'test://pattern'}}}}\n"
    assert parse_spec(text, "pipeline.yaml").model == model
    assert HubId.parse(model) is not None


@pytest.mark.parametrize("model", ["name", "a/b/c", "../b", "a/..", "a/b@", "a/b@../c", "a/b@x/../y", "a/b--c", "~a/b"])
def test_what_is_no_hub_id_is_none(model: str) -> None:
    assert HubId.parse(model) is None


# --- a hub of our own ---------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP as a download takes: owner/name, whose main branch is COMMIT, has a folder's files."""

    folder: Path
    paths: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.paths.append(path)
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        if path.startswith("/api/models/owner/name/revision/"):
            self.answer(json.dumps({"id": "owner/name", "sha": COMMIT}).encode())
        elif path == f"/api/models/owner/name/tree/{COMMIT}":
            names = {file.relative_to(self.folder).as_posix(): file.stat().st_size for file in files}
            rows = [{"type": "file", "path": name, "size": size, "oid": "0"} for name, size in names.items()]
            self.answer(json.dumps(rows).encode())
        elif path.startswith(f"/owner/name/resolve/{COMMIT}/"):
            self.answer((self.folder / path.removeprefix(f"/owner/name/resolve/{COMMIT}/")).read_bytes())
        else:
            self.send_error(404)

    def answer(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Tiny, tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    Hub.folder, Hub.paths = Path(shutil.copytree(tiny.path, tmp_path / "served")), []
    (Hub.folder / "modeling_minicpmo.py").write_text("raise SystemExit")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def test_a_download_is_whole_has_no_code_and_tells_its_commit(
    hub: ThreadingHTTPServer, tiny: Tiny, tmp_path: Path
) -> None:
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    folder = storage(tmp_path) / "snapshots" / COMMIT
    code, lines = python(tmp_path, environment, "-c", FETCH, "owner/name")
    notice = f"# model owner/name@main is commit {COMMIT}; pin it with owner/name@{COMMIT}"
    assert (code, lines[:2]) == (0, [notice, str(folder)])
    assert missing_files(folder) == []
    assert inspect(folder) == inspect(tiny.path)
    assert not any(str(name).endswith(".py") for name in [*folder.iterdir(), *Hub.paths])
    # Then: without a hub it is there, by its branch and by its commit.
    for revision in ("main", COMMIT):
        assert python(tmp_path, OFFLINE, "-c", FETCH, f"owner/name@{revision}")[1][-1] == str(folder)


@pytest.mark.parametrize("revision", ["main", COMMIT])
def test_a_download_that_was_cut_off_is_seen_and_its_rest_is_named(
    hub: ThreadingHTTPServer, tmp_path: Path, revision: str
) -> None:
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    folder = storage(tmp_path) / "snapshots" / COMMIT
    assert python(tmp_path, environment, "-c", FETCH, "owner/name")[0] == 0
    (folder / "tokenizer_config.json").unlink()
    code, lines = python(tmp_path, OFFLINE, "-c", FETCH, f"owner/name@{revision}")
    assert (code, lines[-1]) == (1, "tokenizer_config.json")
    assert lines[-2].endswith(f"(HF_HUB_OFFLINE is set); put these files into {folder}:")
    assert python(tmp_path, environment, "-c", FETCH, f"owner/name@{revision}")[0] == 0
    assert (folder / "tokenizer_config.json").is_file()


def test_what_the_hub_does_not_have_is_told(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_DISABLE_XET": "1"}
    code, lines = python(tmp_path, environment, "-c", FETCH, "owner/other")
    assert code == 1
    assert any(
        "HubError: model owner/other@main: no such folder, and the hub does not give it (" in line for line in lines
    )


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ALL_PROXY", "socks://127.0.0.1:1080"),
        ("HTTPS_PROXY", "http://me:Hunter2/xyzzy@127.0.0.1:99999"),
        ("HF_TOKEN", "hf_Hunter2ä"),
    ],
)
def test_a_setting_that_the_library_can_not_use_is_one_line_that_names_it(
    tmp_path: Path, variable: str, value: str
) -> None:
    code, lines = python(
        tmp_path,
        {variable: value},
        "-m",
        "deploy",
        "up",
        "--set",
        "model=owner/name@main",
        "--camera",
        "a=test://pattern",
    )
    assert code == 1
    (line,) = lines
    assert line.startswith("pipeline: model owner/name@main: the hub can't be asked (")
    assert variable in line
    assert "Hunter2" not in line


def test_with_such_a_setting_a_whole_cache_is_taken(home: Path) -> None:
    code, lines = python(home, {"ALL_PROXY": "socks://127.0.0.1:1080"}, "-c", FETCH, "owner/name@main")
    assert code == 0
    assert lines[-1].endswith(COMMIT)
    assert "taking" in lines[0]


class OutOfOrder(Hub):
    """A hub that is there and can't serve."""

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_error(503)


def test_a_hub_that_is_out_of_order_is_asked_once(tiny: Tiny, tmp_path: Path) -> None:
    """The library's own look-ups would try again for half a minute."""
    OutOfOrder.folder, OutOfOrder.paths = tiny.path, []
    with ThreadingHTTPServer(("127.0.0.1", 0), OutOfOrder) as server:
        threading.Thread(target=server.serve_forever).start()
        endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
        code, lines = python(tmp_path, endpoint, "-c", FETCH, "owner/name")
        server.shutdown()
    assert code == 1
    assert "503" in "\n".join(lines)
    assert [path for path in OutOfOrder.paths if path.startswith("/api/models/")] == [
        "/api/models/owner/name/revision/main"
    ]
