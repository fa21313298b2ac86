"""Every public function holds its arguments against its annotations, and what is wrong is said in one line."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.typing import ArrayLike

import autorank_jax as ar
from autorank_jax.interface import check_share, checked, describe
from autorank_jax.types import Array, Key, Server

ROOMS = ("adapters", "aggregators", "datasets", "engine", "evaluation", "experiment", "federated", "models", "ranks")
INNER = ("aggregators.testing", "checkpoint", "evaluation.privacy", "federated.faults", "federated.partition",
         "ranks.budgets", "ranks.controls", "ranks.policies")  # fmt: skip
UNCHECKED = {
    "adapters.classification_loss": "says which of several outputs to choose",
    "adapters.regression_loss": "likewise",
    "adapters.token_loss": "likewise",
    "evaluation.classification_metrics": "likewise",
    "experiment.summarize": "a generator of rows",
    "federated.by_examples": "called by every round, with what it made",
    "federated.equally": "likewise",
    "federated.everyone": "likewise",
    "federated.faults.apply_faults": "likewise",
    "federated.faults.draw_cohort": "likewise",
    "federated.faults.round_keys": "likewise",
    "models.max_pool": "called inside of models",
    "checkpoint.step_folder": "a name alone",
}


def public(room):
    module = importlib.import_module(f"autorank_jax.{room}")
    names = getattr(module, "__all__", None) or [name for name in vars(module) if name[0] != "_"]
    for name in names:
        value = getattr(module, name)
        home = getattr(value, "__module__", "")
        if inspect.isfunction(value) and home.startswith(module.__name__ if room in INNER else "autorank_jax"):
            yield f"{room}.{name}", value
        elif inspect.isclass(value) and room == "models" and "__init__" in vars(value) and not issubclass(value, tuple):
            yield f"{room}.{name}", value.__init__


@pytest.mark.parametrize("room", [*ROOMS, *INNER])
def test_public_functions_check_their_arguments(room):
    unchecked = [
        name
        for name, function in public(room)
        if inspect.signature(function).parameters and not hasattr(function, "__wrapped__") and name not in UNCHECKED
    ]
    assert unchecked == [], "put @checked above them, or say in UNCHECKED why not"


@checked
def sample(  # noqa: PLR0917
    count: int = 1,
    share: float = 0.5,
    flag: bool = False,
    name: Literal["one", "two"] = "one",
    key: Key | None = None,
    values: ArrayLike = 0,
    array: Array | None = None,
    names: Sequence[str] = (),
    ranks: Mapping[str, int] | None = None,
    policy: Callable[[Any, Any], Any] | None = None,
    server: Server | None = None,
    **more: float,
) -> None:
    """Take one of everything."""


RIGHT = [
    {"count": np.int32(3)}, {"count": jnp.int32(3)}, {"share": 1}, {"share": np.float32(1)}, {"share": jnp.ones(())},
    {"flag": np.bool_(True)}, {"name": "two"}, {"key": jax.random.key(0)}, {"key": jax.random.PRNGKey(0)},
    {"values": [[1, 2], [3, 4]]}, {"values": np.ones(3)}, {"array": np.ones(3)}, {"names": ["a"]},
    {"ranks": {"a": 1}}, {"policy": lambda *both: both}, {"policy": max}, {"policy": isinstance}, {"more": 2},
]  # fmt: skip
WRONG = [
    ({"count": "3"}, "expected count as a whole number, got '3', probably text that was not converted: 3"),
    ({"count": 3.0}, "expected count as a whole number, got 3.0, probably a quotient: 3, as // gives it"),
    ({"count": 2.5}, "expected count as a whole number, got 2.5"),
    ({"count": True}, "expected count as a whole number, got True"),
    ({"count": None}, "expected count as a whole number, got None"),
    ({"share": "a"}, "expected share as a number, got 'a'"),
    ({"share": False}, "expected share as a number, got False"),
    ({"share": np.ones(2)}, "expected share as a number, got an array float64[2]"),
    ({"flag": 1}, "expected flag as True or False, got 1"),
    ({"name": "three"}, "expected name as one of one, two, got 'three'"),
    ({"key": 7}, "expected key as a random key, got 7, probably a seed: jax.random.key(7)"),
    ({"values": "12"}, "expected values as an array of numbers, got '12'"),
    ({"values": [1, "2"]}, "expected values as an array of numbers, got [1, '2']"),
    ({"array": [1, 2]}, "expected array as an array or None, got [1, 2]"),
    ({"names": "ab"}, "expected names as a sequence, each text, got 'ab', probably one name alone: ('ab',)"),
    ({"names": ["a", 1]}, "expected names as a sequence, each text, got ['a', 1]"),
    ({"ranks": {"a": 1.5}}, "expected ranks as a dict, each value a whole number or None, got {'a': 1.5}"),
    ({"policy": lambda a: a}, "expected policy as a function of 2 arguments or None, got the function '<lambda>'"),
    ({"policy": ar.policies.uniform}, "probably not called: uniform()"),
    ({"server": object()}, "expected a server or None, got an object; task.server is one"),
    ({"server": Server}, "probably the class itself: Server(...)"),
    ({"more": "x"}, "expected more as a number, got 'x'"),
]


@pytest.mark.parametrize("given", RIGHT)
def test_what_fits_passes(given):
    sample(**given)


@pytest.mark.parametrize(("given", "message"), WRONG)
def test_what_does_not_fit_is_told_in_one_line(given, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        sample(**given)
    assert str(caught.value).startswith(message) or message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_numbers_without_a_value_yet_are_told():
    with pytest.raises(TypeError, match="probably inside jit, vmap or grad: it must be known outside"):
        jax.jit(lambda count: sample(count=count))(3)


def test_arguments_that_are_missing_are_told_by_the_call():
    with pytest.raises(TypeError, match=r"iid\(\) missing 1 required keyword-only argument: 'seed'"):
        ar.partition.iid([0, 1], 2)


@pytest.mark.parametrize(
    ("value", "within", "message"),
    [
        (20, "(0, 1]", "expected share in (0, 1], got 20, probably a percentage"),
        (0, "(0, 1]", "expected share in (0, 1], got 0"),
        (1, "[0, 1)", "expected share in [0, 1), got 1"),
        (float("nan"), "[0, 1]", "expected share in [0, 1], got nan"),
    ],
)
def test_shares(value, within, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        check_share("share", value, within)
    assert str(caught.value) == message


def test_long_values_are_cut():
    assert describe(list(range(50))).endswith("…")
    assert describe([np.ones(2)]) == "a list of 1"
    assert describe(jnp.ones(2)) == "an array float32[2]"


@checked
def train(rate: ArrayLike | Callable[[Array], Array] | None = None) -> None:
    """Take numbers or a function of one number."""


@pytest.mark.parametrize("rate", [None, 0.1, 2, jnp.ones(()), np.ones(3), [0.1, 0.2], lambda number: number])
def test_a_union_with_arrays_keeps_its_other_members(rate):
    train(rate)


@pytest.mark.parametrize("rate", ["0.1", lambda: 0.1, {"rate": 0.1}])
def test_a_union_with_arrays_allows_nothing_else(rate):
    with pytest.raises(TypeError, match="expected rate as an array of numbers or a function of 1 argument or None"):
        train(rate)
