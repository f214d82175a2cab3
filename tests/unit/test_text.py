"""YAML and JSON as Kubernetes reads them, and hostile text in bounded time."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from dataplane.sources import text
from dataplane.sources.text import MAX_DEPTH, TextError, Unreadable, documents


def read(text: str | bytes, *, only_json: bool = False) -> list[object]:
    """The documents; an error shows as its text in a tuple."""
    data = text if isinstance(text, bytes) else text.encode()
    found = documents(data, only_json=only_json)
    return [(str(each),) if isinstance(each, TextError) else each for each in found]


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("yes", "yes"),
        ("n", "n"),
        ("0", 0),
        ("-7", -7),
        ("80", 80),
        ("1.5", 1.5),
        ("1e3", 1000.0),
        ("22:22", "22:22"),
        ("080", "080"),
        ("0x50", "0x50"),
        ("0o17", "0o17"),
        ("1_000", "1_000"),
        ("9" * 40, "9" * 40),
        (".nan", ".nan"),
        ("-", ("line 1: not YAML: block sequence entries are not allowed in this context",)),
        ("10.0.0.1", "10.0.0.1"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("::1", "::1"),
        ("2026-01-31", "2026-01-31"),
        ("2026-01-31T12:00:00Z", "2026-01-31T12:00:00Z"),
        ("'80'", "80"),
        ('"true"', "true"),
        ("!!str 80", "80"),
        ("!!int 80", 80),
    ],
)
def test_scalars(scalar: str, value: object) -> None:
    (found,) = read(f"k: {scalar}")
    if isinstance(value, tuple):
        assert found == value
    else:
        assert found == {"k": value}
        assert isinstance(found, dict)
        assert type(found["k"]) is type(value)


def test_keys_are_text() -> None:
    assert read("1: a\ntrue: b\nnull: c\n2026-01-31: d\n'x y': e") == [
        {"1": "a", "true": "b", "null": "c", "2026-01-31": "d", "x y": "e"}
    ]


def test_documents() -> None:
    text = "# comment\n---\na: 1\n---\n---\n# nothing\n---\nb: |\n  text\n  --- not a marker\n...\n"
    assert read(text) == [{"a": 1}, {"b": "text\n--- not a marker\n"}]
    assert read("") == read("\n") == read("# x\n") == read("---\n") == []
    assert read("%YAML 1.1\n---\na: 1\n") == [{"a": 1}]
    assert read("---\r\na: 1\r\n---\r\nb: 2\r\n") == [{"a": 1}, {"b": 2}]
    assert read(b"\xef\xbb\xbfa: 1") == [{"a": 1}]


def test_one_broken_document_spares_the_others() -> None:
    first, error, last = read("a: 1\n---\nb: [\n---\nc: 3\n")
    assert (first, last) == ({"a": 1}, {"c": 3})
    assert isinstance(error, tuple)
    assert error[0].startswith("line 4: not YAML")


def test_a_quote_that_is_not_closed_ends_with_its_document() -> None:
    found = read('a: "x\n---\nb: 2\n')
    assert found[-1] == {"b": 2}


@pytest.mark.parametrize("text", ["{a: 1, b: {c: 2, c: 3}, d: 4}", '{"a": 1, "b": {"c": 2, "c": 3}, "d": 4}'])
def test_a_key_twice_makes_only_its_own_map_unreadable(text: str) -> None:
    ((whole),) = read(text)
    assert isinstance(whole, dict)
    assert (whole["a"], whole["d"]) == (1, 4)
    assert isinstance(whole["b"], Unreadable)
    assert repr(whole["b"]) == "a map with the key 'c' twice"


def test_anchors_and_merges() -> None:
    assert read("a: &x {p: 1, q: 2}\nb: *x\nc: {<<: *x, q: 3}\nd: {q: 4, <<: [*x, {r: 5}]}") == [
        {
            "a": {"p": 1, "q": 2},
            "b": {"p": 1, "q": 2},
            "c": {"p": 1, "q": 3},
            "d": {"p": 1, "q": 4, "r": 5},
        }
    ]
    assert read("'<<': 1") == [{"<<": 1}]
    ((merged),) = read("a: {<<: 1}")
    assert isinstance(merged, dict)
    assert isinstance(merged["a"], Unreadable)


@pytest.mark.parametrize(
    "text",
    [
        "a: *b",
        "a: &x [*x]",
        "? [a]\n: 1",
        "? {a: 1}\n: 1",
        "a: &x {b: 1}\n*x : 2",
        "a: !!python/object/apply:os.system [id]",
        "a: !custom {b: 1}",
        "a: !!binary aGk=",
        "a: !!timestamp 2026-01-31",
        "a: !!int x",
        "a: !!int true",
        "a: !!set {b, c}",
        "a\tb: \x07",
        "a: b: c",
        "%BAD\na: 1",
        "[" * 100_000,
        "{" * 100_000,
        "- " * 100_000,
        "? " * 100_000,
        "a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1),
    ],
)
def test_errors_are_one_line(text: str) -> None:
    found = read(text)
    assert len(found) == 1
    (line,) = found[0]  # type: ignore[misc]
    assert "\n" not in line
    assert len(line) < 300


def test_nesting_that_kubernetes_needs_is_fine() -> None:
    depth = MAX_DEPTH - 1
    assert len(read("a: " + "[" * depth + "]" * depth)) == 1
    assert not isinstance(read("a: " + "[" * depth + "]" * depth)[0], tuple)


def test_alias_bomb() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    ((error),) = read("\n".join(lines))
    assert isinstance(error, tuple)
    assert "aliases stand for more than" in error[0]


def test_merge_bomb() -> None:
    lines = ["a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(1000)) + "}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], z{n}: 1}}" for n in range(1, 30)]
    ((error),) = read("\n".join(lines))
    assert isinstance(error, tuple)
    assert "aliases stand for more than" in error[0]


@pytest.mark.parametrize(
    "unit", ["---\na: 1\n", "---\n", "#\n---\n", '---\na: "x\n', '{"a": 1}\n', "--- {}\n"]
)
def test_documents_without_end(monkeypatch: pytest.MonkeyPatch, unit: str) -> None:
    monkeypatch.setattr(text, "MAX_DOCUMENTS", 20)
    found = read(unit * 500)
    assert len(found) <= 21
    assert found[-1] == ("more than 20 documents; split the file",)
    assert ("more than 20 documents; split the file",) not in read(unit * 19)


@pytest.mark.parametrize("only_json", [False, True])
def test_values_without_end(monkeypatch: pytest.MonkeyPatch, only_json: bool) -> None:
    monkeypatch.setattr(text, "MAX_VALUES", 100)
    for value in (
        "[" + "1," * 200 + "1]",
        "[" + "[]," * 200 + "1]",
        "[" * 200,
        '{"a": [' + "{}," * 200 + "1]}",
    ):
        ((error),) = read(value, only_json=only_json)
        assert isinstance(error, tuple)
        assert "values; split the file" in error[0]
    ((error),) = read("a:\n" + "- b\n" * 200)
    assert isinstance(error, tuple)
    assert error[0].startswith("line 100: more than")
    first, error = read(("- [a, b, c]\n" * 10 + "---\n") * 20)[-2:]
    assert isinstance(first, list), "the documents before the bound count, those after it are not looked at"
    assert isinstance(error, tuple)
    assert "values; split the file" in error[0]
    assert len(read("[" + "1," * 50 + "1]", only_json=only_json)[0]) == 51  # type: ignore[arg-type]


def test_a_million_lines_of_comments_and_directives() -> None:
    # Once a document of its own; a regular expression that keeps a way back for each takes gigabytes.
    assert read("#\n" * 1_000_000 + "---\na: 1\n") == [{"a": 1}]
    ((error),) = read("%A\n" * 1_000_000 + "---\na: 1")
    assert isinstance(error, tuple)


def test_the_key_that_is_there_twice_is_found_among_many() -> None:
    pairs = ",".join(f'"k{n}":1' for n in range(100_000))
    ((whole),) = read("{" + pairs + ',"k99999":2}')
    assert repr(whole) == "a map with the key 'k99999' twice"


def test_equal_words_share_one_object() -> None:
    found = read("- {a b: c d}\n- {a b: c d}")[0]
    assert isinstance(found, list)
    (one,), (other,) = (list(each.items()) for each in found)
    assert one[0] is other[0]
    assert one[1] is other[1]
    assert read("- '1'\n- 1\n- \"1\"\n- !!str 1\n- 1.0\n- true\n- 'true'") == [
        ["1", 1, "1", "1", 1.0, True, "true"]
    ]


def test_not_text() -> None:
    for data in (b"\xff\xfe\x00", b"a: \xc3", b"\x80"):
        ((error),) = read(data)
        assert isinstance(error, tuple)
        assert error[0].startswith("not UTF-8 text")
    ((error),) = read(b"a: \x00")
    assert isinstance(error, tuple)


def test_json() -> None:
    value = {"a": [1, 2.5, None, True, "x\n"], "b": {"c": "\u00e4"}}
    assert read(json.dumps(value, indent=2)) == [value]
    assert read(json.dumps(value) + "\n" + json.dumps([1])) == [value, [1]]
    assert read("{a: 1}") == [{"a": 1}]
    (error,) = read('{"a": 1', only_json=True)
    assert isinstance(error, tuple)
    assert error[0].startswith("line 1: not JSON")
    assert read("a: 1", only_json=True)[0] != {"a": 1}
    assert read("[" * 200_000, only_json=True) == [("nested too deep",)]
    assert read("", only_json=True) == []


def test_json_numbers() -> None:
    ((whole),) = read('{"a": ' + "9" * 10_000 + ', "b": NaN, "c": 1e999}')
    assert isinstance(whole, dict)
    assert isinstance(whole["a"], Unreadable)
    assert math.isnan(whole["b"])
    assert math.isinf(whole["c"])


def test_what_kubectl_prints_reads_as_pyyaml_reads_it() -> None:
    value = {
        "apiVersion": "v1",
        "items": [{"metadata": {"name": "on", "labels": {"a": "1", "b": "null", "c": ""}}, "port": 80}] * 3,
        "text": "several\nlines\n",
        "none": None,
        "flag": False,
    }
    assert read(yaml.safe_dump(value)) == [value]
