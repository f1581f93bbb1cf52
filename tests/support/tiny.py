"""The tiny checkpoint: made once per test run, each component loaded once."""

from functools import cache
from pathlib import Path
from typing import Any

import torch

from model_shards.checkpoint import load_ref_audio, load_shard, load_voice
from model_shards.init import init_checkpoint
from model_shards.tokenizer import Tokenizer


class Tiny:
    """An untrained checkpoint folder and what is in it. Models are shared: nobody may change them."""

    def __init__(self, path: Path) -> None:
        init_checkpoint(path, "tiny")
        torch.set_num_threads(1)
        self.path = path
        self.tokenizer = Tokenizer.load(path)
        self.model = cache(self._load)
        self.voice = load_voice(path)
        self.ref_audio = load_ref_audio(path)

    def _load(self, component: str) -> Any:
        return load_shard(self.path, component, dtype=torch.float32, device="cpu")
