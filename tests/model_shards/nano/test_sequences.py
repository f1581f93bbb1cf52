"""A training sequence is what the duplex engine would have fed, and its hidden states are what the engine computes."""

from dataclasses import replace

import torch
from torch import Tensor

from model_shards.duplex import DuplexConfig, DuplexEngine, Prompt, UnitInput
from model_shards.kv_cache import KvCache, KvShape
from model_shards.llm import LanguageModel, SequenceInput
from model_shards.nano.sequences import NO_TARGET, Unit, collate, hidden_states, prompt_ids
from model_shards.nano.sizes import EMBED_DIM, llm_config
from model_shards.nano.vocabulary import build_tokenizer

TOKENIZER = build_tokenizer()
SPECIAL = TOKENIZER.special
PROMPT = prompt_ids(TOKENIZER)
CONFIG = replace(llm_config(len(TOKENIZER)), num_hidden_layers=2)


class Recording(LanguageModel):
    """A language model that keeps what it was fed."""

    def __init__(self) -> None:
        super().__init__(CONFIG)
        self.fed: list[Tensor] = []

    def forward(self, cache: KvCache, batch: list[SequenceInput]) -> list[Tensor]:  # type: ignore[override]
        self.fed += [item.embeds for item in batch]
        return super().forward(cache, batch)


def model() -> Recording:
    torch.manual_seed(0)
    return Recording().eval().requires_grad_(False)


def cache() -> KvCache:
    return KvCache.of_bytes(KvShape.of(CONFIG), 2**24, dtype=torch.float32, device="cpu")


def units(num: int, said: list[int]) -> list[Unit]:
    generator = torch.Generator().manual_seed(num)
    seen, heard = torch.randn(num, 16, EMBED_DIM, generator=generator), torch.randn(num, 10, EMBED_DIM)
    return [Unit(image, audio, said) for image, audio in zip(seen, heard, strict=True)]


def test_hidden_states_are_those_over_the_engines_cache_whatever_else_is_in_the_batch():
    llm, long, short = model(), units(3, [SPECIAL.listen]), units(1, [SPECIAL.speak, SPECIAL.chunk_eos])
    batch = collate([long, short], PROMPT, TOKENIZER, EMBED_DIM)
    embeds = batch.embeds + llm.embed(batch.ids.clamp(min=0)) * (batch.ids >= 0)[..., None]
    pool = cache()
    session = DuplexEngine(llm, pool, TOKENIZER, DuplexConfig()).new_session(0)
    (expected,) = llm(pool, [SequenceInput(session.sequence, embeds[0])])
    assert torch.allclose(hidden_states(llm, batch)[0][0], expected, atol=1e-4)


def test_the_engine_feeds_a_listening_session_the_same_sequence():
    llm, session_units = model(), units(3, [SPECIAL.listen])
    engine = DuplexEngine(llm, cache(), TOKENIZER, DuplexConfig(force_listen_count=3))
    session = engine.new_session(0)
    engine.begin([(session, Prompt(PROMPT))])
    for unit in session_units:
        assert unit.image is not None
        engine.step([(session, UnitInput([[unit.image]], unit.audio))])
    engine.finalize([session])
    batch = collate([session_units], PROMPT, TOKENIZER, EMBED_DIM)
    embeds = batch.embeds + llm.embed(batch.ids.clamp(min=0)) * (batch.ids >= 0)[..., None]
    assert torch.equal(torch.cat(llm.fed), embeds[0])


def test_targets_are_the_sampled_tokens_and_each_unit_is_decided_at_its_last_sound():
    dog = TOKENIZER.id_of("Ġdog")
    batch = collate([units(2, [SPECIAL.speak, dog, SPECIAL.chunk_eos])], PROMPT, TOKENIZER, EMBED_DIM)
    learnt = [int(t) for t in batch.targets[0] if t != NO_TARGET]
    assert learnt == 2 * [SPECIAL.speak, dog, SPECIAL.chunk_eos]
    for row, place in batch.decisions.tolist():
        assert batch.ids[row, place] == -1 and batch.ids[row, place + 1] == SPECIAL.speak
        assert batch.targets[row, place] == SPECIAL.speak


def test_what_should_have_been_said_is_learnt_up_to_the_first_token_that_differs():
    listen, speak, end = SPECIAL.listen, SPECIAL.speak, SPECIAL.chunk_eos
    assert Unit(None, None, [speak, 1, 2, end], expected=[speak, 1, 3, 4, end]).targets() == [speak, 1, 3, NO_TARGET]
    assert Unit(None, None, [listen], expected=[speak, 1, end]).targets() == [speak]
    assert Unit(None, None, [speak, 1, end], expected=[listen]).targets() == [listen, NO_TARGET, NO_TARGET]
