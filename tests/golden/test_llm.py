"""The language model against the official one: a prefill layer by layer, and what is fed on top of it."""

import functools
import re

import pytest
import torch
from torch import Tensor

from model_shards.checkpoint import load_shard
from model_shards.kv_cache import KvCache, KvSequence, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from tests.support import golden
from tests.support.golden import cases, close, read_json, read_tensors

FILE = "llm.safetensors"
KEYS = list(read_tensors(FILE))
PREFILLED = [key for key in KEYS if re.fullmatch(r"prefill\.(hidden\.\d+|logits|[kv]\.\d+)", key)]
DECODED = sorted({key.rpartition(".")[0] for key in KEYS if re.fullmatch(r"decode\.\d+\..+", key)})
SHIFTED = [key for key in KEYS if re.fullmatch(r"offset\d+\..+", key)]
COMPANIES = ["alone", "first of three", "last of three"]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@functools.cache
def model() -> LanguageModel:
    return load_shard(golden.FOLDER, "llm")


class Desk:
    """The official prefill in a cache of ours, with the hidden states of every layer."""

    def __init__(self) -> None:
        self.llm = model()
        self.cache = KvCache(KvShape.of(self.llm.config), num_pages=200, page_size=16)
        self.sequence = KvSequence()
        self.layers: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _args, out: self.layers.append(out))
            for layer in self.llm.llm.model.layers
        ]
        self.embeds = read_tensors(FILE)["prefill.inputs_embeds"][0]
        self.hidden = self.feed(self.embeds)
        for hook in hooks:
            hook.remove()

    def feed(self, embeds: Tensor, company: str = "alone") -> Tensor:
        """Feed the session's next rows, with other sessions of other lengths before or behind them."""
        others = [SequenceInput(KvSequence(), torch.randn(num, embeds.shape[1])) for num in (3, 41)]
        ours = SequenceInput(self.sequence, embeds)
        batch = {"alone": [ours], "first of three": [ours, *others], "last of three": [*others, ours]}[company]
        return self.llm(self.cache, batch)[batch.index(ours)]

    def prefilled(self, key: str) -> Tensor:
        """Our tensor for `prefill.KEY`. The official list of hidden states ends with the normed one."""
        what, _, layer = key.removeprefix("prefill.").partition(".")
        if what == "logits":
            return self.llm.logits(self.hidden)
        if what in ("k", "v"):
            return self.cache.read(self.sequence, int(layer))[what == "v"].transpose(0, 1)
        return [self.embeds, *self.layers[:-1], self.hidden][int(layer)]


@cases("llm.json", PREFILLED)
def test_a_prefill_gives_the_official_numbers(case: str):
    close(Desk().prefilled(case), read_tensors(FILE)[case][0])


def test_the_prefill_has_every_layer():
    desk = Desk()
    kinds = {"hidden": desk.llm.config.num_hidden_layers + 1, "k": desk.llm.config.num_hidden_layers}
    for kind, count in (kinds | {"v": kinds["k"]}).items():
        assert [f"prefill.{kind}.{layer}" in PREFILLED for layer in range(count)] == [True] * count
    assert desk.sequence.length == read_json("llm.json")["prefill"]["len"]


@pytest.mark.parametrize("company", COMPANIES)
@cases("llm.json", DECODED)
def test_a_token_on_top_gives_the_official_numbers(case: str, company: str):
    tensors, desk, step = read_tensors(FILE), Desk(), int(case.removeprefix("decode."))
    rows = desk.llm.embed(tensors["decode.ids"].flatten()[: step + 1].long())
    for row in rows:
        hidden = desk.feed(row[None], company)
    close(hidden, tensors[f"{case}.hidden_last"][0])
    close(desk.llm.logits(hidden), tensors[f"{case}.logits"].view(1, -1))


@pytest.mark.parametrize("company", COMPANIES)
@cases("llm.json", ["block"] if "block.inputs_embeds" in KEYS else [])
def test_a_block_on_top_gives_the_official_numbers(case: str, company: str):
    tensors, desk = read_tensors(FILE), Desk()
    for token in tensors["decode.ids"].flatten():  # the block was recorded after the single tokens
        desk.feed(desk.llm.embed(token[None].long()))
    hidden = desk.feed(tensors[f"{case}.inputs_embeds"][0], company)
    close(hidden, tensors[f"{case}.hidden_last"][0])
    close(desk.llm.logits(hidden), tensors[f"{case}.logits"][0])


@cases("llm.json", SHIFTED)
def test_at_other_positions_keys_are_turned_and_hidden_states_are_the_same(case: str):
    desk, (name, _, what) = Desk(), case.partition(".")
    desk.cache.move_tail(desk.sequence, 0, offset := int(name.removeprefix("offset")))
    kind, _, layer = what.partition(".")
    ours = desk.hidden if kind == "hidden_last" else desk.cache.read(desk.sequence, int(layer))[kind == "v"][offset:]
    close(ours if kind == "hidden_last" else ours.transpose(0, 1), read_tensors(FILE)[case][0])
