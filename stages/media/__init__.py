"""Cameras' media: feeds, what reads them (reader), and the decoder processes behind that (fork, process, decoder …)."""
