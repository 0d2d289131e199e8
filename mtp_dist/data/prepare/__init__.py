"""The offline tool that turns text into a corpus (`mtp-dist prepare`)."""
