"""Each planted layer is refused, and no wrong cause is named: see `planted_layers`."""

import pytest

from minilora.testing import CheckFailure, check
from tests.planted_layers import CAUSES, PLANTED

ALL = [
    pytest.param(kind, name, id=f"{kind}: {name}", marks=() if i % 8 == 0 else pytest.mark.long)
    for kind in PLANTED
    for i, name in enumerate(PLANTED[kind])
]


@pytest.mark.parametrize(("kind", "name"), ALL)
def test_a_planted_layer_is_refused_for_what_is_wrong_or_without_a_cause(kind, name):
    with pytest.raises(CheckFailure) as caught:
        check(PLANTED[kind][name], kind)
    assert set(caught.value.causes) <= {CAUSES.get(name)}, caught.value
