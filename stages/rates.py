"""How many samples of sound and codes of speech make a second."""

SOUND_RATE_HZ = 16_000
SPEECH_RATE_HZ = 24_000
CODES_PER_S = 25
