"""A tokenizer with a chat template, and conversations, for the tests."""

import json
from pathlib import Path

import tokenizers

from mtp_dist.convert.tokenizer_files import byte_level_tokenizer

END, START_OF_TURN, END_OF_TURN = 256, 257, 258
"""Ids of `<|endoftext|>`, `<|im_start|>` and `<|im_end|>`; those of bytes are their values."""
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] + '<|im_end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_chat_tokenizer(
    folder: Path, template: str = CHATML, backend: tokenizers.Tokenizer | None = None, end: str = "<|endoftext|>"
) -> Path:
    """Write a tokenizer of bytes, or another one, that has a chat template."""
    backend = backend or byte_level_tokenizer()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def messages(*turns: str) -> list[dict[str, str]]:
    """Return messages of alternating roles, the user's first."""
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
