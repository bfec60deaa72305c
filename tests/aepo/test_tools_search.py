"""The search tool ranks like BM25 computed by hand, always in the same order, and answers every query."""

import asyncio
import json
import math
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aepo.agents.tools.search import NO_RESULTS, SearchTool, words
from aepo.agents.tools.toolbox import ToolBox
from aepo.types import ToolCall

DOCUMENTS = [
    "Lima is the capital of Peru.",
    "The currency of Peru is the sol.",
    "Quito is the capital of Ecuador.",
    "The currency of Ecuador is the US dollar.",
    "São Paulo is the largest city of Brazil.",
    "Peru has borders with Brazil, Ecuador, Chile, Bolivia and Colombia.",
]


def bm25(documents, query, k1=1.5, b=0.75):
    """Scores in float64: Robertson's formula with the idf of Lucene, which is never negative."""
    counts = [Counter(words(document)) for document in documents]
    mean_length = sum(map(Counter.total, counts)) / len(counts)
    scores = [0.0] * len(documents)
    for word in words(query):
        containing = sum(word in count for count in counts)
        idf = math.log(1 + (len(counts) - containing + 0.5) / (containing + 0.5))
        for i, count in enumerate(counts):
            length = k1 * (1 - b + b * count.total() / mean_length)
            scores[i] += idf * count[word] / (count[word] + length)
    return scores


def best(documents, query, top_k):
    scores = bm25(documents, query)
    order = sorted(range(len(documents)), key=lambda i: (-round(scores[i], 5), i))
    return [documents[i] for i in order[:top_k] if scores[i] > 0]


@pytest.mark.parametrize("query", ["capital of Peru", "currency", "Ecuador dollar", "largest city", "peru peru lima"])
@pytest.mark.parametrize("top_k", [1, 3, 100])
def test_ranks_like_bm25(query, top_k):
    assert SearchTool(DOCUMENTS, top_k=top_k)(query).split("\n") == best(DOCUMENTS, query, top_k)


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=6).map(" ".join), min_size=1, max_size=12),
    st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=4).map(" ".join),
)
def test_ranks_like_bm25_on_random_corpora(documents, query):
    found = SearchTool(documents, top_k=len(documents))(query).split("\n")
    scores = dict(zip(documents, bm25(documents, query), strict=True))
    expected = sorted((score for score in bm25(documents, query) if score > 0), reverse=True)
    assert found == [NO_RESULTS] if not expected else len(found) == len(expected)
    if expected:
        assert [scores[document] for document in found] == pytest.approx(expected, rel=1e-5)  # float32 in the library


def test_case_accents_and_punctuation_do_not_matter():
    tool = SearchTool(DOCUMENTS, top_k=1)
    assert tool("SAO PAULO") == tool("são-paulo?") == tool("Sa\u0303o Paulo") == DOCUMENTS[4]
    assert words("São Paulo's 2,500 m²") == ["sao", "paulo", "s", "2", "500", "m2"]


@pytest.mark.parametrize("query", ["", "  \n", "?!", "zebra", "\x00", "\ud800", "<search>"])
def test_no_match_says_so(query):
    assert SearchTool(DOCUMENTS)(query) == NO_RESULTS


def test_equal_documents_come_in_the_order_of_the_corpus():
    documents = [f"{'abcd'[i % 4]} same" for i in range(200)]
    expected = "\n".join(documents[:5])
    assert all(SearchTool(documents, top_k=5)("same") == expected for _ in range(3))


def test_one_document():
    assert SearchTool(["only one"])("one") == "only one"


def test_many_threads_give_the_same_answers():
    tool = SearchTool(DOCUMENTS)
    queries = [word for document in DOCUMENTS for word in document.split()] * 10
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(tool, queries)) == [tool(query) for query in queries]


def test_in_a_toolbox():
    toolbox = ToolBox([SearchTool(DOCUMENTS, top_k=1), SearchTool(["other"], name="search-2", description="Others.")])
    queries = ["capital of Ecuador", "zebra"]
    (result, nothing) = asyncio.run(toolbox.run([ToolCall("search", {"query": query}) for query in queries]))
    assert (result.text, result.error) == (DOCUMENTS[2], None)
    assert (nothing.text, nothing.error) == (NO_RESULTS, None)
    assert [schema["function"]["name"] for schema in toolbox.schemas] == ["search", "search-2"]
    assert toolbox.schemas[1]["function"]["description"] == "Others."


def test_jsonl(tmp_path):
    path = tmp_path / "corpus.jsonl"
    lines = [
        {"text": "Lima is in Peru."},
        {"id": 2, "text": "Größe"},
        {"id": "3", "contents": '"Rome"\nIt lies in Italy.'},
        {"title": "Oslo", "text": "It lies in Norway."},
        {"title": None, "text": "Bern lies in Switzerland."},
    ]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    tool = SearchTool.from_jsonl(path, top_k=2)
    assert tool("grosse") == "Größe"
    assert tool("lies") == 'Bern lies in Switzerland.\n\n"Rome"\nIt lies in Italy.'
    assert tool("oslo") == "Oslo\nIt lies in Norway."


@pytest.mark.parametrize(
    "line", ['{"title": "a"}', '"a"', "[1]", "not json", '{"text": "a"', '{"text": 5}', '{"text": "?"}']
)
def test_bad_jsonl_names_the_line(tmp_path, line):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl:2: expected"):
        SearchTool.from_jsonl(path)


def test_its_identity(tmp_path):
    """The documents in their order, and how many are returned: not where they are."""
    assert SearchTool(["a b", "c"]).identity == SearchTool(["a b", "c"], name="find").identity
    others = [["a b"], ["a", "b c"], ["c", "a b"], ["a b", "d"]]
    found = [SearchTool(documents).identity["sha256"] for documents in (["a b", "c"], *others)]
    assert len(set(found)) == 5
    assert SearchTool(["a b", "c"], top_k=2).identity == {"documents": 2, "top_k": 2, "sha256": found[0]}
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text('{"text": "a b"}\n{"contents": "c"}\n')
        assert SearchTool.from_jsonl(tmp_path / name).identity["sha256"] == found[0]


def test_an_empty_file(tmp_path):
    (tmp_path / "corpus.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"corpus\.jsonl has no document"):
        SearchTool.from_jsonl(tmp_path / "corpus.jsonl")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "documents must not be empty"),
        (("text",), TypeError, "got one text"),
        ((["a", 1],), TypeError, r"documents\[1\] is int"),
        ((["a", "  "],), ValueError, r"documents\[1\] has no word"),
    ],
)
def test_bad_documents(arguments, error, message):
    with pytest.raises(error, match=message):
        SearchTool(*arguments)


@pytest.mark.parametrize("top_k", [0, -1, 1.5, None])
def test_bad_top_k(top_k):
    with pytest.raises(ValueError, match="top_k must be an integer >= 1"):
        SearchTool(["a"], top_k=top_k)


def test_speed(capsys):
    rng = random.Random(0)
    vocabulary = [f"word{i}" for i in range(5000)]
    documents = [" ".join(vocabulary[int(5000 * rng.random() ** 2)] for _ in range(40)) for _ in range(4000)]
    tool = SearchTool(documents)
    times = []
    for _ in range(200):
        query = " ".join(rng.sample(vocabulary, 6))
        start = time.perf_counter()
        tool(query)
        times.append(time.perf_counter() - start)
    median_ms = sorted(times)[100] * 1e3
    with capsys.disabled():
        print(f"\nsearch: {median_ms:.2f} ms per query, 4000 documents of 40 words")
    assert median_ms < 5  # measured: 0.07 ms


def test_its_identity_is_that_of_whole_documents():
    one, other = (SearchTool(["word " * 10_000 + end]).identity["sha256"] for end in ("a", "b"))
    assert one != other
