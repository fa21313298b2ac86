"""Clients of instructions: tokens in rows of one length, several texts to a row, completions as targets."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from autorank_jax.datasets.chat import Tokenizer, make_chat
from autorank_jax.datasets.instructions import SKIPPING, Instructions, by_line, few
from autorank_jax.federated.batches import steps_per_epoch
from autorank_jax.federated.data import client_stats, from_parts
from autorank_jax.federated.held_out import held_counts
from autorank_jax.federated.partition import dirichlet
from autorank_jax.interface import check_least, checked
from autorank_jax.types import ClientStats, FederatedData, Tokens


class TextReport(NamedTuple):
    """What became of the texts; `print` shows it."""

    texts: int
    rows: int
    tokens: int  # of all texts, as far as they are kept
    learnt: int  # of them, in completions
    length: int  # of a row
    padding: float  # share of the rows that holds no text
    cut: tuple[str, ...]  # lines longer than a row, and how long they were
    left_out: tuple[str, ...] = ()  # lines that are no texts of a client, and why

    def counts(self) -> str:
        """Return the numbers in one line."""
        return (
            f"{self.texts} texts in {self.rows} rows: {self.tokens} tokens, {self.learnt} learnt, "
            f"{self.padding:.1%} padding"
        )

    def __str__(self) -> str:
        """Return a line of numbers, and one for each text that was cut or left out."""
        return "\n".join([self.counts(), *self.cut, *self.left_out])


class TextClients(NamedTuple):
    """Clients of instructions."""

    data: FederatedData  # inputs are `Tokens`, targets the tokens that follow in completions, else -1
    names: tuple[str, ...]  # of the clients
    stats: ClientStats  # sizes as asked for, label counts in texts of each value of the field
    report: TextReport
    held_out: FederatedData | None = None  # of the same clients, some perhaps empty; None where nothing is held out


class _Text(NamedTuple):
    """Tokens of an example, as far as they fit into a row."""

    ids: np.ndarray
    learnt: np.ndarray  # which of them are
    cut: str = ""  # what to tell of it


class _Row(NamedTuple):
    """Texts that share a row."""

    room: int
    members: tuple[int, ...]


@checked
def text_clients(
    instructions: Instructions,
    tokenizer: Tokenizer,
    *,
    length: int,
    clients_by: str,
    groups_by: str | None = None,
    clients: int | None = None,
    alpha: float = 0.3,
    seed: int = 0,
    template: Literal["own", "plain"] = "own",
    size: Literal["rows", "tokens", "examples"] = "rows",
    pack: bool = True,
    hold_out: float = 0.0,
    skip: bool = False,
) -> TextClients:
    """Make clients of instructions: one for each value of a field, or so many by Dirichlet shares of its values.

    Args:
        instructions: at least one for each client.
        tokenizer: of the model.
        length: tokens per row. A longer text is cut, and told: its completion to what the prompt leaves, but no less
            than half a row, its prompt to its end.
        clients_by: a field of every line, such as "category".
        groups_by: the field whose values the criteria count as classes; `clients_by` where None. Clients that are one
            value each have then one class each, and differ by size and losses alone.
        clients: how many clients share each value in Dirichlet proportions; a client is a value where None.
        alpha: concentration of these proportions; small is uneven.
        seed: of the split.
        template: as in `make_chat`.
        size: what criteria and rank policies take as the size of a client: its rows, which is what training takes, its
            tokens as far as they are kept, or its texts.
        pack: put several texts of a client into one row, where none sees another; one text a row where False.
        hold_out: share of each client's texts, rounded down, that is kept from training, in [0, 1).
        skip: leave lines out that lack a field or that a template refuses, and tell them in the report; they are an
            error where False.

    Returns:
        The clients, in the order of their names. The report is about the texts to train on, and tells all that were cut
        or left out. `ar.probe` adds losses to the statistics:
        `stats._replace(epoch_losses=probed.epoch_losses, epochs=probed.epochs)`.

    Raises:
        ValueError: in one line, for lines without a field or that a template refuses, by number, no lines that are
            left, a length below 2, or another share to hold out.
    """
    _check_length(length)
    if not 0 <= hold_out < 1:
        raise ValueError(f"expected hold_out in [0, 1), got {hold_out}")
    fields = dict.fromkeys((clients_by, groups_by or clients_by))
    for name, what in zip(fields, ("clients", "groups"), strict=False):
        if name not in instructions.fields:
            known = sorted(instructions.fields)
            raise ValueError(f"expected a field of the lines to take {what} by, one of {known}, got {name!r}")
    chat = make_chat(tokenizer, template)
    lacking = {
        n: name for name in reversed(fields) for n, value in enumerate(instructions.fields[name]) if value is None
    }
    owned = [n for n in range(len(instructions.lines)) if n not in lacking]
    if lacking and not skip:
        name = min(lacking.values(), key=list(fields).index)
        lines = [f"line {instructions.lines[n]}" for n in sorted(lacking) if lacking[n] == name]
        raise ValueError(f"expected the field {name!r} in every line, got none in {few(lines)}; {SKIPPING}")
    numbered, refused = _tokenize(instructions.take(owned), chat, length)
    if refused and not (skip and numbered):
        advice = "" if skip else f"; {SKIPPING}"
        raise ValueError(f"expected conversations that the template takes, got {few(refused)}{advice}")
    told = (f"line {instructions.lines[n]}: no field {name!r}" for n, name in lacking.items())
    left_out = by_line(*told, *refused)
    texts = list(numbered.values())
    if not texts:
        raise ValueError(f"expected lines with the field {clients_by!r}, got {few(left_out)}")
    kept_fields = instructions.take([owned[n] for n in numbered]).fields
    (kinds, label), *others = (_kinds(name, kept_fields[name]) for name in fields)
    group_of = others[0][1] if others else label
    owner, names = label, tuple(kinds.tolist())
    if clients is not None:
        owner = np.empty(len(label), np.int64)
        for number, part in enumerate(dirichlet(label, clients, alpha=alpha, seed=seed)):
            owner[part] = number
        names = tuple(f"client {number}" for number in range(clients))

    def rows_of(numbers: np.ndarray) -> tuple[FederatedData, TextReport]:
        rows, targets, owners, report = _rows([texts[n] for n in numbers], owner[numbers], length, pack=pack)
        parts = [np.flatnonzero(owners == number) for number in range(len(names))]
        return from_parts(rows, targets, parts, allow_empty=True), report

    held = _held_out(owner, hold_out, seed)
    kept = np.flatnonzero(~held)
    data, report = rows_of(kept)
    counts = np.zeros((len(names), int(group_of.max()) + 1), np.int32)
    np.add.at(counts, (owner[kept], group_of[kept]), 1)
    sizes = {
        "rows": np.asarray(data.size),
        "tokens": np.bincount(owner[kept], [len(texts[n].ids) for n in kept], len(names)).astype(np.int32),
        "examples": np.bincount(owner[kept], minlength=len(names)).astype(np.int32),
    }
    stats = client_stats(data, groups=np.zeros(len(data.order), np.int32))._replace(
        size=jnp.asarray(sizes[size]), label_counts=jnp.asarray(counts)
    )
    report = report._replace(cut=tuple(text.cut for text in texts if text.cut), left_out=left_out)
    return TextClients(data, names, stats, report, rows_of(np.flatnonzero(held))[0] if held.any() else None)


@checked
def padding_in_batches(report: TextReport, size: Any, batch_size: int) -> float:
    """Return the share of what training computes that holds no text, in [0, 1): of rows, and of rows that fill batches.

    Args:
        report: of `text_clients`.
        size: `(clients,)` rows of each client, such as `clients.data.size`.
        batch_size: rows of a step; the last batch of each client is as large, whatever it has left.

    Raises:
        ValueError: if the sizes are not those of the rows, or for a batch size below 1.
    """
    check_least("batch_size", batch_size)
    if not report.rows or int(np.sum(np.asarray(size))) != report.rows or np.min(size) < 0:
        raise ValueError(f"size: expected the rows of each client, {report.rows} in all, got {np.sum(size)}")
    steps = int(jnp.sum(steps_per_epoch(jnp.asarray(size), batch_size)))
    return 1 - report.tokens / (steps * batch_size * report.length)


def _kinds(name: str, values: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return the different values as text, in order, and which one each value is."""
    known: dict[Any, str] = {}
    for value in values:
        for one in {str(value), value} if isinstance(value, int | float) else {str(value)}:
            if known.setdefault(one, repr(value)) != repr(value):
                raise ValueError(f"expected the field {name!r} of one type, got {known[one]} and {value!r}")
    return np.unique([str(value).encode(errors="replace").decode() for value in values], return_inverse=True)


def _held_out(owner: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return which texts are held out, `(n,)`: of each client a share, rounded down, at random."""
    rng, held = np.random.default_rng(seed), np.zeros(len(owner), bool)
    for number in np.unique(owner):
        mine = rng.permutation(np.flatnonzero(owner == number))
        held[mine[: held_counts(share, len(mine))]] = True
    return held


@checked
def text_rows(
    instructions: Instructions,
    tokenizer: Tokenizer,
    *,
    length: int,
    owner: Sequence[int] | np.ndarray | None = None,
    template: Literal["own", "plain"] = "own",
    pack: bool = True,
) -> tuple[Tokens, np.ndarray, np.ndarray, TextReport]:
    """Turn instructions into rows of tokens, for a test set for instance.

    Args:
        instructions: at least one.
        tokenizer: of the model.
        length: as in `text_clients`, as are `template` and `pack`.
        owner: of each example; only texts of one owner share a row.
        template: of chats.
        pack: several texts to a row.

    Returns:
        Inputs, targets `(rows, length)`, the owner of each row, and what became of the texts.

    Raises:
        ValueError: for lines that a template refuses, by number, or a length below 2.
    """
    _check_length(length)
    owners = np.zeros(len(instructions.examples), np.int64) if owner is None else np.asarray(owner)
    texts, refused = _tokenize(instructions, make_chat(tokenizer, template), length)
    if refused:
        raise ValueError(f"expected conversations that the template takes, got {few(refused)}")
    return _rows(list(texts.values()), owners, length, pack=pack)


def _check_length(length: int) -> None:
    if length < 2:
        raise ValueError(f"expected rows of at least 2 tokens, got length {length}")


def _rows(
    texts: Sequence[_Text], owners: np.ndarray, length: int, *, pack: bool
) -> tuple[Tokens, np.ndarray, np.ndarray, TextReport]:
    """Put texts into rows; only those of one owner share a row."""
    sizes = np.array([len(text.ids) for text in texts])
    rows: list[tuple[int, tuple[int, ...]]] = []
    for each in np.unique(owners):
        mine = np.flatnonzero(owners == each)
        packed = _pack(sizes, mine, length) if pack else [(int(n),) for n in mine]
        rows += [(int(each), members) for members in packed]
    ids, segments = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), np.int32)
    targets = np.full((len(rows), length), -1, np.int32)
    for number, (_, members) in enumerate(rows):
        begin = 0
        for segment, member in enumerate(members, 1):
            text, learnt, _ = texts[member]
            end = begin + len(text)
            ids[number, begin:end], segments[number, begin:end] = text, segment
            targets[number, begin : end - 1] = np.where(learnt[1:], text[1:], -1)
            begin = end
    total = int(sizes.sum())
    report = TextReport(
        len(texts),
        len(rows),
        total,
        int((targets >= 0).sum()),
        length,
        1 - total / max(1, len(rows) * length),
        tuple(text.cut for text in texts if text.cut),
    )
    return Tokens(jnp.asarray(ids), jnp.asarray(segments)), targets, np.array([each for each, _ in rows]), report


def _tokenize(
    instructions: Instructions, chat: Callable[..., tuple[list[int], list[bool]]], length: int
) -> tuple[dict[int, _Text], list[str]]:
    """Return the texts of the examples by their number, cut to the length, and lines that the template refuses."""
    texts, refused = {}, []
    for number, (line, example) in enumerate(zip(instructions.lines, instructions.examples, strict=True)):
        try:
            ids, learnt = chat(example)
        except ValueError as error:
            refused.append(f"line {line}: {error}")
            continue
        cut = ""
        if len(ids) > length:
            cut = f"line {line}: {len(ids)} tokens cut to {length}"
            first = learnt.index(True)  # every example has an answer
            prompt = min(first, max(length - (len(ids) - first), length // 2))
            begin = first - prompt
            ids, learnt = ids[begin : begin + length], learnt[begin : begin + length]
        texts[number] = _Text(np.array(ids, np.int32), np.array(learnt, bool), cut)
    return texts, refused


def _pack(sizes: np.ndarray, members: np.ndarray, length: int) -> list[tuple[int, ...]]:
    """Put texts into rows, the longest first, each where it leaves the least room (best fit decreasing)."""
    open_rows: list[_Row] = []  # by room
    for member in sorted(members.tolist(), key=lambda n: (-sizes[n], n)):
        size = int(sizes[member])
        place = bisect.bisect_left(open_rows, _Row(size, ()))
        row = open_rows.pop(place) if place < len(open_rows) else _Row(length, ())
        bisect.insort(open_rows, _Row(row.room - size, (*row.members, member)))
    return sorted(row.members for row in open_rows)
