"""Rows of a step are dealt out over ranks by what they cost."""

from hypothesis import given
from hypothesis import strategies as st

from dataplane.core.ranks.dealing import deal_rows
from dataplane.core.ranks.routing import chunk_cost

ROWS = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5000)), min_size=0, max_size=40)


@given(ROWS, st.integers(1, 9))
def test_each_row_has_one_rank_and_no_rank_has_much_more(rows: list[tuple[int, int]], ranks: int) -> None:
    counts, contexts = [count for count, _ in rows], [count + before for count, before in rows]
    dealt = deal_rows(counts, contexts, ranks)
    assert len(dealt) == ranks
    assert sorted(row for own in dealt for row in own) == list(range(len(rows)))
    assert all(own == sorted(own) for own in dealt)
    costs = [chunk_cost(count, before) for count, before in rows]
    loads = [sum(costs[row] for row in own) for own in dealt]
    assert max(loads) - min(loads) <= max(costs, default=0)  # the last row that the fullest got


def test_the_dearest_row_has_a_rank_to_itself() -> None:
    assert deal_rows([1, 100, 1, 1], [10, 100, 10, 10], 2) == [[1], [0, 2, 3]]
