"""Conversations: which tokens a chat template makes of them, and which of these are targets."""

import gzip
import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mtp_dist.config import HeadsConfig
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.chat_template import read_chat_template
from mtp_dist.data.corpus import open_corpus
from mtp_dist.data.dataloader import Batches
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.prepare.inspection import PROMPT, inspect_corpus
from mtp_dist.distributed.topology import Topology
from mtp_dist.errors import ConfigError, DataError
from mtp_dist.model.targets import IGNORE_INDEX
from tests.chat import CHATML, END, END_OF_TURN, START_OF_TURN, messages, write_chat_tokenizer
from tests.unit.data.conftest import SENTENCES, train_byte_pairs
from tests.unit.data.preparing import data_config, error_of, made, request

MARKED_CHATML = CHATML.replace(
    "{{ message['content'] + '<|im_end|>' }}",
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}",
)
"""The same text; transformers itself returns which tokens are the assistant's."""
DROPS_REASONING = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last else message['content'].split('</think>')[-1]) +"
)
WRITES_BOS = "{{ bos_token }}" + CHATML
ENDS_ALL_TURNS = CHATML.replace("<|im_end|>", "<|endoftext|>")

RECORDS = [
    {
        "id": i,
        "chat": [{"role": "system", "content": "é"}] * (i % 2) + messages(*(f"{i} é{j}" for j in range(2 + i % 3))),
    }
    for i in range(24)
]
"""Some end with the user's message."""
FIELD = {"messages_field": "chat"}


def read(text, role="user"):
    """Return the tokens of a turn that are read only."""
    return [START_OF_TURN, *f"{role}\n{text}".encode(), END_OF_TURN, ord("\n")]


def stream_of(records):
    """Return all tokens, those that are not learned as complements."""
    stream = []
    for record in records:
        chat = record["chat"]
        last = max(number for number, message in enumerate(chat) if message["role"] == "assistant")
        for number, message in enumerate(chat[: last + 1]):
            if message["role"] == "assistant":
                stream += [~token for token in (START_OF_TURN, *b"assistant\n")]
                stream += [*message["content"].encode(), END_OF_TURN, *([~ord("\n")] if number < last else [END])]
            else:
                stream += [~token for token in read(message["content"], message["role"])]
    return stream


STREAM = stream_of(RECORDS)
JSON_LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return write_chat_tokenizer(tmp_path_factory.mktemp("chat"))


def write_lines(path, chats):
    path.write_text("".join(json.dumps({"chat": chat}) + "\n" for chat in chats))
    return path


def test_targets_of_each_head_are_the_assistants(tokenizer, tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [messages("a", "bc", "d", "e")] * 2)
    first = [*read("a"), START_OF_TURN, *b"assistant\n", *b"bc", END_OF_TURN, ord("\n")]
    tokens = [*first, *read("d"), START_OF_TURN, *b"assistant\n", *b"e", END_OF_TURN, END]
    learned = [20, 21, 22, 44, 45, 46]
    assert [tokens[index] for index in learned] == [*b"bc", END_OF_TURN, *b"e", END_OF_TURN, END] and len(tokens) == 47
    sizes = {"sequence_length": len(tokens), "global_batch_size": 1}
    config = data_config(lines, data=FIELD | {"tokenizer": str(tokenizer)}, heads=3, **sizes)
    batches = Batches(config, Topology(1, 1, 1, 0, 0, 0, torch.device("cpu")), load_datasets(config))
    [part] = batches.next_train_batch().micro_batches
    batches.close()
    assert part.samples[0].tolist() == tokens + tokens[:3]
    for head in (1, 2, 3):
        expected = {index - head: tokens[index] for index in learned}
        found = part.targets[head - 1, 0].tolist()
        assert {t: token for t, token in enumerate(found) if token != IGNORE_INDEX} == expected


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.parquet", "saved"])
def test_every_kind_of_records_with_messages(tokenizer, tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        datasets.Dataset.from_list(RECORDS).to_parquet(path, batch_size=7)
    elif name == "saved":
        datasets.Dataset.from_list(RECORDS).save_to_disk(path)
    else:
        contents = {"a.jsonl": JSON_LINES, "a.jsonl.gz": gzip.compress(JSON_LINES)}
        path.write_bytes(contents.get(name, json.dumps(RECORDS).encode()))
    data = FIELD | {"tokenizer": str(tokenizer)}
    expected = sorted(STREAM[i : i + 10] for i in range(0, len(STREAM) - 9, 8))
    for source in ({"path": str(path)}, {"path": str(path), "stream": True}):
        train = load_datasets(data_config(source, data=data)).train
        assert sorted(train.read(0, (len(STREAM) - 2) // 8).tolist()) == expected
    template = read_chat_template(str(tokenizer))
    prepared = made(
        request(path, tmp_path / "corpus", tokenizer, 1 + (name == "saved"), field="chat", chat_template=template)
    )
    corpus = open_corpus(tmp_path / "corpus", "x")
    assert corpus.tokens.tolist() == STREAM and corpus.has_conversations
    assert (
        prepared.description.prompt_tokens == sum(token < 0 for token in STREAM) and not prepared.text_loss.lost_bytes
    )
    from_corpus = load_datasets(data_config(tmp_path / "corpus", data={"tokenizer": str(tokenizer)}))
    from_records = load_datasets(data_config(path, data=data))
    assert np.array_equal(from_corpus.train.read(0, 40), from_records.train.read(0, 40))
    report = inspect_corpus(corpus, build_tokenizer(str(tokenizer)), 1, 40, 1, 1, lambda done: None)
    assert report.samples[0].tokens[:2] == ["<|im_start|>", "u"] and PROMPT in report.samples[0].targets[0]


TEXT = st.text("ad ef(\né<|", max_size=9)


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    """transformers' tokenizer of merged bytes, such as two line ends, and the folders of its two templates."""
    root, sentences = tmp_path_factory.mktemp("oracle"), [*SENTENCES, *["blank lines\n\n"] * 300]
    folders = [
        write_chat_tokenizer(root / name, template, train_byte_pairs(sentences))
        for name, template in (("plain", CHATML), ("marked", MARKED_CHATML))
    ]
    return AutoTokenizer.from_pretrained(folders[1]), folders


@settings(max_examples=40)
@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, min_size=1, max_size=3))
def test_tokens_and_marks_are_those_of_transformers(oracle, asked, answered):
    transformers_tokenizer, folders = oracle
    turns = [turn for pair in zip(asked, answered, strict=False) for turn in pair]
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    expected = transformers_tokenizer.apply_chat_template(messages(*turns), **options)
    ids, learned = (np.array(expected[key][:-1]) for key in ("input_ids", "assistant_masks"))
    for folder in folders:
        document = read_chat_template(str(folder)).document(messages(*turns), "chat", lambda: "")
        tokenizer = build_tokenizer(str(folder))
        tokens, _ = tokenizer.encode_documents([document])
        assert tokens[:-1].tolist() == np.where(learned, ids, ~ids).tolist() and tokens[-1] == tokenizer.end_of_document


def tokens_of(folder, chat):
    document = read_chat_template(str(folder)).document(chat, "chat", lambda: "")
    return build_tokenizer(str(folder)).encode_documents([document])[0].tolist()


def test_templates_with_rules_of_their_own(tmp_path):
    folder = write_chat_tokenizer(tmp_path / "reasons", DROPS_REASONING)
    tokens = tokens_of(folder, messages("a", "b</think>c", "d", "e</think>f"))
    begin = [START_OF_TURN, *b"assistant\n"]
    unlearned = [*read("a"), *begin, ord("c"), END_OF_TURN, ord("\n"), *read("d"), *begin]
    assert tokens == [*(~token for token in unlearned), *b"e</think>f", END_OF_TURN, END], "not as it was generated"

    folder = write_chat_tokenizer(tmp_path / "bos", WRITES_BOS)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}')
    tokens = tokens_of(folder, messages("a", "b"))
    assert tokens == [~END, *(~token for token in [*read("a"), *begin]), ord("b"), END_OF_TURN], "one end, one begin"


def test_turns_are_not_documents(tmp_path):
    folder = write_chat_tokenizer(tmp_path / "one_end", ENDS_ALL_TURNS)
    lines = write_lines(tmp_path / "a.jsonl", [messages("a", "b")] * 9)
    template = read_chat_template(str(folder))
    made(request(lines, tmp_path / "corpus", folder, field="chat", chat_template=template))
    data = {"tokenizer": str(folder), "loss_across_documents": False}
    lines_data = data | FIELD
    for source, given_data in (
        ({"path": str(tmp_path / "corpus")}, data),
        ({"path": str(lines)}, lines_data),
        ({"path": str(lines), "stream": True}, lines_data),
    ):
        message = error_of(ConfigError, load_datasets, data_config(source, data=given_data))
        assert message == (
            f"data.train.0 has conversations in which the end-of-document token of '{folder}' also ends turns, so that "
            "data.loss_across_documents = false would make each turn a document: set it to true"
        )
        load_datasets(data_config(source, data=given_data | {"loss_across_documents": True}))


USER = {"role": "user", "content": "x"}
ANSWER = {"role": "assistant", "content": "y"}


@pytest.mark.parametrize(
    ("chat", "expected"),
    [
        ("hello", "the field 'chat' is not a list of messages but str: choose another messages_field, or write its"),
        (["hello"], "chat[0] is not an object with role and content but str: fix it"),
        ([{"from": "human", "value": "x"}], "chat[0] has no role, it has 'from', 'value': write it as"),
        ([USER, {"role": "bot", "content": "y"}], "chat[1] has the unknown role 'bot': use one of system, user,"),
        ([USER, ANSWER | {"content": [{"type": "text"}]}], "chat[1]: the content is not text but list: fix it"),
        ([USER, {"role": "assistant"}], "chat[1]: the content is not text but NoneType: fix it"),
        ([USER], "'chat' has no message of the assistant, whose turns are learned: leave it out"),
        ([ANSWER], "cannot write 'chat' (begin with the user): fix the record, or leave it out"),
    ],
    ids=str,
)
def test_malformed_messages_are_located(tmp_path, chat, expected):
    refuses = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}" + CHATML
    folder = write_chat_tokenizer(tmp_path / "chat", refuses)
    lines = write_lines(tmp_path / "a.jsonl", [[USER, ANSWER], chat])
    for stream in (False, True):
        config = data_config({"path": str(lines), "stream": stream}, data=FIELD | {"tokenizer": str(folder)})
        message = error_of(DataError, lambda config: load_datasets(config).train.read(0, 9), config)
        assert message.startswith(f"data.train.0.path = '{lines}': {lines}, line 2: ") and expected in message


def test_mistakes_name_the_key(tokenizer, tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", [messages("a", "b")] * 9)
    message = error_of(ConfigError, data_config, lines, data=FIELD | {"prompt_field": "q", "completion_field": "a"})
    assert message == (
        "data.messages_field = 'chat' excludes data.prompt_field and data.completion_field, as the messages contain "
        "the prompts: remove one or the other"
    )
    message = error_of(ConfigError, data_config, {"path": "x", "field": "b"}, data=FIELD)
    assert message == "data.train.0.field = 'b' has no effect with data.messages_field = 'chat': remove it"
    message = error_of(ConfigError, load_datasets, data_config(lines, data=FIELD))
    assert message == (
        "data.tokenizer = 'bytes' has no chat template, which messages need: name the folder of a tokenizer with one"
    )
    bare = write_chat_tokenizer(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    message = error_of(ConfigError, load_datasets, data_config(lines, data=FIELD | {"tokenizer": str(bare)}))
    assert message == (
        f"data.tokenizer = '{bare}' has no chat template, which messages need: write one to {bare}/chat_template.jinja"
    )
    data = FIELD | {"tokenizer": str(tokenizer)}
    for path, expected in (
        (tmp_path / "a.txt", "a.txt is text, not records with the field 'chat': convert it to JSON lines"),
        (tmp_path / "b.jsonl", "line 1 has no field 'chat', it has 'text': choose another messages_field"),
    ):
        path.write_text('{"text": "x"}\n' if path.suffix == ".jsonl" else "no records")
        assert error_of(DataError, load_datasets, data_config(path, data=data)).endswith(expected)
    message = error_of(ConfigError, load_datasets, data_config("synthetic/choices", data=data))
    assert message.startswith("data.messages_field = 'chat' does not apply to data.train.0.path = 'synthetic/choices'")
    config = data_config(lines, data=data | {"loss_across_documents": False})
    config = config.model_copy(update={"heads": HeadsConfig(count=2, token_order=1.0)})
    message = error_of(ConfigError, load_datasets, config)
    assert message.startswith("heads.token_order ranks the tokens of the next turn, and data.train.0 has conversations")
    made(request(write_lines(tmp_path / "c.jsonl", ["x"] * 9), tmp_path / "plain", tokenizer, field="chat"))
    message = error_of(ConfigError, load_datasets, data_config(tmp_path / "plain", data=data))
    assert "a prepared corpus without prompts: prepare it with `mtp-dist prepare --messages-field ...`" in message
    forced = write_chat_tokenizer(tmp_path / "forced", CHATML.replace("assistant\n'", "assistant\n<think>'"))
    message = error_of(DataError, tokens_of, forced, messages("a", "b"))
    assert message.startswith(
        f": the chat template of '{forced}' does not write the last turn of the assistant in 'chat'"
    )
