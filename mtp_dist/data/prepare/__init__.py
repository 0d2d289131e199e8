"""Offline tools: `mtp-dist prepare` turns text into a corpus, `mtp-dist inspect` reports what is in one."""
