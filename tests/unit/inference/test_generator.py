"""From prompts to texts: tokens, ends, and arguments that make no sense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.tokenizer import ByteTokenizer, Tokenizer
from mtp_dist.errors import UserError
from mtp_dist.inference.detokenizer import Detokenizer
from mtp_dist.inference.generator import Generator
from mtp_dist.inference.speculation import Speculation
from mtp_dist.inference.stop_strings import StopStrings
from mtp_dist.inference.tree import DraftTree
from tests.unit.convert.folders import TEXT, byte_pairs, train_sentencepiece, write_model

END = 256
POSITIONS = 64


def write_and_open(folder: Path, **sections: dict[str, Any]) -> Generator:
    write_model(folder, train={"sequence_length": POSITIONS}, **sections)
    return Generator.open(folder)


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    return write_and_open(tmp_path_factory.mktemp("model") / "c")


def test_prompt_begins_a_document(tmp_path: Path, generator: Generator) -> None:
    """The end of the document before it is seen as in training. A prompt without text is the beginning of one."""
    assert generator.prompt_ids("é\udcff") == [END, 0xC3, 0xA9, 0xFF], "raw bytes of an argument"
    assert generator.prompt_ids("") == [END]
    masked = write_and_open(tmp_path / "c", data={"attention_across_documents": False})
    assert masked.prompt_ids("ab") == [97, 98] and masked.prompt_ids("") == [END]
    pairs = write_and_open(tmp_path / "p", vocab_size=300, data={"tokenizer": str(byte_pairs(tmp_path / "t"))})
    for text, problem in (("\udcff", "invalid UTF-8 at byte 0"), ("\ud800", "surrogates not allowed")):
        with pytest.raises(UserError, match=f"^--prompt cannot be encoded: .*{problem}"):
            pairs.prompt_ids(text)


def test_batch_has_the_texts_of_its_prompts(generator: Generator, caplog: pytest.LogCaptureFixture) -> None:
    prompts = [generator.prompt_ids(prompt) for prompt in ("", "def f(x):", "x")]
    alone = [generator.generate([prompt], 20, speculation=Speculation(heads=4))[0] for prompt in prompts]
    assert [len(text) for text in alone] == [20, 20, 20] and len({*map(tuple, alone)}) == 3
    assert generator.generate(prompts, 20) == alone
    end = alone[1][8]
    texts = generator.generate(prompts, 20, eos_token_id=[END, end])
    assert texts[1] == alone[1][: alone[1].index(end) + 1], "options are those of transformers"
    assert not caplog.records
    assert len(generator.generate(prompts, POSITIONS)[1]) == POSITIONS - len(prompts[1])
    assert "The texts end after 54 new tokens: the model was trained on texts of 64" in caplog.text


def test_texts_with_dynamic_scaling_end_at_the_original_length(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Up to there the text is the one without a cache."""
    folder, dynamic = tmp_path / "c", {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 24}
    reference = write_model(folder, train={"sequence_length": POSITIONS}, model={"rope_scaling": dynamic})
    generator, prompt = Generator.open(folder), [END, 1, 2]
    text = generator.generate([prompt], POSITIONS, speculation=Speculation(heads=4))[0]
    limit = "model.rope_scaling.rope_type = 'dynamic' limits texts to "
    limit += "model.rope_scaling.original_max_position_embeddings = 24"
    assert generator.positions == 24 and f"The texts end after 21 new tokens: {limit}" in caplog.text
    with torch.no_grad():
        logits = reference.next_token_logits(torch.tensor([prompt + text[:-1]]))
    assert logits[0, len(prompt) - 1 :].argmax(-1).tolist() == text and len(text) == 21
    with pytest.raises(UserError) as error:
        generator.generate([[1] * 24], 4)
    assert str(error.value) == f"--prompt has 24 tokens, but {limit}: shorten it"
    ids = torch.tensor([prompt])
    for tree, tokens in ((None, 22), (DraftTree((-1, 0, 1), (0, 0, 0)), 21)):
        with pytest.raises(UserError, match=rf"^{limit}, but 25 positions are asked for: shorten the prompt or max_"):
            generator.model.generate(ids, max_new_tokens=tokens, speculation=Speculation(tree=tree))


def test_texts_end_at_stop_strings(generator: Generator) -> None:
    """With the token that completes one, in each row of a batch; one in the prompt does not count."""
    criterion = StopStrings(ByteTokenizer(), ["ab", "\n\n"], prompt_columns=2)
    rows = torch.tensor([[*b"ab", *text] for text in (b"xxx", b"xab", b"\n\n\n", b"baa")])
    assert criterion(rows, None).tolist() == [False, True, True, False]
    prompt = generator.prompt_ids("x")
    whole = generator.generate([prompt, prompt], 20)
    byte = next(token for token in reversed(whole[0]) if token < 128)
    expected = whole[0][: whole[0].index(byte) + 1]
    assert generator.generate([prompt, prompt], 20, stop_strings=[chr(byte)]) == [expected, expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"speculation": Speculation(heads=5)}, "--speculative = 5, but the model has 4 heads: use 1 for plain decod"),
        ({"speculation": Speculation(heads=0)}, "--speculative = 0 is below 1: use 1 for plain decoding"),
        (
            {"prompts": [[1] * POSITIONS]},
            "--prompt has 64 tokens, but the model was trained on texts of 64: shorten it",
        ),
        ({"prompts": [[1], []]}, "--prompt has no tokens: begin it with the end of a document"),
        ({"max_new_tokens": 0}, "--max-new-tokens = 0 is below 1"),
        ({"temperature": -0.5}, "--temperature = -0.5: use 0 for the most probable tokens"),
        ({"temperature": 1e-30}, "--temperature = 1e-30: "),
        ({"temperature": float("nan")}, "--temperature = nan: "),
        ({"temperature": float("inf")}, "--temperature = inf: "),
    ],
)
def test_invalid_arguments(generator: Generator, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        generator.generate(**{"prompts": [[1]], "max_new_tokens": 4, **arguments})
    assert str(error.value).startswith(message)


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """Return the pieces of a text whose tokens come in groups of these sizes, over and over."""
    detokenizer, found, place, number = Detokenizer(tokenizer, prompt), [], 0, 0
    while place < len(tokens):
        found.append(detokenizer.add(tokens[place : place + sizes[number % len(sizes)]]))
        place, number = place + sizes[number % len(sizes)], number + 1
    return [*found, detokenizer.end()]


sizes_of_groups = st.lists(st.integers(1, 5), min_size=1, max_size=5)


@given(text=st.text(max_size=30), sizes=sizes_of_groups)
@example(text="é東😀", sizes=[1])
def test_pieces_are_whole_characters(text: str, sizes: list[int]) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text.replace("\ufffd", "")).tolist()
    found = pieces(tokenizer, [END, 0xA9], [*ids, END], sizes)
    assert "".join(found) == text.replace("\ufffd", "") and not any("\ufffd" in piece for piece in found)


@given(content=st.binary(max_size=30), sizes=sizes_of_groups)
@example(content=b"a\xe2\x82", sizes=[1])
def test_no_byte_is_lost(content: bytes, sizes: list[int]) -> None:
    assert "".join(pieces(ByteTokenizer(), [97], list(content), sizes)) == content.decode(errors="replace")


@pytest.fixture(scope="module", params=[byte_pairs, train_sentencepiece])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(str(request.param(tmp_path_factory.mktemp("tokenizer"))))


@given(cut=st.integers(1, 20), sizes=sizes_of_groups)
def test_spaces_between_pieces(tokenizer: Tokenizer, cut: int, sizes: list[int]) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    prompt, tokens = ids[:cut], ids[cut:]
    expected = tokenizer.decode(ids).removeprefix(tokenizer.decode(prompt))
    assert "".join(pieces(tokenizer, prompt, [*tokens, tokenizer.end_of_document], sizes)) == expected
