"""Bins and shares: first-fit decreasing under a capacity, and two ways to part numbers into shares of equal sum.

All of it is deterministic, and items of the same size are interchangeable: the order in which they come changes which
of them goes where, never the sums.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

Partition = Callable[[Sequence[int], int], list[list[int]]]


class RoomTree:
    """Room left in ``num_bins`` bins; finds the first with enough of it in O(log num_bins)."""

    def __init__(self, num_bins: int, capacity: int) -> None:
        self._size = 1 << max(0, num_bins - 1).bit_length()
        self._room = [capacity] * (2 * self._size)
        for leaf in range(num_bins, self._size):
            self._put(leaf, -1)

    def room(self, index: int) -> int:
        return self._room[self._size + index]

    def first_with(self, amount: int) -> int | None:
        """The first bin with at least ``amount`` of room."""
        room, node = self._room, 1
        if room[1] < amount:
            return None
        while node < self._size:
            node *= 2
            if room[node] < amount:
                node += 1
        return node - self._size

    def take(self, index: int, amount: int) -> None:
        self._put(index, self._room[self._size + index] - amount)

    def _put(self, index: int, value: int) -> None:
        room, node = self._room, self._size + index
        room[node] = value
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            largest = left if left > right else right
            if room[node] == largest:
                return
            room[node] = largest


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indexes of ``sizes`` in bins of at most ``capacity``; a larger item has a bin of its own.

    At most 11/9 of the fewest possible bins, plus 1 (Dósa 2007); O(n log n).
    """
    alone = [[i] for i, size in enumerate(sizes) if size > capacity]
    order = sorted((i for i, size in enumerate(sizes) if size <= capacity), key=lambda i: -sizes[i])
    tree = RoomTree(len(order), capacity)
    bins: list[list[int]] = []
    for i in order:
        found = tree.first_with(sizes[i])
        assert found is not None  # there are as many bins as items
        if found == len(bins):
            bins.append([])
        bins[found].append(i)
        tree.take(found, sizes[i])
    return alone + bins


def longest_first(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """LPT (Graham 1969): each item, the largest first, to the share with the smallest sum. O(n log n)."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    sums = [(0, share) for share in range(num_shares)]
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, share = sums[0]
        heapq.heapreplace(sums, (total + sizes[i], share))
        shares[share].append(i)
    return shares


def karmarkar_karp(sizes: Sequence[int], num_shares: int) -> list[list[int]]:
    """Largest differencing (Karmarkar and Karp 1982) for ``num_shares`` shares. O(n (log n + k log k)) for k shares.

    Each item is a partition of its own; the two partitions of the largest spread are joined, the large shares of one
    with the small shares of the other, until one is left.
    """
    # Spread negated, number that settles ties, sums in descending order with the number of their items' list.
    heap: list[tuple[int, int, list[tuple[int, int]]]] = []
    members: list[list[int]] = [[]]  # list 0 stands for "none"
    for number, i in enumerate(sorted(range(len(sizes)), key=lambda i: -sizes[i])):
        members.append([i])
        heap.append((-sizes[i] if num_shares > 1 else 0, number, [(sizes[i], len(members) - 1)]))
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, left = heapq.heappop(heap)
        _, _, right = heap[0]
        joined = _join(left, right, num_shares, members)
        smallest = joined[-1][0] if len(joined) == num_shares else 0
        heapq.heapreplace(heap, (smallest - joined[0][0], number, joined))
        number += 1
    shares = [members[part] for _, part in heap[0][2]] if heap else []
    return shares + [[] for _ in range(num_shares - len(shares))]


def _join(
    left: list[tuple[int, int]], right: list[tuple[int, int]], num_shares: int, members: list[list[int]]
) -> list[tuple[int, int]]:
    """Sums of two partitions, largest to smallest; absent shares are empty. Lists of items move, none is copied."""
    overlap = len(left) + len(right) - num_shares
    if overlap <= 0:
        joined = left + right
    else:
        # The `overlap` smallest of each side: the largest of these meets the smallest of those.
        joined = left[: len(left) - overlap] + right[: len(right) - overlap]
        for (sum_a, a), (sum_b, b) in zip(
            left[len(left) - overlap :], reversed(right[len(right) - overlap :]), strict=True
        ):
            if len(members[a]) < len(members[b]):
                a, b = b, a
            members[a] += members[b]
            joined.append((sum_a + sum_b, a))
    joined.sort(key=lambda part: -part[0])
    return joined
