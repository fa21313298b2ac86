"""Clients of instructions: rows of tokens, targets of completions, packing, cutting."""

from types import SimpleNamespace

import numpy as np
import pytest

import autorank_jax as ar
from autorank_jax.datasets.instructions import Example, Instructions, Message, load_instructions
from autorank_jax.federated.texts import padding_in_batches, text_clients, text_rows
from autorank_jax.models.causal_lm import ByteTokenizer
from tests.models.causal_cases import tiny

BYTES = ByteTokenizer()


def texts(*pairs, **fields):
    examples = tuple(Example((Message("user", q), Message("assistant", a)), raw=True) for q, a in pairs)
    return Instructions(examples, fields, tuple(range(1, len(pairs) + 1)))


def spelled(tokens, targets):
    """Return by text what its ids say, and what its targets ask for."""
    found = []
    for ids, segments, wanted in zip(*map(np.asarray, (tokens.ids, tokens.segments, targets)), strict=True):
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            found.append((BYTES.decode(ids[mine]), BYTES.decode(wanted[mine & (wanted >= 0)])))
    return sorted(found)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_hold_every_text_once(pack):
    pairs = [("ab", "c"), ("d", "efgh"), ("i" * 9, "j"), ("k", "l")]
    tokens, targets, owners, report = text_rows(texts(*pairs), BYTES, length=14, owner=[0, 0, 1, 0], pack=pack)
    expected = sorted((f"<s>{q}{a}</s>", f"{a}</s>") for q, a in pairs)
    assert spelled(tokens, targets) == expected
    sizes = [len(q + a) + 2 for q, a in pairs]
    rows = 3 if pack else 4  # of the first owner 7 + 5 and 4, of the second 12
    assert report[:4] == (4, rows, sum(sizes), sum(len(a) + 1 for _, a in pairs))
    assert report.padding == pytest.approx(1 - sum(sizes) / (rows * 14))
    assert sorted(owners.tolist()) == [0] * (rows - 1) + [1]
    np.testing.assert_array_equal(np.asarray(tokens.ids)[np.asarray(tokens.segments) == 0], 0)


@pytest.mark.parametrize(
    ("pair", "ids", "wanted"),
    [
        (("abc", "e" * 100_000), "<s>abceeee", "eeee"),
        (("a" * 100_000, "bc"), "aaaaabc</s>", "bc</s>"),
        (("a" * 9 + "xyz", "e" * 9), "axyzeeee", "eeee"),
    ],
)
def test_long_texts_are_cut_and_told(pair, ids, wanted):
    tokens, targets, _, report = text_rows(texts(("u", "v"), pair), BYTES, length=8, pack=False)
    assert (ids, wanted) in spelled(tokens, targets)
    assert report.cut == (f"line 2: {sum(map(len, pair)) + 2} tokens cut to 8",)
    assert "line 2" in str(report)


def test_clients_are_values_of_a_field():
    made = text_clients(load_instructions(), BYTES, length=128, clients_by="category")
    assert made.names == ("capitals", "colours", "greetings", "opposites", "plurals", "sums")
    np.testing.assert_array_equal(made.stats.label_counts, np.diag([8, 2, 4, 12, 6, 42]))
    np.testing.assert_array_equal(made.stats.size, made.data.size)
    assert made.report.texts == 74
    first = np.asarray(made.data.order)[: int(made.data.size[0])]
    assert all("capital" in BYTES.decode(ids) for ids in np.asarray(made.data.inputs.ids)[first])


def test_clients_share_values_in_dirichlet_proportions():
    made = text_clients(load_instructions(), BYTES, length=128, clients_by="category", clients=5, alpha=0.5, seed=3)
    counts = np.asarray(made.stats.label_counts)
    assert counts.shape == (5, 6)
    np.testing.assert_array_equal(counts.sum(0), [8, 2, 4, 12, 6, 42])
    assert counts.sum(1).min() >= 1
    assert made.names[4] == "client 4"


def test_lines_that_are_no_texts_of_a_client_are_left_out_and_told():
    pytest.importorskip("jinja2")
    examples = [Example((Message("user", q), Message("assistant", "a"))) for q in ("x", "no", "y" * 40, "z")]
    lines = Instructions(tuple(examples), {"kind": ("b", "a", "a", None)}, (3, 5, 6, 9))
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = (
        "{% if messages[0]['content'] == 'no' %}{{ raise_exception('not this') }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    with pytest.raises(ValueError, match="got none in line 9"):
        text_clients(lines, tokenizer, length=8, clients_by="kind")
    with pytest.raises(ValueError, match=r"got line 5: .* refuses \(not this\)"):
        text_clients(lines.take([0, 1, 2]), tokenizer, length=8, clients_by="kind")
    twice = lines._replace(lines=(1, 2, 3, 1))  # of two files
    with pytest.raises(ValueError, match="got none in line 1; skip=True"):
        text_clients(twice, tokenizer, length=8, clients_by="kind")
    made = text_clients(lines, tokenizer, length=8, clients_by="kind", skip=True)
    assert made.names == ("a", "b")
    assert made.data.size.tolist() == [1, 1]
    assert [line.partition(":")[0] for line in made.report.left_out] == ["line 5", "line 9"]
    assert made.report.cut == ("line 6: 41 tokens cut to 8",)
    assert {*made.report.cut, *made.report.left_out} < set(str(made.report).splitlines())
    odd = text_clients(texts(("a", "b"), kind=("\ud800",)), BYTES, length=8, clients_by="kind")
    assert odd.names == ("?",)
    with pytest.raises(ValueError, match="got line 5: a conversation"):
        text_clients(lines.take([1]), tokenizer, length=8, clients_by="kind", skip=True)


def test_a_share_of_each_client_is_held_out():
    whole, made = (
        text_clients(load_instructions(), BYTES, length=128, clients_by="category", pack=False, hold_out=share)
        for share in (0, 0.25)
    )
    assert whole.held_out is None
    assert whole.data.size.tolist() == [8, 2, 4, 12, 6, 42]
    assert made.held_out.size.tolist() == [2, 0, 1, 3, 1, 10]
    np.testing.assert_array_equal(made.data.size + made.held_out.size, whole.data.size)
    np.testing.assert_array_equal(np.diag(made.stats.label_counts), made.data.size)
    both = spelled(made.data.inputs, made.data.targets) + spelled(made.held_out.inputs, made.held_out.targets)
    assert sorted(both) == spelled(whole.data.inputs, whole.data.targets)


def test_a_realistic_mix_is_hardly_padded():
    rng = np.random.default_rng(0)
    sizes = np.minimum(rng.lognormal(3.5, 0.8, 400).astype(int) + 1, 250)
    mix = texts(*(("q", "a" * size) for size in sizes), kind=tuple(rng.choice(8, 400, p=np.arange(1, 9) / 36).tolist()))
    made = text_clients(mix, BYTES, length=256, clients_by="kind")
    assert made.report.padding < 0.15
    assert text_clients(mix, BYTES, length=256, clients_by="kind", pack=False).report.padding > 0.7


def test_steps_over_uneven_clients_compute_little_padding():
    rng = np.random.default_rng(0)
    kinds = np.repeat(np.arange(21), np.geomspace(8, 1050, 21).astype(int))
    sizes = np.minimum(rng.lognormal(4.2, 0.8, len(kinds)).astype(int) + 1, 250)
    mix = texts(*(("q", "a" * size) for size in sizes), kind=tuple(kinds.tolist()))
    made = text_clients(mix, BYTES, length=256, clients_by="kind")
    assert padding_in_batches(made.report, made.data.size, 4) < 0.15


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clients_by": "topic"}, "one of ['kind'], got 'topic'"),
        ({"clients_by": "kind"}, "got none in line 2"),
        ({"clients_by": "kind", "hold_out": 1.0}, "hold_out in [0, 1), got 1.0"),
    ],
)
def test_odd_requests_are_refused(options, said):
    with pytest.raises(ValueError, match="expected") as caught:
        ar.text_clients(texts(("a", "b"), ("c", "d"), kind=("x", None)), BYTES, **({"length": 8} | options))
    assert said in str(caught.value)
    with pytest.raises(ValueError, match="rows of at least 2 tokens"):
        text_rows(texts(("a", "b")), BYTES, length=1)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (None, "got None, probably of a model without one: load_causal_lm brings its own"),
        (tiny()._replace(tokenizer=ByteTokenizer()), "got a CausalLM, probably the model in place of its .tokenizer"),
        (
            SimpleNamespace(bos_token="<s>", encode=list),
            "probably of another library: load_causal_lm(folder).tokenizer is one",
        ),
    ],
)
def test_what_is_no_tokenizer_is_refused(tokenizer, said):
    with pytest.raises(
        ValueError, match="expected a tokenizer with bos, eos, chat_template and encode, got "
    ) as caught:
        text_clients(load_instructions(), tokenizer, length=64, clients_by="category")
    assert said in str(caught.value)


def test_criteria_count_the_groups_that_are_asked_for():
    lines = texts(*[("q", "r")] * 6, site=tuple("aabbbb"), topic=tuple("xyxxxz"))
    plain = text_clients(lines, BYTES, length=8, clients_by="site")
    assert plain.stats.label_counts.tolist() == [[2, 0], [0, 4]]
    made = text_clients(lines, BYTES, length=8, clients_by="site", groups_by="topic")
    assert made.names == ("a", "b")
    assert made.stats.label_counts.tolist() == [[1, 1, 0], [3, 0, 1]]
    assert made.stats.size.tolist() == plain.stats.size.tolist()
    lacking = texts(*[("q", "r")] * 3, site=("a", None, "b"), topic=(None, None, "x"))
    with pytest.raises(ValueError, match="the field 'site' in every line, got none in line 2;"):
        text_clients(lacking, BYTES, length=8, clients_by="site", groups_by="topic")
    with pytest.raises(ValueError, match="the field 'topic' in every line, got none in line 1;"):
        text_clients(lacking.take([0, 2]), BYTES, length=8, clients_by="site", groups_by="topic")
    kept = text_clients(lacking, BYTES, length=8, clients_by="site", groups_by="topic", skip=True)
    assert kept.report.left_out == ("line 1: no field 'topic'", "line 2: no field 'site'")
    with pytest.raises(
        ValueError, match=r"a field of the lines to take groups by, one of \['site', 'topic'\], got 'x'"
    ):
        text_clients(lines, BYTES, length=8, clients_by="site", groups_by="x")


def test_values_that_only_look_alike_are_refused():
    for kinds, said in (((1, 2, "1"), "1 and '1'"), ((1.0, 2, 1), "1.0 and 1"), ((True, 1, 2), "True and 1")):
        with pytest.raises(ValueError, match=f"expected the field 'kind' of one type, got {said}"):
            text_clients(texts(*[("q", "r")] * 3, kind=kinds), BYTES, length=8, clients_by="kind")


def test_sizes_are_what_is_asked_for():
    lines = texts(("a", "b"), ("a", "bcd"), ("a", "b" * 90), ("a", "b"), kind=tuple("xxyy"))
    sizes = {
        size: text_clients(lines, BYTES, length=10, clients_by="kind", size=size).stats.size.tolist()
        for size in ("rows", "tokens", "examples")
    }
    assert sizes == {"rows": [1, 2], "tokens": [4 + 6, 10 + 4], "examples": [2, 2]}
    held = text_clients(load_instructions(), BYTES, length=128, clients_by="category", hold_out=0.5, size="examples")
    np.testing.assert_array_equal(held.stats.size, np.asarray(held.stats.label_counts).sum(axis=1))
    with pytest.raises(ValueError, match="expected size as one of rows, tokens, examples, got 'texts'"):
        text_clients(lines, BYTES, length=10, clients_by="kind", size="texts")


def test_padding_counts_the_rows_that_fill_batches():
    made = text_clients(
        texts(*[("a", "b")] * 8, kind=tuple("xyyzzzzz")), BYTES, length=5, clients_by="kind", pack=False
    )
    assert made.data.size.tolist() == [1, 2, 5]
    tokens = made.report.tokens / (8 * 5)
    assert made.report.padding == pytest.approx(1 - tokens)
    for size, rows in ((1, 8), (2, 2 + 2 + 6), (4, 4 + 4 + 8)):
        assert padding_in_batches(made.report, made.data.size, size) == pytest.approx(1 - tokens * 8 / rows)
    with pytest.raises(ValueError, match="size: expected the rows of each client, 8 in all, got 40"):
        padding_in_batches(made.report, made.data.size * 5, 2)
    with pytest.raises(ValueError, match="expected batch_size >= 1, got 0"):
        padding_in_batches(made.report, made.data.size, 0)
