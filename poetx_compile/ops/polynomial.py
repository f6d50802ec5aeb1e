"""The Cayley-Neumann polynomial of a skew-symmetric matrix and its gradient, in few products.

``G(Q) = (I + Q)(I + Q + … + Q^k) = I + 2(Q + … + Q^k) + Q^(k+1)``, of degree d = k + 1
(POET-X, arXiv 2603.05500, eq. for the Cayley-Neumann parameterisation).

Products of b×b matrices, the fewest found:

=========  ===  ===  ===  ===  ===  ===
k            1    2    3    4    5    6
forward      1    2    2    3    3    4
backward     1    2    4    6    8   10
=========  ===  ===  ===  ===  ===  ===

Forward: Paterson-Stockmeyer evaluation. Backward: only the skew part of the gradient is needed, and
it is ``K − Kᵀ`` with half of the terms (see `polynomial_backward`), so that nothing of the forward
but the packed parameters has to be saved or recomputed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coefficients(order: int) -> list[float]:
    """Coefficients c₀ … c_(k+1) of the polynomial of order k."""
    return [1.0] + [2.0] * order + [1.0]


def _stride(degree: int) -> int:
    """The s of Paterson-Stockmeyer with the fewest products: s−1 powers and ⌈d/s⌉−1 of Horner."""
    return min(range(1, degree + 1), key=lambda s: (s - 1 + -(-degree // s) - 1, s))


def polynomial(skew: Tensor, order: int) -> Tensor:
    """G(Q) for skew-symmetric matrices Q of shape [blocks, b, b]; same shape and dtype."""
    c = coefficients(order)
    degree = order + 1
    s = _stride(degree)
    powers = [torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device), skew]
    while len(powers) <= s:
        powers.append(torch.bmm(powers[-1], skew))
    top = -(-degree // s) - 1
    result = _combine(c[top * s :], powers)
    for j in reversed(range(top)):
        result = _combine(c[j * s : (j + 1) * s], powers) + torch.bmm(powers[s], result)
    return result


def polynomial_backward(grad: Tensor, skew: Tensor, order: int) -> Tensor:
    """Gradient with respect to the entries above the diagonal of Q, as a skew-symmetric matrix.

    Entry (i, j) is ``∂L/∂Q_ij − ∂L/∂Q_ji`` for ``grad = ∂L/∂G``; all of shape [blocks, b, b].

    The gradient of a matrix polynomial is its derivative at Qᵀ = −Q in direction ``grad``:
    ``Σ_n c_n Σ_(i+j=n−1) (−Q)^i grad (−Q)^j``. Split grad into S + A, symmetric and skew: even n
    need S alone for the skew part, odd n need A alone, and the terms (i, j) and (j, i) are
    transposes of each other up to the sign. So the sum over i ≤ j, with half of i = j, is a K whose
    ``K − Kᵀ`` is the result; K is evaluated by Horner's rule in j.
    """
    c = coefficients(order)
    degree = order + 1
    q = -skew
    # left[parity][i] = (−Q)^i E with E = S for even n, A for odd n.
    left = {0: [grad + grad.mT], 1: [grad - grad.mT]}
    first = c[degree] * left[degree % 2][0]
    if degree == 1:
        return 0.5 * (first - first.mT)
    result = torch.bmm(first, q)
    # (−Q)E is a transpose of E(−Q), which the first Horner step has just made.
    sign = 1.0 if degree % 2 else -1.0
    left[degree % 2].append((sign / c[degree]) * result.mT)
    for j in reversed(range(degree - 1)):
        for i in range(min(j, degree - 1 - j) + 1):
            n = i + j + 1
            if i == j and n % 2 == 0:
                continue
            side = left[n % 2]
            while len(side) <= i:
                side.append(torch.bmm(q, side[-1]))
            result = result + (c[n] * (0.5 if i == j else 1.0)) * side[i]
        if j > 0:
            result = torch.bmm(result, q)
    return result - result.mT


def _combine(c: list[float], powers: list[Tensor]) -> Tensor:
    """Σ c_i powers[i]; powers[0] is the identity."""
    result = c[0] * powers[0]
    for value, power in zip(c[1:], powers[1:], strict=False):
        result = result + (power if value == 1.0 else value * power)
    return result
