"""What three linear sketches of a product leave of it, in NumPy: slow, by least squares, one layer at a time.

The sketches see the whole product, so that this tells what they know of it, not how a round adds them up.
"""

import numpy as np


def approximate(product, left, right, rank, columns):
    """Approximate `P` from `P right[:, :columns]`, `left[:columns] P` and `left[rank:] P right[:, rank:]`.

    The first `rank` rows of `left` and columns of `right` are directions in which P comes back exactly: U of them,
    `P = U UᵀP + (I - UUᵀ) P V Vᵀ + (I - UUᵀ) P (I - VVᵀ)`. The last summand is `Q C Wᵀ`, Q and W what the first two
    sketches see of it, C the least-squares solution of `left Q C Wᵀ right = left P' right` (Tropp, Yurtsever, Udell,
    Cevher 2019, arXiv 1902.08651). Returns the approximation and the estimate of `‖P‖_F²`.
    """
    u, v = np.linalg.qr(left[:rank].T)[0], np.linalg.qr(right[:, :rank])[0]
    off_u, off_v = np.eye(len(u)) - u @ u.T, np.eye(len(v)) - v @ v.T
    known = u @ u.T @ product + off_u @ product @ v @ v.T
    q = np.linalg.qr(off_u @ product @ right[:, :columns])[0]
    w = np.linalg.qr(off_v @ product.T @ left[:columns].T)[0]
    phi, psi = left[rank:], right[:, rank:]
    core = phi @ off_u @ product @ off_v @ psi
    c = np.linalg.pinv(phi @ q) @ core @ np.linalg.pinv(w.T @ psi)
    return known + q @ c @ w.T, np.sum(known**2) + np.sum(core**2) / core.size
