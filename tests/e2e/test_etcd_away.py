"""All of etcd is away for longer than anything in it lives."""

from __future__ import annotations

import pytest

from tests.e2e.outage import Outage


@pytest.mark.timeout(600)
def test_all_of_etcd_is_away_for_five_minutes(outage: Outage) -> None:
    status, said = outage.end()
    assert status == 0, said
