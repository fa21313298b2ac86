"""Matrices in few bits, number by number: slow, and with the definitions' words."""

import statistics

import numpy as np


def normal_floats():
    """Return the 16 numbers of NF4: quantiles of a normal distribution at equal steps, 0 exactly, over the largest.

    Eight steps below 0 and seven above, from the quantile whose tail QLoRA's authors found best (arXiv 2305.14314).
    """
    quantile = statistics.NormalDist().inv_cdf
    tail = 0.9677083
    above = [quantile(p) for p in np.linspace(tail, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(tail, 0.5, 8)[:-1]]
    numbers = np.sort([*above, 0.0, *below])
    return numbers / numbers.max()


def int8(matrix):
    """Return what int8 makes of a float32 matrix."""
    found = np.zeros_like(matrix)
    for output in range(matrix.shape[1]):
        step = np.float32(max(abs(number) for number in matrix[:, output])) / np.float32(127)
        for row, number in enumerate(matrix[:, output]):
            found[row, output] = np.float32(round(float(number / step)) if step else 0) * step
    return found


def nf4(matrix, numbers, block=64):
    """Return what NF4 makes of a float32 matrix: blocks run along the inputs of one output after the other."""
    flat = matrix.T.reshape(-1)
    found = np.zeros_like(flat)
    for begin in range(0, len(flat), block):
        part = flat[begin : begin + block]
        largest = np.abs(part).max()
        for place, number in enumerate(part, begin):
            nearest = np.argmin(np.abs(numbers.astype(np.float64) - float(number) / float(largest or 1)))
            found[place] = numbers[nearest] * largest
    return found.reshape(matrix.T.shape).T
