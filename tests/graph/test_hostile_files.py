"""Descriptions and profiles that are damaged or hostile: a line of our own words, never a library's exception."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph.costs import ProfileError, read_profile
from graph.errors import SpecError
from tests.support.specs import load_spec

DESCRIPTIONS = {
    "empty": b"",
    "zero bytes": b"a: \0b",
    "utf-16": b"\xff\xfev\0e\0",
    "unknown version of YAML": b"%YAML 9.9\n---\na: 1",
    "half a directive": b"%TAG ! x\n",
    "anchor in itself": b"&a [*a]",
    "key anchored in itself": b"a: &a {b: *a}",
    "number of 4400 digits": b"version: " + b"9" * 4400,
    "number of 290 digits": b"version: " + b"9" * 290,
    "float beyond float": b"version: 1e999999",
    "brackets without end": b"[" * 5000,
    "braces without end": b"{" * 5000,
    "quote without end": b'"' * 999,
    "beyond Unicode": b'a: "\\U00110000"',
    "half a character as a value": b'model: "\\ud800"',
    "half a character as a key": b'"\\ud800": 1',
    "python tag": b"version: !!python/object:os.system x",
    "duration beyond numbers": b"window: {length: " + b"9" * 400 + b"s}",
    "size beyond numbers": b"stages: {llm: {kv_memory: " + b"9" * 400 + b"GiB}}",
    "zero in a source": b'cameras: {a: {source: "x\\0y", fps: no}}',
    "list as a key": b"[a]: b",
    "digits of another script": b'window: {length: "\xd9\xa1s"}',
}


@pytest.mark.parametrize("content", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_damaged_description_is_told_in_our_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pipeline.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    for line in str(caught.value).splitlines():
        assert line.startswith(str(path))
        assert line.isprintable()
        assert len(line) < 600


def cost_of(fixed: bytes) -> bytes:
    stage = b'{"fixed_ns": %s, "each_ns": 1, "spread": 1}' % fixed
    return b'{"version": 1, "num_cores": 1, "stages": {"llm": %s}}' % stage


PROFILES = {
    "empty": b"",
    "zero bytes": b"\0",
    "list": b"[]",
    "nested without end": b"[" * 100_000,
    "not UTF-8": b"\xff",
    "number of 5000 digits": b'{"version": 1, "stages": {}, "num_cores": ' + b"9" * 5000 + b"}",
    "as many cores as nobody has": b'{"version": 1, "stages": {}, "num_cores": 1000000000}',
    "cores as a bool": b'{"version": 1, "stages": {}, "num_cores": true}',
    "machine as a list": b'{"version": 1, "stages": {}, "num_cores": 1, "machine": [1]}',
    "cost as a bool": cost_of(b"true"),
    "cost beyond float": cost_of(b"1e400"),
    "cost that is none": cost_of(b"NaN"),
}


@pytest.mark.parametrize("content", PROFILES.values(), ids=PROFILES)
def test_a_damaged_profile_is_told_in_our_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as caught:
        read_profile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 600
