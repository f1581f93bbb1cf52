"""The talker's training-time forward equals `Talker.generate`."""

import pytest
import torch
from torch import nn

from model_shards.nano.speech_pacing import SpokenTurn, SpokenUnit, on_time
from model_shards.nano.train_speech_talker import RowBatch, TurnRows, new_talker, talker_logits, talker_loss
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.tts import Talker, TalkerInput, TalkerState

TURN = SpokenTurn(("a", "dog", "came", "in"), (0, 4, 12, 27), tuple(range(40)))


@pytest.fixture(scope="module")
def talker() -> Talker:
    talker = new_talker(build_tokenizer()).eval().requires_grad_(False)
    nn.init.normal_(talker.tts.emb_text.weight, std=3.0, generator=torch.Generator().manual_seed(2))
    return talker


def generate(talker: Talker, units: list[SpokenUnit], hidden: float) -> list[list[int]]:
    state, rows = TalkerState(), TurnRows(build_tokenizer(), talker)
    spoken = []
    for unit in units:
        ids = torch.tensor(rows.token_ids(unit, unit is units[-1]))
        rows_hidden = torch.full((len(ids), talker.config.llm_dim), hidden)
        spoken += talker.generate([(state, TalkerInput(ids, rows_hidden, end_of_turn=unit is units[-1]))])
    return spoken


def test_training_sees_what_the_talker_chooses_from(talker: Talker):
    units = on_time(TURN)
    codes = generate(talker, units, hidden=1.0)
    said = [SpokenUnit(unit.words, tuple(own)) for unit, own in zip(units, codes, strict=True)]
    batch = RowBatch.of([TurnRows(build_tokenizer(), talker).of(said), TurnRows(build_tokenizer(), talker).of(units)])
    logits, targets = talker_logits(talker, batch)[0], batch.targets[0]
    spoken = (targets >= 0) & (targets < talker.eos)
    logits[:, talker.eos] = -torch.inf  # an untrained talker doesn't end
    assert int(spoken.sum()) == sum(map(len, codes))
    torch.testing.assert_close(logits.argmax(-1)[spoken], targets[spoken])


def test_hidden_states_change_nothing(talker: Talker):
    assert generate(talker, on_time(TURN), hidden=0.0) == generate(talker, on_time(TURN), hidden=5.0)


def test_rows_are_words_audio_begin_and_codes(talker: Talker):
    tokenizer = build_tokenizer()
    rows = TurnRows(tokenizer, talker).of(on_time(TURN))
    begin, end = talker.config.audio_bos_token_id, tokenizer.special.turn_eos
    first, second = tokenizer.encode(" a dog came"), tokenizer.encode(" in")
    assert rows.ids == [*first, begin, *range(25), *second, end, begin, *range(25, 40)]
    assert rows.is_code == [False] * 4 + [True] * 25 + [False] * 3 + [True] * 15


def test_nothing_is_asked_for_after_a_full_unit_and_the_end_after_the_last(talker: Talker):
    targets = TurnRows(build_tokenizer(), talker).of(on_time(TURN)).targets
    assert targets[3:29] == [*range(25), -100]
    assert targets[31:] == [*range(25, 40), talker.eos]


def test_wrong_codes_are_fed_but_not_asked_for(talker: Talker):
    batch = RowBatch.of([TurnRows(build_tokenizer(), talker).of(on_time(TURN))])
    right, _ = talker_loss(talker, batch, None)
    wrong, _ = talker_loss(talker, batch, torch.Generator().manual_seed(3))
    assert not torch.equal(right, wrong)
