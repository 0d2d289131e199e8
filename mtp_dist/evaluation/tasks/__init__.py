"""Tasks for lm-eval that need no network: YAML files, their data, and the functions that they name."""
