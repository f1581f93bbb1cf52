"""Nano set free says what the engine samples, and learns what the oracle says after that."""

from random import Random

import pytest
import torch

from model_shards.nano.clips import load_bank
from model_shards.nano.lessons import Lesson, teach, to_tokens
from model_shards.nano.oracle import NUM_SILENT, Oracle
from model_shards.nano.rehearsal import Embedded
from model_shards.nano.school import live
from model_shards.nano.sequences import NO_TARGET, collate, prompt_ids
from model_shards.nano.sizes import EMBED_DIM
from model_shards.nano.train_llm import Behaving, judge, loss_of
from model_shards.nano.vocabulary import build_tokenizer
from model_shards.nano.world import NS_PER_S, Episode, plan_episode

TOKENIZER = build_tokenizer()
BANK = load_bank("room")


class Blank:
    """Eyes and ears that give noise: what is said after it is as good as any."""

    bank = BANK

    def embed(self, episode: Episode) -> Embedded:
        drawn = torch.Generator().manual_seed(episode.seed)
        shape = (episode.num_windows, 26, EMBED_DIM)
        both = torch.randn(shape, generator=drawn)
        return Embedded(both[:, :16], both[:, 16:])


@pytest.fixture(scope="module")
def model() -> Behaving:
    torch.manual_seed(0)
    return Behaving(len(TOKENIZER))


@pytest.fixture(scope="module")
def lessons() -> list[Lesson]:
    episodes = [plan_episode(seed, 12 * NS_PER_S, "busy", BANK.duration_ns) for seed in (1, 2)]
    return [teach(episode, Blank(), TOKENIZER) for episode in episodes]  # type: ignore[arg-type]


def lived(model: Behaving, lessons: list[Lesson]) -> list[Lesson]:
    return live(model.llm, TOKENIZER, lessons, Random(0))


def test_in_the_first_windows_nano_listens_and_is_to_listen(model: Behaving, lessons: list[Lesson]):
    for lesson in lived(model, lessons):
        assert [unit.targets() for unit in lesson.units()[:NUM_SILENT]] == NUM_SILENT * [[TOKENIZER.special.listen]]


def test_what_is_learnt_of_its_own_words_begins_as_the_oracle_would(model: Behaving, lessons: list[Lesson]):
    units, oracle = lived(model, lessons[:1])[0].units(), Oracle(max_tries=1)
    labels = [to_tokens(oracle.step(window), TOKENIZER) for window in lessons[0].windows[: NUM_SILENT + 1]]
    assert units[NUM_SILENT].targets()[0] == labels[-1][0]


def test_an_untrained_model_is_judged_and_has_nothing_right(model: Behaving, lessons: list[Lesson]):
    judged = judge(model.llm, TOKENIZER, lessons)
    assert sum(judged.hits.values()) == 0
    assert sum(judged.totals.values()) > 0


def test_a_few_steps_on_the_same_lessons_bring_the_loss_down(lessons: list[Lesson]):
    torch.manual_seed(0)
    model = Behaving(len(TOKENIZER))
    batch = collate([lesson.units() for lesson in lessons], prompt_ids(TOKENIZER), TOKENIZER, EMBED_DIM)
    assert (batch.targets != NO_TARGET).sum() == sum(len(label) for lesson in lessons for label in lesson.labels)
    hints = torch.cat([lesson.hints for lesson in lessons])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    losses = []
    for _ in range(6):
        loss, _ = loss_of(model, batch, hints, 0.5)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
