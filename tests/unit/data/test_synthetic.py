"""Synthetic tasks: documents by their grammar, disjoint splits, and their use as a source."""

import hashlib
import pickle
import re
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import polynomial

from mtp_dist.config.synthetic import SYNTHETIC_PREFIX, SyntheticConfig
from mtp_dist.data.build_tokenizer import build_tokenizer
from mtp_dist.data.datasets import load_datasets
from mtp_dist.data.sources.input import InputOptions, Shard
from mtp_dist.data.sources.open_inputs import open_inputs
from mtp_dist.data.synthetic.agreement import ARTICLES, ENDINGS, GENDER, PEOPLE
from mtp_dist.data.synthetic.task import TaskCorpus
from mtp_dist.data.synthetic.tasks import TASKS, build_task
from mtp_dist.errors import ConfigError, DataError
from tests.unit.data.preparing import data_config, error_of

FEW = {
    "induction": {},
    "arithmetic": {"operations": 1, "coefficients": 2},
    "agreement": {"people": 2},
    "star-graph": {"degree": 3, "length": 2, "nodes": 6},
    "choices": {"branches": 2},
}
"""Parameters with so few different documents that some of two thousand occur again."""
ANY = {
    "induction": {"names": st.integers(2, 8), "new_names": st.floats(0, 1)},
    "arithmetic": {"operations": st.integers(1, 12), "coefficients": st.integers(2, 6)},
    "agreement": {"people": st.integers(2, 12), "adjectives": st.integers(0, 4)},
    "star-graph": {"degree": st.integers(2, 6), "length": st.integers(2, 6), "nodes": st.integers(31, 100)},
    "choices": {"branches": st.integers(2, 16), "length": st.integers(2, 16)},
}


NAME = re.compile(r"[A-Z]\w -\w+")


def corpus(name, split="train", seed=0, **options):
    return TaskCorpus(build_task(TASKS[name], SyntheticConfig(**options), ""), split, seed)


def answers(document, group):
    """Return the words of each answer, and the index of its first one."""
    return [(document.words[a.start : a.end], a.start) for a in document.answers if a.group == group]


def check_induction(document, task):
    names = [(first, document.words[i + 1]) for i, first in enumerate(document.words) if first[0].isupper()]
    assert len(set(names)) == len({first for first, _ in names}) == task.names
    known = {start - 1 for _, start in answers(document, "known-second")}
    assert known == {start for _, start in answers(document, "known-first")}
    new = {start - 1 for _, start in answers(document, "new-second")}
    seen = set()
    for index, word in enumerate(document.words):
        if word[0].isupper():
            assert index in (known if word in seen else new)
            seen.add(word)
    assert len(known) + len(new) == len(names)
    for group, start, _, chance in document.answers:
        if group.startswith("known"):
            part = group == "known-second"
            sentence = " ".join((*document.words[: start - part], "")).rpartition(" . ")[2].split()
            possible = [name[part] for name in set(names) if name[0] not in sentence]
            assert chance == possible.count(document.words[start]) / len(possible)


def evaluate(tokens, k):
    """Return the value of the expression that the tokens begin with, by NumPy's own products, and the rest."""
    head, *rest = tokens
    if head not in ("neg", "+", "*", "o"):
        return np.array([int(token) for token in tokens[:k]]), tokens[k:], 0
    a, rest, operations = evaluate(rest, k)
    if head == "neg":
        return -a % 7, rest, operations + 1
    b, rest, more = evaluate(rest, k)
    if head == "o":
        powers = [np.array([1])]
        for _ in a[1:]:
            powers.append(polynomial.polymul(powers[-1], b)[:k] % 7)
        value = reduce(polynomial.polyadd, (c * power for c, power in zip(a, powers, strict=True)))
    else:
        value = polynomial.polyadd(a, b) if head == "+" else polynomial.polymul(a, b)
    value = np.concatenate([value, np.zeros(k)])[:k] % 7
    return value, rest, operations + more + 1


def check_arithmetic(document, task):
    value, rest, operations = evaluate(list(document.words), task.coefficients)
    assert rest[0] == "=" and [int(token) for token in rest[1:]] == value.tolist()
    assert answers(document, f"operations-{operations:02}") == [(tuple(rest[1:]), len(document.words) - len(value))]
    assert 1 <= operations <= task.operations


def check_agreement(document, task):
    *facts, rest = document.text.split(" . ")
    nouns = dict(fact.split() for fact in facts)
    assert len(nouns) == task.people and set(nouns) <= set(PEOPLE)
    genders = [GENDER[noun] for noun in nouns.values()]
    chances = {answer.chance for answer in document.answers if answer.group == "article"}
    assert chances == {max(map(genders.count, range(3))) / task.people}
    questions = [question.split() for question in rest.removesuffix(" ?").split(" ? ")]
    assert len(questions) == 3 * task.people
    for _, person, article, *adjectives, noun in questions:
        assert noun == nouns[person] and article == ARTICLES[GENDER[noun]] and len(adjectives) == task.adjectives
        ending = r"(alt|grau|klein|neu|rot|schwer)" + ENDINGS[GENDER[noun]]
        assert all(re.fullmatch(ending, adjective) for adjective in adjectives)
    first = [question[1] not in [earlier[1] for earlier in questions[:i]] for i, question in enumerate(questions)]
    for suffix, wanted in (("", True), ("-again", False)):
        chosen = [question for question, is_first in zip(questions, first, strict=True) if is_first == wanted]
        assert [word for (word,), _ in answers(document, f"article{suffix}")] == [question[2] for question in chosen]
        assert [word for (word,), _ in answers(document, f"noun{suffix}")] == [question[-1] for question in chosen]


def check_star_graph(document, task):
    graph, _, rest = document.text.partition(" / ")
    edges = [tuple(edge.split()) for edge in graph.split(" | ")]
    (start, goal), path = (part.split() for part in rest.split(" = "))
    assert len(edges) == len(set(edges)) == task.degree * (task.length - 1)
    assert path[0] == start and path[-1] == goal and len(path) == task.length
    assert set(pairwise(path)) <= set(edges)
    assert sum(edge[0] == start for edge in edges) == task.degree
    assert len({node for edge in edges for node in edge}) == len(edges) + 1, "a tree: no other path leads there"
    assert max(int(node) for edge in edges for node in edge) < task.nodes
    place = len(document.words) - task.length + 1
    assert answers(document, "first-step") == [((path[1],), place)]
    assert answers(document, "path") == [(tuple(path[1:]), place)]


def check_choices(document, task):
    groups = [answer.group for answer in document.answers]
    assert [answer[1:3] for answer in document.answers] == [(i, i + 1) for i in range(len(document.words))]
    starts = [index for index, group in enumerate(groups) if group == "choice"]
    assert starts == list(range(0, 12 * (task.length + 1), task.length + 1))
    for start in starts:
        phrase = document.words[start : start + task.length + 1]
        rest = [word for word in phrase if not word.startswith("free")]
        assert rest == [f"{phrase[0][0]}{step}" for step in range(1, task.length + 1)]
    assert [group == "free" for group in groups] == [word.startswith("free") for word in document.words]
    assert set(groups) == {"choice", "determined", "free"}


CHECKS = {
    "induction": check_induction,
    "arithmetic": check_arithmetic,
    "agreement": check_agreement,
    "star-graph": check_star_graph,
    "choices": check_choices,
}


@pytest.mark.parametrize("name", TASKS)
@given(st.data(), st.integers(0, 9), st.integers(0, 10**6), st.sampled_from(["train", "validation"]))
def test_documents_follow_the_grammar(name, data, seed, number, split):
    options = data.draw(st.fixed_dictionaries(ANY[name]))
    source = corpus(name, split, seed, **options)
    document = source.document(number)
    assert document == corpus(name, split, seed, **options).document(number)
    CHECKS[name](document, source.task)
    tokenizer = build_tokenizer(SYNTHETIC_PREFIX + name)
    assert tokenizer.decode(ids := tokenizer.encode(document.text)) == document.text and len(ids) == len(document.words)
    assert max(ids) < tokenizer.end_of_document == tokenizer.vocab_size - 1


def subjects(name, document):
    """Return what must not occur in two splits."""
    if name == "induction":
        return {tuple(sorted(set(NAME.findall(document.text))))}
    if name == "star-graph":
        graph, _, rest = document.text.partition(" / ")
        return {(rest, *sorted(graph.split(" | ")))}
    if name == "choices":
        return {re.sub(r"free\d+", "", document.text)}
    if name == "agreement":
        return {tuple(sorted(document.text.split(" . ")[:-1]))}
    return {document.text.partition("=")[0]}


@pytest.mark.parametrize("name", TASKS)
def test_splits_are_disjoint(name):
    found = {}
    for split, count in (("train", 2000), ("validation", 500)):
        source = corpus(name, split, **FEW[name])
        found[split] = [subject for number in range(count) for subject in subjects(name, source.document(number))]
    assert not set(found["train"]) & set(found["validation"])
    assert len(set(found["train"])) < len(found["train"]), "few enough that the test could fail"


def test_known_names_determine_their_second_token():
    source = corpus("induction", new_names=0.0)
    names = {name for number in range(200) for name in NAME.findall(source.document(number).text)}
    assert len(names) == len({name.split()[0] for name in names}) == 20
    mixed = corpus("induction", new_names=0.5)
    share = np.mean([names.issuperset(NAME.findall(mixed.document(number).text)) for number in range(400)])
    assert 0.4 < share < 0.6


def test_number_of_operations_is_uniform():
    source = corpus("arithmetic", operations=4)
    counts = np.unique([source.document(number).answers[0].group for number in range(800)], return_counts=True)[1]
    assert len(counts) == 4 and (abs(counts - 200) < 60).all()


DIGESTS = {
    "induction": "0df8844ddd3a5ced",
    "arithmetic": "a99b992f8e44203b",
    "agreement": "fff9675fdf4fa74f",
    "star-graph": "688a7ef11e8fed23",
    "choices": "0627cf61bf7aa72b",
}


@pytest.mark.parametrize("name", TASKS)
def test_documents_are_the_same_on_every_machine(name):
    """A changed grammar changes what published figures were measured on."""
    source = corpus(name, seed=3)
    text = "\n".join(source.document(number).text for number in range(50))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[name]


def test_training_on_a_task():
    options = {"documents": 300, "degree": 2, "length": 3}
    train = {"path": "synthetic/star-graph", "options": options}
    validation = train | {"split": "validation"}
    config = data_config(train, validation, {"tokenizer": "synthetic/star-graph"}, sequence_length=19)
    datasets = load_datasets(config)
    tokenizer = datasets.tokenizer
    # A document and its end have 19 tokens, so each sample begins with a document.
    samples = datasets.train.read(0, 40)
    texts = [tokenizer.decode(sample) for sample in samples]
    pattern = r"\d+ \d+ \| \d+ \d+ \| \d+ \d+ \| \d+ \d+ / \d+ \d+ = \d+ \d+ \d+ "
    assert all(re.match(pattern, text) for text in texts) and len(set(texts)) == 40
    expected = corpus("star-graph", "validation", degree=2, length=3).document(0).text
    assert tokenizer.decode(datasets.validation[0].samples[0]).startswith(expected)


def test_units_and_streams_have_the_same_documents():
    source = open_inputs(["synthetic/agreement"], InputOptions(synthetic=SyntheticConfig(documents=50, seed=2)))[0]
    expected = [corpus("agreement", seed=2).document(number).text.encode() for number in range(50)]
    units = pickle.loads(pickle.dumps(list(source.units(1000))))  # for the worker processes of prepare
    assert [text for unit in units for text in unit.documents()] == expected
    assert sum(unit.size for unit in units) == source.total == 50 and len(units) > 1
    last = units[-1]
    assert last.location(0) == f"synthetic/agreement, document {50 - last.size}"
    read = list(source.documents(None))
    assert [text for _, text in read] == expected
    assert list(source.documents(read[7][0])) == read[7:]
    shards = [[text for _, text in source.documents(None, Shard(index, 3))] for index in range(3)]
    assert shards == [expected[index::3] for index in range(3)]
    other = InputOptions(synthetic=SyntheticConfig(documents=50, seed=3))
    assert open_inputs(["synthetic/agreement"], other)[0].fingerprint() != source.fingerprint()


SOURCE = "data.train.0.options"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"path": "synthetic/inductions"},
            "data.train.0.path = 'synthetic/inductions' is not a synthetic task: use one",
        ),
        ({"options": {"degre": 3}}, f"{SOURCE}.degre is not a known key: did you mean {SOURCE}.degree?"),
        ({"options": {"names": 3}}, f"{SOURCE}.names is not a parameter of 'synthetic/star-graph': it has degree, "),
        ({"options": {"degree": 1}}, f"{SOURCE}.degree = 1 is invalid: it should be greater than or equal to 2"),
        ({"options": {"degree": "x"}}, f"{SOURCE}.degree = 'x' is invalid: it should be a valid integer"),
        ({"options": {"nodes": 20}}, f"{SOURCE}.nodes = 20 is below the 21 nodes of a graph"),
        ({"split": "test"}, "data.train.0.split = 'test' is unknown for synthetic tasks: use 'train' or 'validation'"),
        ({"path": "python-stdlib", "options": {}}, f"{SOURCE} are parameters of a synthetic task, 'python-stdlib' is"),
    ],
)
def test_wrong_parameters_are_reported(source, message):
    def load():
        load_datasets(data_config({"path": "synthetic/star-graph"} | source, (), {"tokenizer": "synthetic/star-graph"}))

    assert error_of(ConfigError, load).startswith(message)


def test_fields_of_prompts_are_rejected():
    data = {"tokenizer": "synthetic/choices", "prompt_field": "q", "completion_field": "a"}
    message = error_of(ConfigError, load_datasets, data_config("synthetic/choices", (), data))
    path = "data.train.0.path = 'synthetic/choices'"
    assert message.startswith(
        f"data.prompt_field = 'q' does not apply to {path}, whose documents have no fields: remove"
    )
    message = error_of(ConfigError, open_inputs, ["synthetic/choices"], InputOptions("a", prompt_field="q"))
    assert message.endswith("remove --prompt-field and --completion-field, or the source")


def test_wrong_tokenizers_are_reported():
    text = error_of(ConfigError, build_tokenizer, "synthetic/star")
    assert text.startswith(
        "data.tokenizer = 'synthetic/star' is not a synthetic task: use one of synthetic/induction, "
    )
    source = {"path": "synthetic/choices", "options": {"documents": 9}}
    config = data_config(source, (), {"tokenizer": "synthetic/star-graph"})
    text = error_of(DataError, load_datasets, config)
    assert text.startswith(
        "data.train.0.path = 'synthetic/choices': synthetic/choices, document 0: 'synthetic/star-graph'"
    )
    assert "has no token for '" in text
