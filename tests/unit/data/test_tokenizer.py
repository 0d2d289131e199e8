import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_dist.config import ConfigError
from mtp_dist.data.tokenizer import build_tokenizer


@given(st.text())
def test_text_survives_a_round_trip(text: str) -> None:
    tokenizer = build_tokenizer("bytes")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_any_bytes_become_one_token_each(data: bytes) -> None:
    assert build_tokenizer("bytes").encode(data).tolist() == list(data)


def test_decoding_skips_special_tokens_and_replaces_invalid_bytes() -> None:
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.decode([256, 104, 105, 256, 0xFF, 300]) == "hi\ufffd"
    assert tokenizer.decode([]) == ""


def test_every_id_fits_the_vocabulary() -> None:
    tokenizer = build_tokenizer("bytes")
    assert tokenizer.encode(bytes(range(256))).max() < tokenizer.end_of_document < tokenizer.vocab_size


def test_unknown_tokenizer_names_the_key_and_the_known_one() -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer = 'gpt9' is not known: use 'bytes'"):
        build_tokenizer("gpt9")
