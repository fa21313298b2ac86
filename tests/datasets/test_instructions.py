"""Instructions from JSON lines: every form, every odd line by its number, chat templates, what is learnt."""

import json

import pytest

from autorank_jax.datasets.base import DatasetError
from autorank_jax.datasets.chat import make_chat
from autorank_jax.datasets.instructions import Example, Message, load_instructions, split_instructions
from autorank_jax.models.causal_lm import ByteTokenizer

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TURNS = (Message("user", "Ä?"), Message("assistant", "是"), Message("user", "b"), Message("assistant", "c d"))


def write(folder, *lines):
    file = folder / "lines.jsonl"
    file.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return file


SYSTEM = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"))


def user(question, answer):
    return Example((Message("user", question), Message("assistant", answer)))


@pytest.mark.parametrize(
    ("line", "example"),
    [
        ({"instruction": "a", "output": "b"}, user("a", "b")),
        ({"instruction": "a", "input": "", "output": "b"}, user("a", "b")),
        ({"instruction": "a", "input": "i", "output": "b"}, user("a\n\ni", "b")),
        ({"instruction": "a", "context": "i", "response": "b"}, user("a\n\ni", "b")),
        ({"prompt": "a", "completion": " b"}, user("a", " b")._replace(raw=True)),
        ({"messages": [m._asdict() for m in TURNS]}, Example(TURNS)),
        ({"prompt": [TURNS[0]._asdict()], "completion": [TURNS[1]._asdict()]}, Example(TURNS[:2], asked=1)),
        ({"prompt": [m._asdict() for m in TURNS[:3]], "completion": [TURNS[3]._asdict()]}, Example(TURNS, asked=3)),
        ({"instruction": "a", "input": " ", "output": "b"}, user("a", "b")),
        (
            {"instruction": "a", "system": "s", "output": "b"},
            Example((Message("system", "s"), *user("a", "b").messages)),
        ),
        ({"instruction": "a", "system": " ", "output": "b"}, user("a", "b")),
        (
            {"messages": [m._asdict() for m in user("a", "b").messages], "system": "s"},
            Example((Message("system", "s"), *user("a", "b").messages)),
        ),
        (
            {"prompt": [TURNS[0]._asdict()], "completion": [TURNS[1]._asdict()], "system": "s"},
            Example((Message("system", "s"), *TURNS[:2]), asked=2),
        ),
        ({"messages": [m._asdict() for m in TURNS], "system": None}, Example(TURNS)),
        ({"prompt": "a", "completion": "b", "system": "linux"}, user("a", "b")._replace(raw=True)),
        ({"instruction": "a", "output": "b", "messages": None, "response": None}, user("a", "b")),
        ({"instruction": "a", "input": None, "output": "b"}, user("a", "b")),
        ({"instruction": "नमस्ते", "output": "👋🏽 สวัสดี"}, user("नमस्ते", "👋🏽 สวัสดี")),
        ({"instruction": "x" * 500_000, "output": "b"}, user("x" * 500_000, "b")),
    ],
)
def test_every_form_is_read_and_nothing_is_lost(tmp_path, line, example):
    found = load_instructions(write(tmp_path, {"instruction": "q", "output": "r"}, line | {"category": 7, "id": "z"}))
    assert found.examples == (user("q", "r"), example)
    assert {name: found.fields[name] for name in ("category", "id")} == {"category": (None, 7), "id": (None, "z")}
    assert ("system" in found.fields) == ("system" in line)  # by which clients can be told apart
    assert found.lines == (1, 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"instruction": "a", ', "no JSON"),
        (b'{"instruction": "\xff", "output": "b"}', "no UTF-8"),
        (["a", "b"], "a list in place of an object"),
        ({"question": "a", "answer": "b"}, "fields ['answer', 'question'] in place of"),
        ({"instruction": "a", "output": None}, "output of type NoneType"),
        ({"instruction": "a", "output": " "}, "output without text"),
        ({"instruction": "a", "input": 0, "output": "b"}, "input of type int"),
        ({"instruction": "a", "input": [], "output": "b"}, "input of type list"),
        (b'{"instruction": "a\\ud800", "output": "b"}', "instruction with half a surrogate pair"),
        ({"prompt": [m._asdict() for m in TURNS], "completion": []}, "completion without messages"),
        ({"instruction": "a", "output": "b", "system": 3}, "system of type int"),
        ({"messages": [m._asdict() for m in SYSTEM], "system": "other"}, "a system field beside another system"),
        ({"messages": "hello"}, "messages that are no list"),
        ({"messages": []}, "do not end with the assistant's answer"),
        ({"messages": [{"role": "user", "content": "a"}]}, "do not end with the assistant's answer"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]}, "['tool_calls']"),
        (b"[" * 100_000, "nested too deeply"),
        ({"instruction": "a", "output": "b", "messages": []}, "fields of two forms, instruction/output and messages"),
    ],
)
def test_odd_lines_are_named_by_number(tmp_path, line, said):
    file = write(tmp_path, {"instruction": "a", "output": "b"}, b"", line, {"prompt": "c", "completion": "d"})
    with pytest.raises(DatasetError, match="got line 3: ") as caught:
        load_instructions(file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    found = load_instructions(file, skip=True)
    assert found.lines == (1, 4)
    assert [problem.partition(":")[0] for problem in found.problems] == ["line 2", "line 3"]


def test_files_without_examples_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="got none in 2 lines"):
        load_instructions(write(tmp_path, b"", b" ", b""))
    with pytest.raises(DatasetError, match="expected a file of JSON lines, got none at"):
        load_instructions(tmp_path / "nowhere.jsonl")


def test_files_of_another_kind_are_told(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    file = tmp_path / "one.jsonl"
    file.write_bytes("\n".join(map(json.dumps, rows)).encode("utf-16"))
    with pytest.raises(DatasetError, match=r"expected UTF-8 in .*, got UTF-16"):
        load_instructions(file, skip=True)
    by_line = "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]"
    for text in (json.dumps(rows), json.dumps(rows, indent=1), json.dumps(rows[0], indent=1), by_line):
        file.write_text(text, encoding="utf-8-sig")
        for skip in (True, False):
            if skip and text == by_line:  # its last line is one
                continue
            with pytest.raises(DatasetError, match="probably one JSON text over all lines"):
                load_instructions(file, skip=skip)


def test_the_embedded_set_has_all_forms_and_uneven_kinds():
    found = load_instructions()
    assert len(found.examples) == 74
    assert len(set(found.examples)) == 74
    counts = sorted(found.fields["category"].count(kind) for kind in set(found.fields["category"]))
    assert counts == [2, 4, 6, 8, 12, 42]
    train, test = split_instructions(found, test=0.2, seed=1)
    assert (len(train.examples), len(test.examples)) == (59, 15)
    assert sorted(train.lines + test.lines) == list(found.lines)


def chat(example, template="own", source=None):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = source
    ids, learnt = make_chat(tokenizer, template)(example)
    return tokenizer.decode(ids), tokenizer.decode([i for i, own in zip(ids, learnt, strict=True) if own])


def test_only_answers_are_learnt():
    pytest.importorskip("jinja2")
    plain = "<s>User: Ä?\nAssistant: 是</s>\nUser: b\nAssistant: c d</s>"
    assert chat(Example(TURNS)) == (plain, "是</s>c d</s>")
    templated = "<s>user\nÄ?</s>\n<s>assistant\n是</s>\n<s>user\nb</s>\n<s>assistant\nc d</s>\n"
    assert chat(Example(TURNS), source=CHATML) == (templated, "是</s>\nc d</s>\n")
    assert chat(Example(TURNS), "plain", CHATML) == (plain, "是</s>c d</s>")
    assert chat(user("a ", " b")._replace(raw=True), source=CHATML) == ("<s>a  b</s>", " b</s>")
    assert chat(Example(TURNS, asked=2)) == (plain, "c d</s>")  # earlier answers are part of the prompt
    assert chat(Example(TURNS, asked=2), source=CHATML) == (templated, "c d</s>\n")


def test_templates_know_what_those_of_transformers_know():
    pytest.importorskip("jinja2")
    marked = CHATML.replace("%}{{ '<s>' +", "%}{% generation %}{{ '<s>' +", 1)
    marked = marked.replace("{% endfor", "{% endgeneration %}{% endfor", 1)
    assert marked.count("generation %}") == 2
    assert chat(Example(TURNS), source=marked) == chat(Example(TURNS), source=CHATML)
    source = "{{ pad_token }}{{ {'a': '<ä>'} | tojson }}{{ messages[-1]['content'] if not add_generation_prompt }}"
    tokenizer = ByteTokenizer()
    tokenizer.chat_template, tokenizer.special = source, {"pad_token": "[pad]"}
    assert tokenizer.decode(make_chat(tokenizer)(Example(TURNS[:2]))[0]) == '[pad]{"a": "<ä>"}是'


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no system') }}", "refuses (no system)"),
        ("{{ messages|length }}", "whose earlier turns the chat template changes"),
        ("{{ messages[0]['role'] + 1 }}", "refuses"),
        ("{{ 1 / 0 }}", "refuses"),
        ("{{ 'a'.index('b') }}", "refuses"),
        ("{{ 2.0 ** 10000 }}", "refuses"),
        ("nothing of it", "leaves nothing"),
        ("{% for %}", "expected a chat template in Jinja"),
        ("{{ messages.__class__.__mro__ }}", "refuses"),
    ],
)
def test_templates_that_cannot_be_used_are_told(source, said):
    pytest.importorskip("jinja2")
    with pytest.raises(ValueError, match="chat template") as caught:
        chat(Example(TURNS), source=source)
    assert said in str(caught.value)
