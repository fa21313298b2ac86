"""Two ways from the clients' factors to the SVD of their mean product, against cohort · rank over min(d_in, d_out).

- dense: add up `w_k A_k B_k` client by client, one thin SVD of the `d_in × d_out` sum: what the SVD rules do
- factored: write `w_k A_k` and `B_k` side by side, QR of both stacks, SVD of the small core `R_A R_Bᵀ`

Both are one compiled program from the stacked clients to the `rank` leading positions; the time to form the sum (or the
stacks) is measured apart too. `carried` is what a round has to hold while clients finish: a matrix whatever the cohort,
or stacks that grow with it. Both must give the same truncated product to 1e-4 before they are timed. The rows of
4096 × 4096 are those of 768 × 768 times (4096 / 768)³, by which both ways grow, and say so; `--largest` measures one.

Command:  python -m benchmarks.study.svd_border --json benchmarks/study/results/svds.json
          python -m benchmarks.study.svd_border --report    (runs nothing: prints the published rows)
Hardware: two CPU cores
Time and numbers to expect: see benchmarks/study/rules.md
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from benchmarks import harness, script
from benchmarks.study.options import RESULTS, make_parser

RANK = 16
SHARES = (0.125, 0.25, 0.5, 1.0, 2.0)
LAYERS = ((200, 200), (784, 200), (768, 768))
LARGE = (4096, 4096)
COLUMNS = ("layer", "cohort", "columns_share", "dense_seconds", "factored_seconds", "ratio", "dense_sum_seconds",
           "factored_sum_seconds", "dense_carried_mb", "factored_carried_mb", "estimated")  # fmt: skip
Factors = tuple[Array, Array]
Clients = tuple[Array, Array, Array]  # lora_a (cohort, d_in, r), lora_b (cohort, r, d_out), weights (cohort,)


def add_products(clients: Clients) -> Array:
    """Add up weighted products one by one, as a lane does."""
    a, b, weight = clients

    def add(k: Array, total: Array) -> Array:
        return total + (a[k] * weight[k]) @ b[k]

    return lax.fori_loop(0, a.shape[0], add, jnp.zeros((a.shape[1], b.shape[2])))


def dense(clients: Clients) -> Factors:
    """Return the leading positions by the SVD of the sum."""
    u, s, vt = jnp.linalg.svd(add_products(clients), full_matrices=False)
    return u[:, :RANK], s[:RANK, None] * vt[:RANK]


def stack(clients: Clients) -> Factors:
    """Write factors side by side, one client after the other: `(d_in, columns)` and `(d_out, columns)`."""
    a, b, weight = clients
    cohort, d_in, rank = a.shape

    def write(k: Array, stacks: Factors) -> Factors:
        left, right = stacks
        left = lax.dynamic_update_slice(left, a[k] * weight[k], (jnp.zeros((), k.dtype), k * rank))
        return left, lax.dynamic_update_slice(right, b[k].T, (jnp.zeros((), k.dtype), k * rank))

    empty = jnp.zeros((d_in, cohort * rank)), jnp.zeros((b.shape[2], cohort * rank))
    return lax.fori_loop(0, cohort, write, empty)


def factored(clients: Clients) -> Factors:
    """Return the leading positions by the QR of both stacks and the SVD of their core."""
    left, right = stack(clients)
    q_a, r_a = jnp.linalg.qr(left)
    q_b, r_b = jnp.linalg.qr(right)
    u, s, vt = jnp.linalg.svd(r_a @ r_b.T, full_matrices=False)
    return q_a @ u[:, :RANK], s[:RANK, None] * (vt[:RANK] @ q_b.T)


def draw(layer: tuple[int, int], cohort: int) -> Clients:
    """Draw clients whose products share a spectrum that falls, as trained ones do."""
    rng = np.random.default_rng(0)
    (d_in, d_out), fall = layer, 0.8 ** np.arange(RANK)
    common_a, common_b = rng.normal(size=(d_in, RANK)), rng.normal(size=(RANK, d_out))
    a = (common_a + 0.3 * rng.normal(size=(cohort, d_in, RANK))) * fall
    b = common_b + 0.3 * rng.normal(size=(cohort, RANK, d_out))
    weight = rng.uniform(0.5, 1.5, cohort)
    return tuple(jnp.asarray(x, jnp.float32) for x in (a, b, weight / weight.sum()))


def measure(layer: tuple[int, int], share: float, repeats: int) -> harness.Row:
    """Let both ways, and the sums alone, take turns on one layer and cohort."""
    cohort = max(1, round(share * min(layer) / RANK))
    clients = draw(layer, cohort)
    ways: dict[str, Callable[[Clients], Any]] = {
        "dense": dense, "factored": factored, "dense_sum": add_products, "factored_sum": stack
    }  # fmt: skip
    programs = {name: jax.jit(way).lower(clients).compile() for name, way in ways.items()}
    (u, v), (p, q) = programs["dense"](clients), programs["factored"](clients)
    gap = float(jnp.linalg.norm(u @ v - p @ q) / jnp.linalg.norm(u @ v))
    if not gap < 1e-4:
        raise AssertionError(f"{layer}, {cohort} clients: products differ by {gap:.1e}")
    turns = harness.alternate({name: lambda p=program: p(clients) for name, program in programs.items()}, repeats)
    seconds = {name: harness.summary(times)["median"] for name, times in turns.items()}
    return {
        "layer": f"{layer[0]} × {layer[1]}",
        "cohort": cohort,
        "columns_share": cohort * RANK / min(layer),
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio": seconds["dense"] / seconds["factored"],
        "dense_carried_mb": 4e-6 * layer[0] * layer[1],
        "factored_carried_mb": 4e-6 * cohort * RANK * sum(layer),
        "gap": gap,
        "estimated": False,
    }


def estimate(rows: list[harness.Row]) -> list[harness.Row]:
    """Scale the rows of 768 × 768 to the large layer, at equal shares of columns."""
    grow = LARGE[0] / 768
    return [
        row
        | {name: row[name] * grow**3 for name in row if name.endswith("_seconds")}
        | {name: row[name] * grow**2 for name in row if name.endswith("_mb")}
        | {"layer": f"{LARGE[0]} × {LARGE[1]}", "cohort": round(row["cohort"] * grow), "estimated": True}
        for row in rows
        if row["layer"] == "768 × 768"
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--largest", action="store_true", help="measure one cohort of 4096 × 4096 too: minutes")
    parser.add_argument("--quick", action="store_true", help="two small layers, two cohorts, one turn")
    parser.add_argument("--report", action="store_true", help="measure nothing: show what is published")
    parser.add_argument("--json", type=Path, help="file to write to; what else is in it stays")
    options = parser.parse_args(arguments)
    if options.report:
        print(harness.markdown_table(script.read(RESULTS / "svds.json")["border"]["rows"], COLUMNS))
        return
    layers, shares, repeats = (LAYERS, SHARES, options.repeats)
    if options.quick:
        layers, shares, repeats = ((64, 48), (96, 64)), (0.5, 1.0), 1
    rows = []
    for layer in layers:
        for share in shares:
            rows.append(measure(layer, share, repeats))
            print(f"{rows[-1]['layer']}, {rows[-1]['cohort']} clients: {rows[-1]['ratio']:.2f}", flush=True)
    rows += estimate(rows)
    if options.largest:
        rows.append(measure(LARGE, SHARES[0], 1))
    print(harness.markdown_table(rows, COLUMNS))
    border = {"rows": rows, "versions": harness.versions(), "device": harness.device()}
    harness.write_json(options.json, script.read(options.json) | {"border": border})


if __name__ == "__main__":
    main()
