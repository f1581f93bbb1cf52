import pytest

from model_shards.errors import DependencyError
from model_shards.nano.phrases import sentences
from model_shards.nano.recogniser import Recogniser, word_error_rate, word_errors
from model_shards.nano.teacher import Teacher


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("a dog came in", "a dog came in", 0),
        ("a dog came in", "a cat came in", 1),
        ("a dog came in", "dog came in", 1),
        ("a dog came in", "a red dog came in", 1),
        ("a dog came in", "", 4),
    ],
)
def test_words_to_replace_put_in_or_leave_out_are_counted(said: str, heard: str, errors: int):
    assert word_errors(said, heard) == errors


def test_the_rate_is_of_all_words_said():
    assert word_error_rate([("a b c", "a b c"), ("d", "e")]) == 0.25


def test_the_teacher_is_understood():
    try:
        teacher, ear = Teacher(), Recogniser(sentences())
    except DependencyError as error:
        pytest.skip(str(error))
    for sentence in ("the door is open", "i see two people and a dog", "a person in yellow came in"):
        assert ear.hear(teacher.say(sentence).samples) == sentence
