"""Symbolic lengths of axes. They tell which axes can only change their lengths together.

Every axis of every array of a program gets a `Dim`. `unify(a, b)` states that two axes are one and the same, entry by entry.
Take `y = x @ w1` and `z = y @ w2`: the last axis of w1, the last axis of y and the first axis of w2 are unified. If one of
them keeps its first 3 entries, all of them do.

A dim has one of three kinds:

- A **leaf** has no structure. Only leaves have sizes of their own; a smaller network keeps the first entries of each leaf.
- A **product** has factors: `reshape` merged its axes into one. The last factor runs fastest (row-major).
- A **sum** has terms: `concatenate` put its parts one after another.

A leaf may turn out to have structure later: an axis of 12 meets an axis that was merged from 3 and 4. Then the leaf is
**refined**: it becomes the product of two new leaves, in every place where it is used.

    >>> heads, features = Dim(3), Dim(4)
    >>> axis = Dim(12)
    >>> unify(axis, product([heads, features]), "model.py:7")
    >>> [leaf is other for leaf, other in zip(leaves(axis), (heads, features), strict=True)]
    [True, True]

Some axes cannot change: an axis of the input, or one that an operation numbers. `fix` marks the leaves of such an axis and
remembers the reason. If two axes should be one but their structures do not fit, `unify` fixes both. So a program that is
not understood gets fewer sizes that can change, and never a wrong result.

`resolve` follows the links that `unify` and refinement leave behind, so functions call it before they look at a dim. Many
threads may read dims at once, but only one thread may change them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

Kind = Literal["leaf", "product", "sum"]

_MOST_PARTS = 32
"""Into how many parts two axes may be divided so that they fit. An axis of more parts has sizes that nobody wants."""


class Dim:
    """The length of an axis.

    Args:
      size: the length in the whole network.
      kind: "leaf", "product" or "sum".
      parts: the factors of a product, or the terms of a sum.
      fixed: why a leaf keeps its size, or None if it can change.
      steps: the only sizes that a leaf can have, ascending. Only the sizes of kernels have steps, see `kernels.py`. Their
        smaller sizes are not the first entries. All other leaves have `()`.
    """

    __slots__ = ("fixed", "kind", "link", "parts", "size", "steps")

    def __init__(
        self,
        size: int,
        kind: Kind = "leaf",
        parts: Sequence["Dim"] = (),
        *,
        fixed: str | None = None,
        steps: Sequence[int] = (),
    ):
        self.size = int(size)
        self.kind: Kind = kind
        self.parts = tuple(parts)
        self.fixed = fixed
        self.steps = tuple(steps)
        self.link: Dim | None = None  # the dim that replaces this one

    def __repr__(self) -> str:
        dim = resolve(self)
        if dim.kind == "leaf":
            return f"{dim.size}!" if dim.fixed else f"{dim.size}"
        return f"({(' * ' if dim.kind == 'product' else ' + ').join(map(repr, dim.parts))})"


def resolve(dim: Dim) -> Dim:
    """The dim that now stands in the place of `dim`."""
    while dim.link is not None:
        dim = dim.link
    return dim


def leaves(dim: Dim) -> list[Dim]:
    """The leaves of a dim in their order. A leaf may occur more than once.

    >>> leaves(total([Dim(2), product([Dim(3), Dim(4)])]))
    [2, 3, 4]
    """
    dim = resolve(dim)
    return [dim] if dim.kind == "leaf" else [leaf for part in dim.parts for leaf in leaves(part)]


def is_squared(dim: Dim, leaf: Dim) -> bool:
    """Whether a leaf occurs in several factors of a product, as in `(h[:, :, None] * h[:, None, :]).reshape(len(h), -1)`.

    >>> leaf = Dim(4)
    >>> is_squared(product([leaf, leaf]), leaf), is_squared(total([leaf, leaf]), leaf)
    (True, False)
    """
    parts = resolve(dim).parts
    is_twice = resolve(dim).kind == "product" and sum(leaf in leaves(part) for part in parts) > 1
    return is_twice or any(is_squared(part, leaf) for part in parts)


def factors(dim: Dim) -> list[Dim]:
    """The factors of a product, none of them a product itself. `[dim]` for another dim."""
    return _flat(dim, "product")


def terms(dim: Dim) -> list[Dim]:
    """The terms of a sum, none of them a sum itself. `[dim]` for another dim."""
    return _flat(dim, "sum")


def _flat(dim: Dim, kind: Kind) -> list[Dim]:
    dim = resolve(dim)
    return [inner for part in dim.parts for inner in _flat(part, kind)] if dim.kind == kind else [dim]


def product(dims: Sequence[Dim]) -> Dim:
    """The dim of an axis that merges the given axes. Axes of length 1 do not count.

    >>> product([Dim(2), Dim(1), Dim(3)])
    (2 * 3)
    """
    parts = [factor for dim in dims for factor in factors(dim) if factor.size != 1]
    if len(parts) == 1:
        return parts[0]
    return Dim(math.prod(part.size for part in parts), "product", parts) if parts else Dim(1)


def total(dims: Sequence[Dim]) -> Dim:
    """The dim of an axis that has the given axes one after another. Empty axes do not count.

    >>> total([Dim(2), Dim(0), Dim(3)])
    (2 + 3)
    """
    parts = [term for dim in dims for term in terms(dim) if term.size]
    if len(parts) == 1:
        return parts[0]
    return Dim(sum(part.size for part in parts), "sum", parts) if parts else Dim(0)


def fix(dim: Dim, reason: str) -> None:
    """States that an axis keeps its size. The first reason of a leaf remains.

    >>> axis = Dim(4)
    >>> fix(axis, "cumsum at model.py:3")
    >>> axis, axis.fixed
    (4!, 'cumsum at model.py:3')
    """
    for leaf in leaves(dim):
        leaf.fixed = leaf.fixed or reason


def refine(leaf: Dim, kind: Kind, sizes: Sequence[int]) -> Dim:
    """Turns a leaf into a product or a sum of new leaves with the given sizes. A fixed leaf has fixed parts."""
    whole = Dim(leaf.size, kind, [Dim(size, fixed=leaf.fixed) for size in sizes])
    leaf.link = whole
    return whole


def unify(a: Dim, b: Dim, where: str) -> None:
    """States that two axes are the same one. Both must have the same size.

    Args:
      a: the dim of one axis.
      b: the dim of the other axis.
      where: file and line of the operation that says so, for the reason if the two do not fit.
    """
    a, b = resolve(a), resolve(b)
    if a.size != b.size:
        raise AssertionError(f"axes of {a.size} and {b.size} entries cannot be one axis ({where})")
    if a is b or a.size <= 1:
        return
    if b.kind == "leaf" and not (a.kind == "leaf" and b.steps):  # the size of a kernel keeps its steps
        a, b = b, a
    if a.kind == "leaf":
        a.link = b
        if a.fixed:
            fix(b, a.fixed)
    elif (reason := _fixed_wholly(a) or _fixed_wholly(b)) or _align(a, b, where):
        if reason:  # then the parts are of no interest
            fix(a, reason)
            fix(b, reason)
        a, b = resolve(a), resolve(b)
        if a is not b:
            a.link = b
    else:
        reason = f"one axis is divided in two ways that do not fit, at {where}"
        fix(a, reason)
        fix(b, reason)


def _fixed_wholly(dim: Dim) -> str | None:
    """Why an axis keeps its size, if all of its leaves do."""
    reasons = [leaf.fixed for leaf in leaves(dim)]
    return reasons[0] if all(reasons) else None


def _align(a: Dim, b: Dim, where: str) -> bool:
    """Unifies the parts of two dims that are no leaves. False if their structures do not fit."""
    if a.kind == b.kind:
        return _align_parts(a, b, where)
    return _distribute(a, b, where) if a.kind == "product" else _distribute(b, a, where)


def _align_parts(a: Dim, b: Dim, where: str) -> bool:
    """The same for two products, or for two sums.

    It walks along both lists of parts. If one part is larger than the part that it meets, it is refined (a leaf), or it meets
    as many parts of the other list as make up its size.
    """
    kind, refined = a.kind, 0
    left, right = _flat(a, kind)[::-1], _flat(b, kind)[::-1]  # the next part is at the end
    while left and right:
        x, y = _flat(left.pop(), kind), _flat(right.pop(), kind)  # a part may have been refined since
        left += x[:0:-1]
        right += y[:0:-1]
        if x[0].size == y[0].size:
            unify(x[0], y[0], where)
            continue
        (large, small), others = ((x[0], y[0]), right) if x[0].size > y[0].size else ((y[0], x[0]), left)
        if large.kind == "leaf":
            if kind == "product" and large.size % small.size:
                return False
            refined += 1
            if refined > _MOST_PARTS:  # such as an axis that is shifted by one entry and added to itself
                return False
            rest = large.size // small.size if kind == "product" else large.size - small.size
            left.append(x[0])
            right.append(y[0])
            refine(large, kind, (small.size, rest))
            continue
        met = [small]
        while others and _join(met, kind).size < large.size:
            met.append(others.pop())
        if _join(met, kind).size != large.size:
            return False
        unify(large, _join(met, kind), where)
    return not left and not right


def _join(parts: Sequence[Dim], kind: Kind) -> Dim:
    return product(parts) if kind == "product" else total(parts)


def _distribute(a: Dim, b: Dim, where: str) -> bool:
    """Unifies a product with a sum: (p + q) * r is p * r + q * r, because p and q count blocks of r entries.

    An example is one matrix for query, key and value: its columns are cut into three parts, or reshaped to (3, columns).
    """
    first, *rest = factors(a)
    block = a.size // first.size
    parts = terms(b)
    if any(part.size % block for part in parts):
        return False
    counts = [Dim(part.size // block) for part in parts]
    unify(first, total(counts), where)
    for count, part in zip(counts, parts, strict=True):
        unify(product([count, *rest]), part, where)
    return True


def cut(dim: Dim, start: int, stop: int, where: str) -> Dim:
    """The dim of `axis[start:stop]`. A leaf becomes a sum of what is before, inside and behind the cut.

    >>> axis = Dim(12)
    >>> cut(axis, 0, 4, "model.py:3"), axis
    (4, (4 + 8))
    """
    dim = resolve(dim)
    if start >= stop:
        return Dim(0)
    if (start, stop) == (0, dim.size):
        return dim
    if dim.kind == "leaf":
        dim = refine(dim, "sum", [size for size in (start, stop - start, dim.size - stop) if size])
    if dim.kind == "sum":
        parts = terms(dim)
        begins = itertools.accumulate((part.size for part in parts), initial=0)
        bounds = [(part, max(start - at, 0), min(stop - at, part.size)) for part, at in zip(parts, begins, strict=False)]
        return total([cut(part, low, high, where) for part, low, high in bounds if low < high])
    first, *rest = factors(dim)
    block = dim.size // first.size
    if start % block == 0 and stop % block == 0:
        return product([cut(first, start // block, stop // block, where), *rest])
    reason = f"a merged axis is cut inside of a block, at {where}"
    fix(dim, reason)
    return Dim(stop - start, fixed=reason)
