"""Files that an export for transformers contains: code that runs there, without mtp_dist."""
