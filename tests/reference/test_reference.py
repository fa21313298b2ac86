"""The oracle itself: gradients by finite differences, rules by cases worked out by hand."""

import numpy as np
import pytest

from tests import reference
from tests.reference import aggregation, products, server_optimizers, training
from tests.reference.aggregation import rbla, zero_pad

PATH = "l"


def random_model(seed, dims, shape):
    """Parameters, kernels and scales of two adapted layers with biases, and six examples."""
    rng = np.random.default_rng(seed)
    p, kernels = {}, {}
    for path, (d_in, d_out) in dims.items():
        kernels[path] = rng.normal(size=(d_in, d_out))
        p["a", path], p["b", path] = rng.normal(size=(d_in, 2)), rng.normal(size=(2, d_out))
        p["dense", f"{path}/bias"] = rng.normal(size=d_out)
    return (p, kernels, dict.fromkeys(dims, 1.7)), rng.normal(size=(6, *shape)), rng.integers(0, 3, 6)


def assert_gradient(network, model, x, y):
    _, grads = network(model, x, y)
    p = model[0]
    assert grads.keys() == p.keys()
    for key, value in p.items():
        numeric = np.zeros_like(value)
        for index in np.ndindex(value.shape):
            kept, losses = value[index], []
            for step in (1e-6, -1e-6):
                value[index] = kept + step
                losses.append(network(model, x, y)[0])
            value[index] = kept
            numeric[index] = (losses[0] - losses[1]) / 2e-6
        np.testing.assert_allclose(grads[key], numeric, atol=2e-8, err_msg=str(key))


@pytest.mark.parametrize("whole", [False, True])
def test_mlp_gradient(whole):
    model, x, y = random_model(0, {"l1": (5, 7), "l2": (7, 4), "l3": (4, 3)}, (5,))
    if whole:
        model[0]["dense", "l2/kernel"] = model[1].pop("l2")
    assert_gradient(training.mlp(["l1", "l2", "l3"]), model, x, y)


def test_convolution_gradient():
    model, x, y = random_model(1, {"conv": (18, 4), "head": (4, 3)}, (4, 5, 2))
    assert_gradient(training.conv_network("conv", "head", 3), model, x, y)


def test_patches_are_a_same_convolution():
    rng = np.random.default_rng(2)
    x, kernel = rng.normal(size=(1, 4, 4, 2)), rng.normal(size=(3, 3, 2, 5))
    got = training.patches(x, 3) @ kernel.reshape(-1, 5)
    for i, j in np.ndindex(4, 4):
        want = np.zeros(5)
        for di, dj in np.ndindex(3, 3):
            if 0 <= i + di - 1 < 4 and 0 <= j + dj - 1 < 4:
                want += x[0, i + di - 1, j + dj - 1] @ kernel[di, dj]
        np.testing.assert_allclose(got[0, i, j], want)


def test_cross_entropy_by_hand():
    loss, grad = training.softmax_cross_entropy(np.log([[1.0, 3.0], [1.0, 1.0]]), np.array([0, 1]))
    assert loss == pytest.approx((np.log(4) + np.log(2)) / 2)
    np.testing.assert_allclose(grad, [[-0.375, 0.375], [0.25, -0.25]])


def test_optimizers_by_hand():
    momentum, slots = training.sgd(0.1, 0.5), {}
    assert [momentum(t, 1.0, 0.0, slots) for t in (1, 2, 3)] == pytest.approx([-0.1, -0.15, -0.175])
    adamw, slots = training.adamw(0.1, 0.01), {}
    assert adamw(1, 2.0, 3.0, slots) == pytest.approx(-0.1 * (1.0 + 0.03), abs=1e-8)
    m, v = (0.9 * 0.2 + 0.1) / (1 - 0.81), (0.999 * 0.004 + 0.001) / (1 - 0.999**2)
    assert adamw(2, 1.0, 3.0, slots) == pytest.approx(-0.1 * (m / (v**0.5 + 1e-8) + 0.03))


def scalar_case(a, b, weight=1.0):
    """A client of one 1×1 layer with its factors given position by position."""
    a, b = np.array([a], float), np.array(b, float)[:, None]
    return {"adapters": {PATH: (a, b)}, "dense": {"c": np.array(weight)}, "weight": weight, "ranks": {PATH: a.shape[1]}}


def scalar_server(a, b):
    return {**scalar_case(a, b), "kernels": {PATH: np.array([[100.0]])}, "dense": {"c": np.array(7.0)}}


SERVER = scalar_server([1, 1, 5], [2, 2, 3])
CLIENTS = [scalar_case([2], [4], weight=1.0), scalar_case([6, 8], [8, 2], weight=3.0)]


def factors(server):
    a, b = server["adapters"][PATH]
    return a[0].tolist(), b[:, 0].tolist()


def product(server):
    a, b = server["adapters"][PATH]
    return (a @ b).item()


def test_zero_pad_and_rbla_by_hand():
    padded, averaged = zero_pad(SERVER, CLIENTS)[0], rbla(SERVER, CLIENTS)[0]
    assert factors(padded) == ([5, 6, 5], [7, 1.5, 3])
    assert factors(averaged) == ([5, 8, 5], [7, 2, 3])
    assert padded["dense"]["c"] == averaged["dense"]["c"] == 2.5


@pytest.mark.parametrize("name", sorted(reference.RULES))
def test_nobody_changes_nothing_and_arguments_stay(name):
    server = scalar_server([1, 1, 5], [2, 2, 3])
    new, _ = reference.RULES[name](server, [], state={"round": 0} if name == "rolora" else None)
    assert (factors(new), new["kernels"][PATH], new["dense"]["c"]) == (factors(SERVER), 100, 7)
    clients = [{**c, "id": i} for i, c in enumerate(CLIENTS)]
    reference.RULES[name](server, clients)
    assert (factors(server), server["kernels"][PATH], server["dense"]["c"]) == (factors(SERVER), 100, 7)


def test_hetlora_by_hand():
    new, _ = reference.RULES["hetlora"](SERVER, CLIENTS)  # norms 8 and 64, weights 1/9 and 8/9
    np.testing.assert_allclose(factors(new), ([50 / 9, 64 / 9, 5], [68 / 9, 16 / 9, 3]))
    assert new["dense"]["c"] == 2.5
    new, _ = reference.RULES["hetlora"](SERVER, CLIENTS, dense="norm")
    np.testing.assert_allclose(new["dense"]["c"], 25 / 9)


def test_hetlora_norms_per_model_and_layer():
    server = {"adapters": {p: (np.ones((1, 1)), np.ones((1, 1))) for p in "xy"}, "dense": {}, "kernels": {}}
    clients = []
    for products_ in ((3.0, 4.0), (0.0, 5.0)):
        adapters = {p: (np.ones((1, 1)), np.full((1, 1), v)) for p, v in zip("xy", products_, strict=True)}
        clients.append({"adapters": adapters, "dense": {}, "weight": 1.0, "ranks": {"x": 1, "y": 1}})
    per_model, per_layer = (aggregation.hetlora(server, clients, per=per)[0] for per in ("model", "layer"))
    assert [per_model["adapters"][p][1].item() for p in "xy"] == [1.5, 4.5]
    np.testing.assert_allclose([per_layer["adapters"][p][1].item() for p in "xy"], [3, 41 / 9])


def test_hetlora_without_norms():
    still = [scalar_case([2], [0], weight=1.0), scalar_case([6, 8], [0, 0], weight=3.0)]
    assert factors(aggregation.hetlora(SERVER, still)[0]) == ([5, 6, 5], [0, 0, 3])  # sizes stand in
    # a client of norm 0 is as good as absent: position 1 keeps the server's value
    assert factors(aggregation.hetlora(SERVER, [CLIENTS[0], still[1]])[0]) == ([2, 1, 5], [4, 2, 3])


def test_mean_and_owner_products_by_hand():
    assert products.mean_product(SERVER, CLIENTS, PATH) == (8 + 3 * 64) / 4
    first, second, third = (8 + 3 * 48) / 4, 16, 15
    assert products.owner_product(SERVER, CLIENTS, PATH) == first + second + third
    assert products.owner_product(SERVER, CLIENTS, PATH, unowned="zero") == first + second
    assert products.owner_product(SERVER, CLIENTS, PATH, levels=(1, 3)) == first + 2 + 15
    assert products.owner_product(SERVER, CLIENTS, PATH, levels=(2, 3)) == 64 + 15
    assert products.owner_product(SERVER, CLIENTS, PATH, levels=(1, 2)) == first + second + third


@pytest.mark.parametrize("sigma", ["left", "right", "both"])
def test_svd_rules_by_hand(sigma):
    for rule, want in (("flexlora", 50), ("raflora", 69), ("florist", 50)):
        new, _ = reference.RULES[rule](SERVER, CLIENTS, sigma=sigma)
        a, b = factors(new)
        assert product(new) == pytest.approx(want)
        assert (a[1:], b[1:]) == ([1, 5], [0, 0])
        assert abs(a[0]) == pytest.approx({"left": want, "right": 1, "both": want**0.5}[sigma])
        assert new["kernels"][PATH] == 100


def test_svd_factors_are_nested_best_approximations():
    rng = np.random.default_rng(3)
    target, start = rng.normal(size=(5, 4)), (np.ones((5, 4)), np.ones((4, 4)))
    values = np.linalg.svd(target, compute_uv=False)
    for r in range(5):
        a, b = products.svd_factors(target, start, keep=r)
        np.testing.assert_allclose(np.linalg.norm(target - a @ b), np.linalg.norm(values[r:]), atol=1e-12)
        np.testing.assert_array_equal(a[:, r:], 1)
        np.testing.assert_array_equal(b[r:], 0)


@pytest.mark.parametrize(("tau", "p"), [(0.1, 1), (0.9, 1), (0.95, 2), (0.99, 2), (0.999, 3), (1.0, 3)])
def test_energy_rank_by_hand(tau, p):
    assert products.energy_rank([3.0, 0.9**0.5, 0.1**0.5, 0.0], tau) == p


def test_merging_rules_by_hand():
    for rule, want in (("flora", 150), ("owner_merge", 169)):
        new, _ = reference.RULES[rule](SERVER, CLIENTS, state={"lora_a": {PATH: np.array([[9.0, 8, 7]])}})
        assert new["kernels"][PATH] == want
        assert factors(new) == ([9, 8, 7], [0, 0, 0])
    new, _ = reference.RULES["fedex_lora"](SERVER, CLIENTS)
    assert factors(new) == ([5, 6, 5], [7, 1.5, 3])
    assert new["kernels"][PATH] + product(new) == 150
    new, _ = reference.RULES["fedex_lora"](SERVER, CLIENTS, owners=True)
    assert new["kernels"][PATH] + product(new) == 150


def test_one_factor_rules_by_hand():
    new, _ = reference.RULES["ffa_lora"](SERVER, CLIENTS)
    assert factors(new) == ([1, 1, 5], [7, 1.5, 3])
    new, _ = reference.RULES["ffa_lora"](SERVER, CLIENTS, owners=True)
    assert factors(new) == ([1, 1, 5], [7, 2, 3])
    new, state = reference.RULES["rolora"](SERVER, CLIENTS)
    assert factors(new) == ([1, 1, 5], [7, 1.5, 3])
    assert aggregation.rolora_trains(None) == (False, True)
    assert aggregation.rolora_trains(state) == (True, False)
    new, state = reference.RULES["rolora"](new, CLIENTS, state=state)
    assert (factors(new), state) == (([5, 6, 5], [7, 1.5, 3]), {"round": 2})


def test_fedsa_lora_by_hand():
    clients = [{**c, "id": i} for i, c in enumerate(CLIENTS)]
    new, state = reference.RULES["fedsa_lora"](SERVER, clients)
    assert factors(new) == ([5, 8, 5], [2, 2, 3])
    assert factors(aggregation.fedsa_start(new, state, 0)) == ([5, 8, 5], [4, 2, 3])
    assert factors(aggregation.fedsa_start(new, state, 1)) == ([5, 8, 5], [8, 2, 3])
    assert factors(aggregation.fedsa_start(new, state, 2)) == ([5, 8, 5], [2, 2, 3])
    _, later = reference.RULES["fedsa_lora"](new, [{**scalar_case([0, 0], [11, 12]), "id": 0}], state=state)
    assert later[0][PATH][:, 0].tolist() == [11, 12, 3]
    assert state[0][PATH][:, 0].tolist() == [4, 2, 3]
    assert factors(reference.RULES["fedsa_lora"](SERVER, clients, owners=False)[0])[0] == [5, 6, 5]


def test_lora_fair_is_the_minimum():
    rng = np.random.default_rng(4)
    server = {"adapters": {PATH: (rng.normal(size=(6, 3)), np.zeros((3, 5)))}, "dense": {}, "kernels": {}}
    clients = []
    for r in (1, 2, 3):
        adapters = {PATH: (rng.normal(size=(6, r)), rng.normal(size=(r, 5)))}
        clients.append({"adapters": adapters, "dense": {}, "weight": float(r), "ranks": {PATH: r}})
    a, plain = zero_pad(server, clients)[0]["adapters"][PATH]
    target = products.mean_product(server, clients, PATH)

    def cost(b, ridge):
        return np.sum((target - a @ b) ** 2) + ridge * np.sum((b - plain) ** 2)

    for ridge in (0.0, 0.01, 10.0):
        best = products.lora_fair(server, clients, ridge=ridge)[0]["adapters"][PATH]
        np.testing.assert_array_equal(best[0], a)
        for _ in range(20):
            assert cost(best[1], ridge) < cost(best[1] + 1e-3 * rng.normal(size=(3, 5)), ridge)
    far = products.lora_fair(server, clients, ridge=1e9)[0]["adapters"][PATH]
    np.testing.assert_allclose(far[1], plain, atol=1e-7)


def test_clipping_by_hand():
    client = scalar_case([4], [6])  # update (3, 4) of the factors, -6 of the dense parameter
    clipped = aggregation.clip_client(SERVER, client, 61**0.5 / 2)
    np.testing.assert_allclose([clipped["adapters"][PATH][i].item() for i in (0, 1)], [2.5, 4])
    np.testing.assert_allclose(clipped["dense"]["c"], 4)
    assert aggregation.clip_client(SERVER, client, 8.0)["dense"]["c"] == 1


def test_server_optimizers_by_hand():
    start, state = {"w": np.array([1.0, 1.0])}, None
    for want in (2.0, 3.5):
        aggregated = {"w": start["w"] + 1.0}
        mask = {"w": np.array([True, False])}
        start, state = server_optimizers.optimize(
            server_optimizers.fedavgm(1.0, 0.5), start, aggregated, state, reported=mask
        )
        assert start["w"].tolist() == [want, 1.0]
    assert state["slots"]["w"]["v"].tolist() == [-1.5, 0.0]
    paper = server_optimizers.fedadam(0.1, eps=1e-3, v0=1e-6, bias_correction=False)
    new, _ = server_optimizers.optimize(paper, {"w": np.array(0.0)}, {"w": np.array(2.0)})
    assert new["w"] == pytest.approx(0.1 * 0.2 / ((0.999e-6 + 0.004) ** 0.5 + 1e-3))
    yogi = server_optimizers.fedyogi(0.1, m0=0.0, v0=1.0, bias_correction=False)
    new, state = server_optimizers.optimize(yogi, {"w": np.array(0.0)}, {"w": np.array(2.0)})
    assert state["slots"]["w"]["v"] == pytest.approx(1.004)
    assert new["w"] == pytest.approx(0.1 * 0.2 / (1.004**0.5 + 1e-3))


def small_server(seed=5):
    (p, kernels, _), x, y = random_model(seed, {"l1": (5, 7), "l2": (7, 3)}, (5,))
    adapters = {path: (p["a", path], p["b", path]) for path in kernels}
    dense = {key[1]: value for key, value in p.items() if key[0] == "dense"}
    return {"adapters": adapters, "dense": dense, "kernels": kernels}, [(x[:4], y[:4]), (x[4:], y[4:])]


def test_flatten_and_back():
    server, _ = small_server()
    back = server_optimizers.unflatten(server_optimizers.flatten(server))
    np.testing.assert_array_equal(back["adapters"]["l2"][1], server["adapters"]["l2"][1])
    assert [list(back[part]) for part in server] == [list(server[part]) for part in server]


def test_training_sends_truncated_matrices_and_moves_what_trains():
    server, batches = small_server()
    options = {"network": training.mlp(["l1", "l2"]), "optimizer": training.adamw(0.01, 0.1)}
    ranks = {"l1": 1, "l2": 2}
    for frozen, index in (("train_a", 0), ("train_b", 1)):
        client, losses = training.train_client(server, ranks, batches * 3, epochs=3, **{frozen: False}, **options)
        assert losses[2] < losses[0]
        for path, r in ranks.items():
            start = (server["adapters"][path][0][:, :r], server["adapters"][path][1][:r])
            assert [f.shape for f in client["adapters"][path]] == [f.shape for f in start]
            np.testing.assert_array_equal(client["adapters"][path][index], start[index])
            assert np.all(client["adapters"][path][1 - index] != start[1 - index])


def test_epoch_loss_weighs_examples():
    server, batches = small_server()
    still = {"network": training.mlp(["l1", "l2"]), "optimizer": training.sgd(0.0), "epochs": 2}
    _, losses = training.train_client(server, {"l1": 2, "l2": 2}, batches * 2, **still)
    x, y = (np.concatenate(part) for part in zip(*batches, strict=True))
    _, whole = training.train_client(server, {"l1": 2, "l2": 2}, [(x, y)] * 2, **still)
    np.testing.assert_allclose(losses, whole)


def test_scale_is_folded_into_what_is_sent():
    server, batches = small_server()
    options = {"network": training.mlp(["l1", "l2"]), "optimizer": training.sgd(0.1), "train_a": False}
    plain, _ = training.train_client(server, {"l1": 2, "l2": 2}, batches[:1], **options)
    scaled, _ = training.train_client(server, {"l1": 2, "l2": 2}, batches[:1], scale=("alpha/rank", 6.0), **options)
    for path, (_, start) in server["adapters"].items():  # dB' = s dB, so s B' moves s² times as far
        moved = [client["adapters"][path][1] - start for client in (plain, scaled)]
        np.testing.assert_allclose(moved[1], 9 * moved[0], atol=1e-12)
    assert training.lora_scale("alpha/sqrt(rank)", 6.0, 4) == 3.0


@pytest.mark.parametrize(("units", "squared"), [("sent", 4.0), ("trained", 1.0)])
def test_proximal_term_by_hand(units, squared):
    server, batches = small_server()
    ranks, mu = {"l1": 2, "l2": 2}, 0.5
    options = {"network": training.mlp(["l1", "l2"]), "optimizer": training.sgd(0.1), "scale": ("constant", 2.0)}
    pulled = {"proximal": mu, "proximal_units": units, "report_penalty": True, "epochs": 2, **options}
    one, _ = training.train_client(server, ranks, batches[:1], **options)  # the pull is 0 at the start
    two, losses = training.train_client(server, ranks, batches[:1] * 2, **pulled)
    after_one = {**server, "adapters": one["adapters"], "dense": one["dense"]}
    free, loss = training.train_client(after_one, ranks, batches[:1], **options)
    distance = 0.0
    for name, start in server["dense"].items():
        moved = one["dense"][name] - start
        np.testing.assert_allclose(two["dense"][name], free["dense"][name] - 0.1 * mu * moved)
        distance += np.sum(moved**2)
    for path, start in server["adapters"].items():
        for i, factor in ((0, 1.0), (1, squared)):  # lora_b is sent as 2 B': d/dB' of (2 B' - B)² / 2 is 4 (B' - B / 2)
            moved = one["adapters"][path][i] - start[i]
            want = free["adapters"][path][i] - 0.1 * mu * factor * moved
            np.testing.assert_allclose(two["adapters"][path][i], want, atol=1e-12)
            distance += np.sum((moved if i == 0 else moved * squared**0.5 / 2) ** 2)
    np.testing.assert_allclose(losses[1], loss[0] + mu / 2 * distance)
