"""First-fit decreasing and number partitioning: their definitions word by word, and small cases worked out by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from copd_engine.partition import RoomTree, first_fit_decreasing, karmarkar_karp, longest_first

SIZES = st.lists(st.integers(0, 60), max_size=40)


def sums(sizes: list[int], shares: list[list[int]]) -> list[int]:
    return sorted(sum(sizes[i] for i in share) for share in shares)


@given(SIZES, st.integers(1, 50))
def test_first_fit_decreasing_is_what_its_name_says(sizes, capacity):
    """Against the plain quadratic loop."""
    bins: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [b for b in bins if sum(sizes[j] for j in b) + sizes[i] <= capacity]
        if room and sizes[i] <= capacity:
            room[0].append(i)
        else:
            bins.append([i])
    found = first_fit_decreasing(sizes, capacity)
    assert sorted(map(tuple, found)) == sorted(map(tuple, bins))


def test_first_fit_decreasing_by_hand():
    # 8 + 2, 5 + 5, 4 + 4 + 1 + 1 in bins of 10.
    assert sums([4, 8, 1, 4, 2, 1, 5, 5], first_fit_decreasing([4, 8, 1, 4, 2, 1, 5, 5], 10)) == [10, 10, 10]
    assert first_fit_decreasing([], 10) == []
    assert first_fit_decreasing([11, 3], 10) == [[0], [1]]


def test_the_room_tree_finds_the_first_bin():
    tree = RoomTree(3, 10)
    tree.take(0, 6)
    tree.take(1, 1)
    assert [tree.first_with(amount) for amount in (4, 5, 10, 11)] == [0, 1, 2, None]
    assert [tree.room(i) for i in range(3)] == [4, 9, 10]
    for i in range(3):
        tree.take(i, tree.room(i))
    assert tree.first_with(1) is None
    assert tree.first_with(0) == 0


def karmarkar_karp_dense(sizes: list[int], num_shares: int) -> list[int]:
    """Sums of the largest differencing method with every empty share written out."""
    partitions = [[size] + [0] * (num_shares - 1) for size in sorted(sizes, reverse=True)]
    order = list(range(len(partitions)))  # of equal spread the older first
    following = itertools.count(len(order))
    while len(partitions) > 1:
        first, second = sorted(range(len(partitions)), key=lambda i: (partitions[i][-1] - partitions[i][0], order[i]))[
            :2
        ]
        joined = sorted((a + b for a, b in zip(partitions[first], partitions[second][::-1], strict=True)), reverse=True)
        for i in sorted((first, second), reverse=True):
            del partitions[i], order[i]
        partitions.append(joined)
        order.append(next(following))
    return sorted(partitions[0]) if partitions else [0] * num_shares


@given(SIZES, st.integers(1, 7))
def test_differencing_against_its_dense_form(sizes, num_shares):
    assert sums(sizes, karmarkar_karp(sizes, num_shares)) == karmarkar_karp_dense(sizes, num_shares)


@pytest.mark.parametrize("partition", [longest_first, karmarkar_karp])
@given(sizes=SIZES, num_shares=st.integers(1, 7), order=st.randoms(use_true_random=False))
def test_every_item_once_and_sums_whatever_the_order(partition, sizes, num_shares, order):
    shares = partition(sizes, num_shares)
    assert len(shares) == num_shares
    assert sorted(i for share in shares for i in share) == list(range(len(sizes)))
    shuffled = sizes.copy()
    order.shuffle(shuffled)
    assert sums(shuffled, partition(shuffled, num_shares)) == sums(sizes, shares)
    # Graham's bound for greedy shares holds for both.
    if sizes:
        assert max(sums(sizes, shares)) <= sum(sizes) / num_shares + max(sizes)


def test_partitions_by_hand():
    # The textbook's example: LPT gives 8+5+4 and 7+6 (17 and 13), differencing 8+6 and 7+5+4 (16 and 14).
    assert sums([8, 7, 6, 5, 4], longest_first([8, 7, 6, 5, 4], 2)) == [13, 17]
    assert sums([8, 7, 6, 5, 4], karmarkar_karp([8, 7, 6, 5, 4], 2)) == [14, 16]
