"""stages/llm.py: what is fed in which order, and what TAIL and the listener let be said."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from graph.chunk import NS_PER_S, Chunk, SessionId
from graph.ladder import STEPS, holds_window
from graph.window import Unit, WindowJoin
from model_shards.duplex import MAX_TEXT_TOKENS
from stages.audio_encoder import VOICE_ROLE
from stages.llm import Llm, LlmOptions
from stages.session import Session
from stages.stage import Site, StageError
from tests.support.batching import assert_batches, open_all
from tests.support.streams import EVENTS, IMAGE, TEXT, inputs
from tests.support.tiny import MAX_UNIT, Tiny, session_tokens
from tests.support.units import DOOR, ack, audio, image, session, unit

DIM = 128


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (*shape, DIM)).astype(np.float32)


def window(name: str, index: int, pictures: int = 1, sound: bool = True) -> Unit:
    seed = sum(map(ord, name)) * 1000 + index
    seen = [image(name, index * NS_PER_S + k, rows(seed + 500 + k, 1, 64)) for k in range(pictures)]
    heard = [audio(name, index, rows(seed, 10))] if sound else []
    return unit(name, index, *seen, *heard)


def words(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if chunk.stream == TEXT]


class Recorder:
    """The tiny model, noting what is fed: embeddings [n, dim], in order."""

    def __init__(self, tiny: Tiny) -> None:
        self._model: Any = tiny.model("llm")
        self.config = self._model.config
        self.fed: list[torch.Tensor] = []

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self._model.embed(ids)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)

    def __call__(self, cache: Any, batch: Sequence[Any]) -> Any:
        self.fed += [item.embeds for item in batch]
        return self._model(cache, batch)

    def names(self, index: int, known: dict[str, torch.Tensor]) -> list[str]:
        """What was fed in forward `index`, row by row; rows in succession with one name are told once."""
        distinct: list[str] = []
        for row in self.fed[index]:
            name = next((name for name, rows in known.items() if (rows == row).all(-1).any()), "?")
            distinct += [name] if distinct[-1:] != [name] else []
        return distinct


def test_sessions_decide_the_same_alone_and_in_any_batch(tiny: Tiny):
    work = {name: [window(name, k, pictures=k % 2) for k in range(12)] for name in ("a", "b", "c")}
    said = assert_batches(tiny.llm, work, speech=False)
    assert all(len(words(said[name])) > 2 for name in work)


def test_captured_steps_say_what_the_model_says(tiny: Tiny):
    work = {name: [window(name, k, pictures=0) for k in range(5)] for name in ("a", "b")}
    plain = assert_batches(tiny.llm, work, speech=False)
    stage = tiny.llm(captured=2)
    said = assert_batches(lambda: tiny.llm(captured=2), work, speech=False)
    assert stage.runs_with == "cpu float32, sdpa attention, decode steps as graphs"
    assert {name: [c.attrs["text"] for c in words(chunks)] for name, chunks in said.items()} == {
        name: [c.attrs["text"] for c in words(chunks)] for name, chunks in plain.items()
    }


def test_drawn_words_are_the_same_alone_and_in_any_batch(tiny: Tiny):
    work = {name: [window(name, k, pictures=k % 2) for k in range(8)] for name in ("a", "b", "c")}
    assert_batches(lambda: tiny.llm("sampling", seed=3), work, speech=False)


def test_what_is_drawn_depends_on_the_seed_and_the_name(tiny: Tiny):
    def said(name: str, seed: int) -> list[str]:
        stage = tiny.llm("sampling", seed=seed)
        open_all(stage, [name], speech=False)
        sound = [unit(name, k, audio(name, k, rows(k, 10))) for k in range(6)]
        return [str(chunk.attrs["text"]) for one in sound for chunk in words(stage.process([one]))]

    assert said("a", 1) == said("a", 1)
    assert len({tuple(said(name, seed)) for name, seed in (("a", 1), ("a", 2), ("b", 1))}) == 3


def test_a_window_is_fed_in_omni_flow_order(tiny: Tiny):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder, max_unit=300)
    stage.open_session(session())
    first, second, sound = rows(1, 1, 64), rows(2, 2, 64), rows(3, 10)
    chunks = [audio("door", 0, sound), image("door", 0, first), image("door", 5, second)]
    stage.process([unit("door", 0, *chunks)])
    special = tiny.tokenizer.special
    ids = {"<unit>": special.unit, "<image>": special.image, "</image>": special.image_end}
    ids |= {"<slice>": special.slice, "</slice>": special.slice_end}
    known = {name: recorder.embed(torch.tensor([token])) for name, token in ids.items()}
    known |= {"first": torch.from_numpy(first[0]), "sound": torch.from_numpy(sound)}
    known |= {f"second {k}": torch.from_numpy(second[k]) for k in range(2)}
    assert recorder.names(1, known) == [
        "<unit>",
        *("<image>", "first", "</image>"),
        *("<image>", "second 0", "</image>", "<slice>", "second 1", "</slice>"),
        "sound",
    ]


def test_the_pictures_of_several_views_are_fed_in_the_order_of_time_and_view(tiny: Tiny):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder, max_unit=400)
    stage.open_session(session())
    seen = {f"{view} {at}": rows(number, 1, 64) for number, (view, at) in enumerate(product(("back", "front"), (0, 5)))}
    # Given: one stream, as the encoder makes it of all views, in another order.
    join = WindowJoin(DOOR, inputs(IMAGE), window_ns=NS_PER_S, lateness_ns=None)
    for seq, name in enumerate(("front 0", "front 5", "back 5", "back 0")):
        view, _, at = name.partition(" ")
        join.add(replace(image("door", int(at), seen[name]), seq=seq, view=view))
    stage.process([*join.advance(IMAGE, NS_PER_S).units])
    known = {name: torch.from_numpy(embeds[0]) for name, embeds in seen.items()}
    fed = [name for name in recorder.names(1, known) if name != "?"]
    assert fed == ["back 0", "front 0", "back 5", "front 5"]


def test_the_voice_goes_into_the_system_prompt_and_is_not_heard(tiny: Tiny):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder)
    stage.open_session(session())
    voice, sound = rows(1, 7), rows(2, 10)
    stage.process([unit("door", 0, audio("door", 0, voice, role=VOICE_ROLE), audio("door", 0, sound))])
    special = tiny.tokenizer.special
    prompt = {"voice": torch.from_numpy(voice), "sound": torch.from_numpy(sound)}
    marks = {"<|im_start|>": special.im_start, "<|audio_start|>": special.audio_start}
    marks |= {"<|audio_end|>": special.audio_end, "<|im_end|>": special.im_end, "<unit>": special.unit}
    prompt |= {name: recorder.embed(torch.tensor([token])) for name, token in marks.items()}
    fed = recorder.names(0, prompt)
    assert (fed[0], fed[-4:]) == ("<|im_start|>", ["<|audio_start|>", "voice", "<|audio_end|>", "<|im_end|>"])
    assert recorder.names(1, prompt) == ["<unit>", "sound"]


def speaking(tiny: Tiny) -> tuple[Llm, int]:
    """A stage whose session `door` is inside a turn, and its next window."""
    stage = tiny.llm()
    stage.open_session(session(speech=False))
    for index in range(100):
        said = words(stage.process([window("door", index)]))
        if said and not said[-1].attrs["end_of_turn"]:
            return stage, index + 1
    raise AssertionError("the tiny model speaks within 100 windows")


def test_a_barge_in_closes_the_turn_with_the_next_window(tiny: Tiny):
    stage, index = speaking(tiny)
    stage.interrupt(DOOR, ack(index))
    assert stage.process([window("door", index)]) == []
    later = [chunk for k in range(1, 30) for chunk in stage.process([window("door", index + k)])]
    assert words(later)[0].attrs["turn_start"]


def test_without_a_barge_in_the_turn_goes_on(tiny: Tiny):
    stage, index = speaking(tiny)
    assert not words(stage.process([window("door", index)]))[0].attrs["turn_start"]


def test_outside_a_turn_a_budget_of_nothing_listens(tiny: Tiny):
    # Given: a listener of whom nothing was heard for more than 5 s.
    stage = tiny.llm()
    stage.open_session(session())
    said = [chunk for index in range(6, 30) for chunk in stage.process([window("door", index)])]
    assert (said, stage.text_budget(DOOR)) == ([], 0)


def in_a_turn(tiny: Tiny) -> tuple[Llm, Session, int]:
    """A stage whose session `door` is inside a turn, its listener who has heard all else, and its next window."""
    stage = tiny.llm()
    opened = session()
    stage.open_session(opened)
    index = 0
    while not (said := words(stage.process([window("door", index)]))) or said[-1].attrs["end_of_turn"]:
        index += 1
        opened.playback.ack(ack(index + 1, 100, 100, index + 1, num_turns=100))
    return stage, opened, index + 1


def test_a_turn_that_the_end_of_its_session_cuts_off_is_ended(tiny: Tiny):
    stage, _, index = in_a_turn(tiny)
    (end,) = stage.drain(DOOR)
    assert (end.stream, end.start_ns, end.duration_ns) == (TEXT, index * NS_PER_S, NS_PER_S)
    assert {name: array.shape for name, array in end.arrays.items()} == {"token_ids": (0,), "hidden": (0, DIM)}
    assert dict(end.attrs) == {"text": "", "turn_start": False, "end_of_turn": True}


def test_outside_a_turn_and_after_a_barge_in_there_is_nothing_to_end(tiny: Tiny):
    silent = tiny.llm()
    silent.open_session(session())
    assert silent.drain(DOOR) == []
    stage, _, index = in_a_turn(tiny)
    stage.interrupt(DOOR, ack(index))
    assert stage.drain(DOOR) == []


def test_inside_a_turn_a_budget_of_nothing_says_that_the_speech_goes_on(tiny: Tiny):
    stage, opened, index = in_a_turn(tiny)
    # When: nothing of it has been heard.
    opened.playback.ack(ack(index + 1, 100, 102, index + 1, num_turns=100))
    (goes_on,) = words(stage.process([window("door", index)]))
    assert stage.text_budget(DOOR) == 0
    assert (goes_on.arrays["token_ids"].tolist(), goes_on.attrs["text"]) == ([], "")
    assert not goes_on.attrs["end_of_turn"]


def test_no_more_is_said_than_the_budget_allows(tiny: Tiny):
    stage = tiny.llm()
    opened = session(lead_ns=NS_PER_S // 10)
    stage.open_session(opened)
    counts = []
    for index in range(40):
        opened.playback.ack(ack(index + 0.5, through_s=index))
        said = words(stage.process([window("door", index)]))
        counts += [(len(chunk.arrays["token_ids"]), stage.text_budget(DOOR)) for chunk in said]
    assert any(count for count, _ in counts)
    assert all(count <= budget <= 4 for count, budget in counts)  # 1.1 s at 0.27 s per token


def test_where_nothing_speaks_nobody_is_waited_for(tiny: Tiny):
    stage = tiny.llm()
    stage.open_session(session(speech=False))
    stage.process([window("door", 50)])
    assert stage.text_budget(DOOR) == MAX_TEXT_TOKENS


@pytest.mark.parametrize("num_steps", [2, 3])
def test_merged_windows_are_decided_upon_together(tiny: Tiny, num_steps: int):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder)
    opened = session(ladder=STEPS)
    stage.open_session(opened)
    opened.level.update(0, num_steps)
    indices = range(10, 19)  # nobody is heard of, and nothing is said
    forwards = []
    for index in indices:
        before = len(recorder.fed)
        assert stage.process([window("door", index, pictures=0)]) == []
        forwards.append(len(recorder.fed) - before)
    taken = STEPS[:num_steps]
    waits = [holds_window(taken, DOOR, index, num_held=0, overdue=False) for index in indices]
    assert [count == 0 for count in forwards[1:]] == waits[1:]  # with the first one comes the system prompt
    sounds = {index: rows(sum(map(ord, "door")) * 1000 + index, 10) for index in indices}
    known = {str(index): torch.from_numpy(sound) for index, sound in sounds.items()}
    fed = [name for index in range(len(recorder.fed)) for name in recorder.names(index, known) if name != "?"]
    assert fed == [str(index) for index in indices[: len(indices) - waits[-1]]]


def test_windows_that_come_too_late_go_with_the_next_one_that_does_not(tiny: Tiny):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder)
    stage.open_session(session())
    stage.process([window("door", 10, pictures=0)])
    before = len(recorder.fed)
    for index in (11, 12):
        assert stage.process([replace(window("door", index, pictures=0), overdue=True)]) == []
    assert len(recorder.fed) == before
    stage.process([window("door", 13, pictures=0)])
    sounds = {str(index): rows(sum(map(ord, "door")) * 1000 + index, 10) for index in (11, 12, 13)}
    known = {name: torch.from_numpy(sound) for name, sound in sounds.items()}
    assert [name for name in recorder.names(before, known) if name != "?"] == ["11", "12", "13"]


@pytest.mark.parametrize(("speech", "num_held"), [(True, 4), (False, 0)])
def test_of_windows_that_all_come_too_late_some_are_decided_on(tiny: Tiny, speech: bool, num_held: int):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder)
    stage.open_session(session(speech=speech))
    stage.process([window("door", 10, pictures=0)])
    waited = []
    for index in range(11, 11 + 2 * (num_held + 1)):
        before = len(recorder.fed)
        stage.process([replace(window("door", index, pictures=0), overdue=True)])
        waited.append(len(recorder.fed) == before)
    assert waited == ([True] * num_held + [False]) * 2


def test_listening_only_begins_no_turn_and_ends_the_one_that_is_open(tiny: Tiny):
    stage = tiny.llm()
    opened = session(ladder=STEPS)
    stage.open_session(opened)
    index = 0
    while not (said := words(stage.process([window("door", index)]))) or said[-1].attrs["end_of_turn"]:
        index += 1
        opened.playback.ack(ack(index + 1, 100, 100, index + 1, num_turns=100))
    opened.level.update(0, len(STEPS))
    said = []
    for later in range(index + 1, index + 60):
        opened.playback.ack(ack(later + 1, 100, 100, later + 1, num_turns=100))
        said += words(stage.process([window("door", later)]))
    assert [chunk.attrs["turn_start"] for chunk in said] == [False] * len(said)
    assert [chunk.attrs["end_of_turn"] for chunk in said] == [False] * (len(said) - 1) + [True]


def test_a_session_for_which_there_is_no_room_is_refused_when_it_opens(tiny: Tiny):
    stage = tiny.llm(num_sessions=2)
    open_all(stage, ["a", "b"])
    with pytest.raises(StageError, match=r"no room for session 'c'.*2 sessions are open.*kv_memory"):
        stage.open_session(session("c"))
    stage.close_session(SessionId("a"))
    stage.open_session(session("c"))


def test_pages_that_sessions_have_in_common_leave_room_for_another_one(tiny: Tiny):
    """Of 23 pages each, two are the prompt's: of 13 sessions, 12 save them."""
    stage = tiny.llm(num_sessions=13, system_prompt="See. " * 13)
    names = [f"s{number}" for number in range(13)]
    open_all(stage, names)
    with pytest.raises(StageError, match="no room for session 'more'"):
        stage.open_session(session("more"))
    stage.process([window(name, 0) for name in names])
    stage.open_session(session("more"))
    stage.process([window("more", 0)])
    for name in (*names, "more"):
        stage.close_session(SessionId(name))
    assert stage.kv_usage() == 0


def test_closing_gives_all_pages_back(tiny: Tiny):
    stage = tiny.llm()
    open_all(stage, ["a", "b"])
    for index in range(3):
        stage.process([window("a", index), window("b", index)])
    assert stage.kv_usage() > 0
    for name in ("a", "b", "a"):
        stage.close_session(SessionId(name))
    assert stage.kv_usage() == 0


def test_a_long_session_stays_in_its_bounds(tiny: Tiny):
    stage = tiny.llm(num_sessions=2)
    open_all(stage, ["a", "b"], speech=False)
    pages = -(-session_tokens(MAX_UNIT) // 32)
    usage = []
    for index in range(150):  # of each, half with a picture
        stage.process([window("a", index, pictures=0), window("b", index, pictures=1)])
        usage.append(stage.kv_usage() * 2 * pages)
    assert max(usage) <= 2 * pages
    assert max(usage[100:]) <= max(usage[:100])


def test_a_window_with_nothing_in_it_is_a_unit_like_any_other(tiny: Tiny):
    stage = tiny.llm()
    stage.open_session(session(speech=False))
    assert words(stage.process([window("door", 0, pictures=0, sound=False)])) == []


@pytest.mark.parametrize("needs_pictures", [False, True])
def test_a_model_that_needs_pictures_is_shown_the_last_one_again(tiny: Tiny, needs_pictures: bool):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder, needs_pictures=needs_pictures)
    stage.open_session(session(speech=False))
    last = torch.from_numpy(window("door", 1, pictures=2).chunks.get("image", ())[-1].arrays["embeds"][0])
    shown = []
    for index, pictures in enumerate((0, 2, 0, 0)):
        recorder.fed.clear()
        stage.process([window("door", index, pictures)])
        shown.append(any((rows == last[0]).all(-1).any() for rows in recorder.fed))
    assert shown == [False, True, needs_pictures, needs_pictures]


def test_pictures_for_which_a_unit_has_no_room_are_skipped_and_told(tiny: Tiny):
    recorder = Recorder(tiny)
    stage = tiny.llm(model=recorder)
    stage.open_session(session())
    events = [chunk for chunk in stage.process([window("door", 3, pictures=5)]) if chunk.stream == EVENTS]
    assert [dict(chunk.attrs) for chunk in events] == [{"type": "pictures_skipped", "window": 3, "num_pictures": 3}]
    assert len(recorder.fed[1]) == 1 + 2 * 66 + 10
    newest = torch.from_numpy(window("door", 3, pictures=5).chunks.get("image", ())[-1].arrays["embeds"][0])
    assert torch.equal(recorder.fed[1][-75:-11], newest)  # before its mark and the sound


def test_a_system_prompt_that_leaves_no_room_is_refused_before_any_session_opens(tiny: Tiny):
    with pytest.raises(StageError, match=r"leaves no room for windows below stages\.llm\.context\.low \(400\)"):
        tiny.llm(system_prompt="See. " * 100)


def test_it_says_what_it_computes_with(tiny: Tiny):
    site = Site("llm", tiny.path)
    assert Llm.load(LlmOptions(), site).runs_with == "cpu float32, sdpa attention"
    small = Llm.load(LlmOptions(kv_dtype="fp8", dtype="bfloat16"), site)
    assert small.runs_with == "cpu bfloat16, sdpa attention, keys and values in fp8"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"attention": "varlen"}, "varlen runs on a GPU, not on cpu; here there is sdpa"),
        (
            {"attention": "flash", "kv_dtype": "fp8"},
            "flash reads keys and values of its queries' type alone, not float8",
        ),
    ],
)
def test_an_attention_that_can_t_run_here_is_refused_with_the_reason(options: dict[str, Any], why: str, tiny: Tiny):
    with pytest.raises(StageError, match=f"llm: stages.llm.attention: {why}"):
        Llm.load(LlmOptions(**options), Site("llm", tiny.path))


@pytest.mark.parametrize("options", [{}, {"kv_dtype": "fp8"}, {"kv_dtype": "fp8", "dtype": "bfloat16"}])
def test_as_it_is_loaded_it_says_something(options: dict[str, Any], tiny: Tiny):
    stage = Llm.load(LlmOptions(decoding="greedy", force_listen=0, **options), Site("llm", tiny.path))
    stage.open_session(session(speech=False))
    assert words([chunk for index in range(12) for chunk in stage.process([window("door", index)])])


def test_a_session_takes_half_the_memory_in_fp8(tiny: Tiny):
    site, pages = Site("llm", tiny.path), []
    for kv_dtype in ("auto", "fp8"):
        options = LlmOptions.model_validate({"kv_dtype": kv_dtype, "dtype": "bfloat16", "kv_memory": "64MiB"})
        pages.append(Llm.load(options, site)._cache.num_pages)
    assert pages[1] == 2 * pages[0]
