from model_shards.nano.phrases import OKAY, sentences
from model_shards.nano.timing import UNIT_MS, num_units, timings, words_by_unit


def test_every_sentence_has_been_measured_and_no_other():
    assert set(timings()) == set(sentences())


def test_every_word_is_given_out_once_and_in_order():
    for sentence in sentences():
        assert [word for words in words_by_unit(sentence) for word in words] == sentence.split()


def test_only_the_last_unit_may_have_no_words():
    assert all(words for sentence in sentences() for words in words_by_unit(sentence)[:-1])


def test_a_turn_ends_in_the_second_in_which_its_speech_ends():
    assert words_by_unit(OKAY) == (("okay", "i", "will", "tell"), ("you",))
    assert UNIT_MS < timings()[OKAY].end_ms <= 2 * UNIT_MS
    assert max(map(num_units, sentences())) == 4
