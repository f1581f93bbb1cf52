from collections.abc import Sequence

from model_shards.nano.oracle import BREAK_OFF, LISTEN, Listen, Oracle, Output, Speak, Window
from model_shards.nano.phrases import Request, Sound
from model_shards.nano.scene import Change, Scene

RED_CAME = Change("person_in", "red", "left")
DOG_CAME = Change("dog_in", place="left")
SAID_DOG = [Speak(("a", "dog", "came", "in"), False), Speak((), True)]


def window(
    index: int,
    *changes: Change,
    sounds: Sequence[Sound] = (),
    requests: Sequence[Request] = (),
    scene: Scene | None = None,
) -> Window:
    return Window(index, scene or Scene(), changes, tuple(sounds), tuple(requests))


def say(*windows: Window) -> list[Output]:
    """What is said in windows from 3 on, those before being silent."""
    oracle = Oracle()
    for index in range(3):
        oracle.step(window(index))
    return [oracle.step(one) for one in windows]


def texts(outputs: Sequence[Output]) -> list[str]:
    """Whole turns."""
    turns: list[list[str]] = [[]]
    for output in outputs:
        if isinstance(output, Speak):
            turns[-1] += output.words
            if output.end_of_turn:
                turns.append([])
    return [" ".join(turn) for turn in turns if turn]


def test_what_is_new_is_said_at_once_and_once():
    assert say(window(3, DOG_CAME), *map(window, range(4, 8))) == [*SAID_DOG, LISTEN, LISTEN, LISTEN]


def test_nothing_is_said_in_the_first_windows_nor_of_them():
    oracle = Oracle()
    outputs = [oracle.step(window(index, DOG_CAME, sounds=["bark"], requests=["how_many"])) for index in range(3)]
    assert [*outputs, oracle.step(window(3))] == [LISTEN] * 4
    oracle.step(window(4, requests=["what_heard"]))
    assert oracle.saying is not None and oracle.saying.text == "i heard a bark"


def test_what_happens_during_speech_is_said_next():
    outputs = say(window(3, DOG_CAME), window(4, RED_CAME), *map(window, range(5, 8)))
    assert texts(outputs) == ["a dog came in", "a person in red came in"]
    assert not any(isinstance(output, Listen) for output in outputs[:4])


def test_an_answer_is_said_before_remarks_but_interrupts_nothing():
    request = window(4, DOG_CAME, requests=["door_open"])
    outputs = say(window(3, RED_CAME), request, *map(window, range(5, 12)))
    assert texts(outputs) == ["a person in red came in", "no the door is closed", "a dog came in"]


def test_remarks_of_one_window_come_in_the_order_of_what_is_seen_then_what_is_heard():
    outputs = say(window(3, RED_CAME, DOG_CAME, sounds=["knock"]), *map(window, range(4, 14)))
    assert texts(outputs) == ["a person in red came in", "a dog came in", "i hear a knock"]


def test_a_standing_request_is_honoured_once():
    request = window(3, requests=["await_dog"])
    windows = [window(6, Change("cat_in", place="left")), *map(window, range(7, 9)), window(9, DOG_CAME)]
    outputs = say(
        request, window(4), window(5), *windows, *map(window, range(10, 14)), window(14, DOG_CAME), window(15)
    )
    assert texts(outputs) == ["okay i will tell you", "a cat came in", "as you asked a dog came in", "a dog came in"]


def test_stop_ends_the_turn_in_its_own_window_and_what_waits_stays():
    windows = [window(3, RED_CAME), window(4, DOG_CAME, requests=["stop"]), window(5), window(6), window(7)]
    assert say(*windows) == [Speak(("a", "person", "in", "red", "came"), False), BREAK_OFF, *SAID_DOG, LISTEN]


def test_stop_in_silence_means_nothing():
    assert say(window(3, requests=["stop"]), window(4)) == [LISTEN, LISTEN]


def test_stop_after_the_last_unit_of_a_turn_means_nothing():
    windows = [window(3, DOG_CAME), window(4), window(5, requests=["stop"]), window(6, RED_CAME)]
    assert say(*windows)[2:] == [LISTEN, Speak(("a", "person", "in", "red", "came"), False)]


def test_an_answer_tells_of_the_scene_when_it_was_asked():
    there = Scene(dog="right")
    outputs = say(
        window(3, requests=["where_dog"], scene=there), window(4, Change("dog_out")), *map(window, range(5, 9))
    )
    assert texts(outputs) == ["the dog is on the right", "the dog left"]


# --- what was really said -----------------------------------------------------------------------------------------


def follow(oracle: Oracle, index: int, *said: Output) -> list[Output]:
    """Labels of windows from `index` on, each after what was really said before."""
    return [oracle.step(window(index + turn), output) for turn, output in enumerate(said)]


def begun(change: Change) -> Oracle:
    oracle = Oracle()
    for index in range(3):
        oracle.step(window(index))
    oracle.step(window(3, change))
    return oracle


def test_what_was_not_said_yet_is_still_to_be_said():
    assert follow(begun(DOG_CAME), 4, LISTEN, SAID_DOG[0]) == SAID_DOG


def test_words_that_came_late_are_made_up_for():
    labels = follow(begun(RED_CAME), 4, Speak(("a", "person"), False), Speak(("in", "red"), False))
    assert labels == [Speak(("in", "red", "came", "in"), True), Speak(("came", "in"), True)]


def test_words_that_came_early_are_not_said_again():
    assert follow(begun(RED_CAME), 4, Speak(("a", "person", "in", "red", "came", "in"), False)) == [Speak((), True)]


def test_something_wrong_is_broken_off_and_then_said_rightly():
    labels = follow(begun(RED_CAME), 4, Speak(("a", "person", "in", "blue"), False), BREAK_OFF, LISTEN)
    assert labels == [BREAK_OFF, Speak(("a", "person", "in", "red", "came"), False)] * 1 + labels[2:]
    assert labels[2] == labels[1]


def test_speech_for_no_reason_is_broken_off_and_forgotten():
    oracle = Oracle()
    for index in range(4):
        oracle.step(window(index))
    assert follow(oracle, 4, Speak(("the", "cat"), False), BREAK_OFF) == [BREAK_OFF, LISTEN]


def test_a_stop_that_was_not_obeyed_still_holds():
    oracle = begun(RED_CAME)
    assert oracle.step(window(4, requests=["stop"])) == BREAK_OFF
    assert follow(oracle, 5, Speak(("in",), False), BREAK_OFF) == [BREAK_OFF, LISTEN]


def test_following_the_label_and_saying_nothing_of_it_are_the_same():
    following, silent = begun(RED_CAME), begun(RED_CAME)
    label: Output = Speak(("a", "person", "in", "red", "came"), False)
    for index in range(4, 9):
        label = following.step(window(index), label)
        assert silent.step(window(index)) == label
