"""Which version of the weights a gateway binds a request to."""

from __future__ import annotations

import pytest

from cluster.front.errors import ServiceError, StatusCode
from cluster.front.served_weights import ServedWeights


def test_a_new_request_gets_what_is_served_and_a_resumed_one_what_it_began_with() -> None:
    weights = ServedWeights({"served": 1, "wanted": [1]})
    assert weights.bind(None, is_resumed=False) == 1
    weights.take({"served": 2, "wanted": [1, 2]})
    assert weights.bind(None, is_resumed=False) == 2
    assert weights.bind(1, is_resumed=True) == 1


def test_what_began_with_a_version_that_is_gone_cannot_be_resumed_but_can_begin_anew() -> None:
    weights = ServedWeights({"served": 2, "wanted": [2]})
    with pytest.raises(ServiceError, match="weights_version: 1 is not served any more") as failure:
        weights.bind(1, is_resumed=True)
    assert failure.value.code is StatusCode.FAILED_PRECONDITION
    assert weights.bind(1, is_resumed=False) == 2
