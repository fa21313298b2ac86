import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pymcdm.methods import TOPSIS
from pymcdm.normalizations import minmax_normalization, vector_normalization
from pymcdm.weights import critic_weights as pymcdm_critic
from skcriteria.agg.topsis import topsis as skcriteria_topsis
from skcriteria.preprocessing.weighters import critic_weights as skcriteria_critic

from autorank_jax.ranks import mcda
from autorank_jax.ranks.mcda import critic_weights, min_max, topsis

PYMCDM_ADVICE = pytest.mark.filterwarnings("ignore:Alternatives with indices:UserWarning")

SHAPES = [(3, 2), (10, 5), (200, 7)]
NORMALIZATIONS = {"vector": vector_normalization, "minmax": minmax_normalization}

VARIED = np.array([[100, 1, 0.0], [250, 3, 0.7], [180, 4, 1.3], [900, 2, 0.4]], np.float32)
GUARDED = {
    "constant": (np.column_stack([VARIED, np.full(4, 7, np.float32)]), None),
    "constant_up_to_rounding": (np.column_stack([VARIED, 0.1 + 1e-8 * np.arange(4)]).astype(np.float32), None),
    "zero_column": (np.column_stack([VARIED, np.zeros(4, np.float32)]), None),
    "all_equal": (np.tile(VARIED[:1], (4, 1)), None),
    "one_client": (VARIED[:1], None),
    "one_criterion": (VARIED[:, :1], None),
    "perfectly_correlated": (np.column_stack([VARIED[:, 0], 3 * VARIED[:, 0] - 7]), None),
    "masked": (VARIED, np.array([True, False, True, True])),
    "one_present": (VARIED, np.array([False, False, True, False])),
    "nobody_present": (VARIED, np.zeros(4, bool)),
    "masked_nan": (np.where([[False], [True], [False], [False]], np.nan, VARIED), np.array([True, False, True, True])),
}


jit_weights = jax.jit(critic_weights)  # compiled once per shape, where op by op would take a minute
jit_topsis = jax.jit(topsis, static_argnames="normalization")


def problem(shape, seed=0):
    rng = np.random.default_rng(seed)
    matrix = rng.lognormal(size=shape) * 10.0 ** rng.integers(-2, 4, shape[1])
    return matrix, rng.random(shape[1]) < 0.6, rng.dirichlet(np.ones(shape[1]))


def against_oracles(matrix, benefit, weights, *, normalization, tolerance):
    dtype = jnp.result_type(float)
    types = np.where(benefit, 1, -1)
    x = jnp.asarray(matrix, dtype)
    critic = jit_weights(x, benefit=benefit)
    assert critic.dtype == dtype
    np.testing.assert_allclose(critic, pymcdm_critic(matrix * types), rtol=0, atol=tolerance)
    np.testing.assert_allclose(critic, skcriteria_critic(matrix, types), rtol=0, atol=tolerance)

    normalize = NORMALIZATIONS[normalization]
    close = jit_topsis(x, jnp.asarray(weights, dtype), benefit=benefit, normalization=normalization)
    assert close.dtype == dtype
    np.testing.assert_allclose(close, TOPSIS(normalize)(matrix, weights, types), rtol=0, atol=tolerance)
    normalized = np.apply_along_axis(normalize, 0, matrix)
    np.testing.assert_allclose(close, skcriteria_topsis(normalized, types, weights)[3], rtol=0, atol=tolerance)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
@PYMCDM_ADVICE
def test_agrees_with_published_libraries_in_float32(shape, normalization, seed):
    against_oracles(*problem(shape, seed), normalization=normalization, tolerance=1e-5)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("x64")
@PYMCDM_ADVICE
def test_agrees_with_published_libraries_in_float64(shape, normalization, seed):
    against_oracles(*problem(shape, seed), normalization=normalization, tolerance=1e-9)


def test_topsis_weighs_by_critic_unless_told():
    matrix, benefit, _ = problem((10, 5))
    weights = jit_weights(matrix, benefit=benefit)
    scores = jit_topsis(matrix, weights, benefit=benefit)
    np.testing.assert_allclose(jit_topsis(matrix, benefit=benefit), scores, rtol=1e-6)


@pytest.mark.parametrize("column", ["constant", "constant_up_to_rounding", "zero_column"])
def test_constant_column_weighs_nothing_and_changes_no_other(column):
    matrix, _ = GUARDED[column]
    weights = jit_weights(matrix)
    assert weights[-1] == 0
    np.testing.assert_array_equal(weights[:-1], jit_weights(VARIED))
    np.testing.assert_allclose(jit_topsis(matrix), jit_topsis(VARIED), atol=1e-7)
    np.testing.assert_allclose(jit_topsis(matrix, jnp.ones(4)), jit_topsis(VARIED, jnp.ones(3)), atol=1e-7)


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("all_equal", [1 / 3] * 3),
        ("one_client", [1 / 3] * 3),
        ("one_criterion", [1]),
        ("perfectly_correlated", [0.5] * 2),
    ],
)
def test_guarded_weights(case, weights):
    np.testing.assert_allclose(jit_weights(GUARDED[case][0]), weights, rtol=1e-6)


def test_a_single_varying_column_takes_all_the_weight():
    matrix = np.column_stack([np.ones(4), VARIED[:, 0], np.ones(4)])
    np.testing.assert_array_equal(jit_weights(matrix), [0, 1, 0])


def test_perfectly_correlated_columns_share_equally_beside_a_constant_one():
    matrix = np.column_stack([VARIED[:, 0], np.ones(4), 2 * VARIED[:, 0] + 1])
    np.testing.assert_array_equal(jit_weights(matrix), [0.5, 0, 0.5])


@pytest.mark.parametrize("normalization", mcda.NORMALIZATIONS)
@pytest.mark.parametrize("case", ["all_equal", "one_client"])
def test_equal_clients_score_one_half(case, normalization):
    np.testing.assert_array_equal(jit_topsis(GUARDED[case][0], normalization=normalization), 0.5)


@pytest.mark.parametrize("normalization", mcda.NORMALIZATIONS)
@pytest.mark.parametrize("case", ["masked", "masked_nan", "one_present"])
def test_absent_clients_count_nowhere(case, normalization):
    matrix, where = GUARDED[case]
    np.testing.assert_allclose(jit_weights(matrix, where=where), jit_weights(matrix[where]), atol=1e-7)
    scores = jit_topsis(matrix, normalization=normalization, where=where)
    np.testing.assert_allclose(scores[where], jit_topsis(matrix[where], normalization=normalization), atol=1e-7)
    np.testing.assert_array_equal(scores[~where], 0)


@pytest.mark.parametrize("normalization", mcda.NORMALIZATIONS)
@pytest.mark.parametrize("unit", [3e38, 1e-30])
def test_units_at_the_ends_of_float32_do_not_matter(unit, normalization):
    matrix = np.array([[1, 0.2], [-1, 0.9], [0.5, -1]], np.float32)
    np.testing.assert_allclose(jit_weights(matrix * np.float32(unit)), jit_weights(matrix), rtol=1e-5)
    scores = jit_topsis(matrix * np.float32(unit), normalization=normalization)
    np.testing.assert_allclose(scores, jit_topsis(matrix, normalization=normalization), rtol=1e-5)


def test_nobody_present_gives_equal_weights():
    matrix, where = GUARDED["nobody_present"]
    np.testing.assert_allclose(jit_weights(matrix, where=where), 1 / 3, rtol=1e-6)
    np.testing.assert_array_equal(jit_topsis(matrix, where=where), 0)


@jax.jit
@jax.value_and_grad
def everything(x, where):
    clients, criteria = jnp.arange(1.0, 1 + x.shape[0]), jnp.arange(1.0, 1 + x.shape[1])
    by_critic, by_hand = topsis(x, where=where), topsis(x, criteria, normalization="minmax", where=where)
    return jnp.sum(clients * (by_critic + by_hand)) + jnp.sum(criteria * critic_weights(x, where=where))


@pytest.mark.parametrize("case", GUARDED)
def test_values_and_gradients_are_finite_in_guarded_cases(case):
    matrix, where = GUARDED[case]
    value, gradient = everything(jnp.asarray(matrix), np.ones(len(matrix), bool) if where is None else where)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("normalization", mcda.NORMALIZATIONS)
def test_gradient_is_that_of_finite_differences(normalization):
    matrix, benefit, _ = problem((6, 3), seed=4)
    direction = np.random.default_rng(1).normal(size=matrix.shape) * matrix

    def score(x):
        return jnp.sum(jit_topsis(x, benefit=benefit, normalization=normalization) ** 2)

    slope = jnp.sum(jax.jit(jax.grad(score))(jnp.asarray(matrix)) * direction)
    h = 1e-6
    np.testing.assert_allclose(
        slope, (score(matrix + h * direction) - score(matrix - h * direction)) / (2 * h), rtol=1e-6
    )


def test_jit_and_vmap_equal_the_separate_calls():
    matrices = jnp.stack([jnp.asarray(problem((5, 3), seed)[0], jnp.float32) for seed in range(4)])
    masks = jnp.arange(20).reshape(4, 5) % 7 != 3
    scores = jax.jit(jax.vmap(lambda x, where: jit_topsis(x, where=where)))(matrices, masks)
    separate = [jit_topsis(x, where=where) for x, where in zip(matrices, masks, strict=True)]
    np.testing.assert_allclose(scores, jnp.stack(separate), atol=1e-6)


SMALL_SHAPES = st.sampled_from([(1, 2), (3, 1), (6, 4)])  # few, because each is compiled

tables = hnp.arrays(
    np.float32,
    SMALL_SHAPES,
    elements=st.one_of(
        st.integers(-3, 3).map(float), st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
    ),
)


@settings(deadline=None, max_examples=100)
@given(tables, st.sampled_from(mcda.NORMALIZATIONS), st.randoms(use_true_random=False))
def test_total_on_finite_input(matrix, normalization, random):
    where = np.array([random.random() < 0.8 for _ in range(matrix.shape[0])])
    benefit = np.array([random.random() < 0.5 for _ in range(matrix.shape[1])])
    weights = jit_weights(matrix, benefit=benefit, where=where)
    assert bool((weights >= 0).all())
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
    scores = jit_topsis(matrix, benefit=benefit, normalization=normalization, where=where)
    assert bool(((scores >= 0) & (scores <= 1)).all())


small_tables = hnp.arrays(np.float32, SMALL_SHAPES, elements=st.integers(-50, 50).map(float))


@settings(deadline=None, max_examples=100)
@given(small_tables, st.sampled_from(mcda.NORMALIZATIONS), st.randoms(use_true_random=False))
def test_permutations_permute_and_units_do_not_matter(matrix, normalization, random):
    rows = random.sample(range(matrix.shape[0]), matrix.shape[0])
    columns = random.sample(range(matrix.shape[1]), matrix.shape[1])
    units = np.array([10.0 ** random.randint(-3, 3) for _ in columns], np.float32)
    other = (matrix * units[None, :])[rows][:, columns]
    np.testing.assert_allclose(jit_weights(other), jit_weights(matrix)[np.array(columns)], atol=2e-5)
    np.testing.assert_allclose(
        jit_topsis(other, normalization=normalization),
        jit_topsis(matrix, normalization=normalization)[np.array(rows)],
        atol=2e-5,
    )


def test_min_max_scales_the_present():
    z, varying = min_max(np.array([[9.0], [1.0], [3.0], [2.0]], np.float32), where=np.array([False, True, True, True]))
    np.testing.assert_allclose(z[1:, 0], [0, 1, 0.5], atol=1e-6)
    assert bool(varying[0])


@pytest.mark.parametrize("call", [critic_weights, topsis])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"matrix": np.ones(3)}, r"matrix: expected shape \(clients, criteria\).*got \(3,\): a single criterion"),
        ({"matrix": np.ones((0, 3))}, r"matrix: expected .*at least one"),
        ({"matrix": VARIED, "benefit": [True, False]}, r"benefit: expected shape \(3,\), got \(2,\)"),
        ({"matrix": VARIED, "benefit": [1, -1, 1]}, r"benefit: expected booleans, got int32: `benefit > 0` makes"),
        ({"matrix": VARIED, "where": np.ones(3, bool)}, r"where: expected shape \(4,\), got \(3,\)"),
        ({"matrix": VARIED, "where": np.ones(4)}, r"where: expected booleans, got float32"),
        ({"matrix": np.where(np.eye(4, 3), np.nan, VARIED)}, "matrix: expected finite numbers of every client"),
    ],
)
def test_static_mistakes_are_named(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)


def test_topsis_names_unknown_normalization_and_foreign_weights():
    with pytest.raises(ValueError, match=r"out of vector, minmax, got 'sum'"):
        topsis(VARIED, normalization="sum")
    with pytest.raises(ValueError, match=r"weights: expected shape \(3,\), got \(4,\)"):
        topsis(VARIED, jnp.ones(4))


@pytest.mark.parametrize("make", [list, np.array])
def test_whole_numbers_beyond_32_bits_do_not_wrap(make):
    rows = [[2**40, 1], [2**41, 3], [3 * 2**40, 2]]
    narrow = [[row[0] / 2**40, row[1]] for row in rows]
    weights = [0.5, 0.5]
    np.testing.assert_allclose(mcda.topsis(make(rows), weights), mcda.topsis(narrow, weights), rtol=1e-6)
