"""Slow, readable twins of the library in NumPy float64: the oracle of the tests.

Derived from the definitions and the papers, with really truncated matrices and plain loops over clients. Shares no code
with the library. Common nouns:

- server: `{"adapters": {path: (A, B)}, "dense": {name: array}, "kernels": {path: W}}`,
  with A (d_in, R), B (R, d_out), W (d_in, d_out)
- client: `{"adapters": {path: (A, B)}, "dense": {name: array}, "weight": float, "ranks": {path: r}}`,
  with A (d_in, r), B (r, d_out), plus `"id"` for rules that keep something for each client

The update of a layer is `A @ B`. Clients of weight 0 and clients with non-finite values are simply not in the list.
"""

from .aggregation import fedavg, fedsa_lora, ffa_lora, hetlora, rbla, rolora, zero_pad
from .products import fedex_lora, flexlora, flora, florist, lora_fair, owner_merge, raflora

RULES = {
    rule.__name__: rule
    for rule in (
        *(zero_pad, rbla, hetlora, flexlora, flora, ffa_lora, raflora, owner_merge, fedavg),
        *(fedex_lora, fedsa_lora, rolora, florist, lora_fair),
    )
}
