"""What `conftest.py` puts round every test: types and shapes are checked, charts drawn once."""

import numpy as np
import pytest
import torch
import vl_convert
from jaxtyping import TypeCheckError

from demur.directions import Direction
from demur.estimators import WhitenedDifference
from demur.report.words import readable
from demur.sites import Site


def test_a_wrong_type_is_refused_where_no_shape_stands():
    with pytest.raises(TypeCheckError):
        readable(3)
    with pytest.raises(TypeCheckError):
        Site("1", "resid_pre")


def test_a_wrong_shape_is_refused_and_one_name_is_one_size():
    estimate = WhitenedDifference()
    with pytest.raises(TypeCheckError):
        estimate(torch.randn(4), torch.randn(4, 3))
    with pytest.raises(TypeCheckError):
        estimate(torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(TypeCheckError):
        Direction(np.zeros(3), 1.0, Site(1, "resid_pre"), -1, "drawn")


def test_a_drawing_hangs_on_its_specification_alone():
    spec = {
        "data": {"values": [{"a": 1, "b": 2}, {"a": 2, "b": 3}]},
        "mark": "bar",
        "encoding": {"x": {"field": "a"}, "y": {"field": "b", "type": "quantitative"}},
    }
    fresh = vl_convert.vegalite_to_svg.without_cache
    assert fresh(spec) == fresh(spec) == vl_convert.vegalite_to_svg(spec)
    assert vl_convert.vegalite_to_svg(spec) is vl_convert.vegalite_to_svg(spec)
    assert vl_convert.vegalite_to_svg({**spec, "mark": "line"}) != fresh(spec)
