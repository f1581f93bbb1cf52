import torch

from model_shards.nano.speech_sizes import NUM_CODES
from model_shards.nano.train_speech_codes import Autoencoder, codes_of, digits_of


def test_digits_and_codes_are_one_to_one():
    codes = torch.arange(NUM_CODES)
    digits = digits_of(codes)
    assert set(digits.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(codes_of(digits), codes)


def test_the_first_digit_counts_least():
    assert codes_of(torch.tensor([1.0, -1, -1, -1, -1, -1])) == 2
    assert codes_of(torch.tensor([-1.0, -1, -1, -1, -1, 1])) == 2 * 3**5


def test_a_code_is_two_frames():
    tokenizer = Autoencoder().tokenizer
    assert tokenizer.codes(torch.randn(60, 80)).shape == (30,)


def test_the_gradient_passes_the_rounding():
    model = Autoencoder()
    model.digit_rows(model.tokenizer(torch.randn(1, 20, 80))).sum().backward()
    weight = model.tokenizer.layers[0].weight
    assert weight.grad is not None and bool(weight.grad.abs().sum() > 0)


def test_the_code_table_is_what_the_digits_make():
    model = Autoencoder()
    torch.testing.assert_close(model.code_table()[17], model.digit_rows(digits_of(torch.tensor(17))))
