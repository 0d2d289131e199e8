"""`mtp-dist bench data`: how fast text becomes a corpus."""
