from types import SimpleNamespace

import numpy as np
import pytest

from bitween.gradual.scores.curvature import LayerCurvature
from bitween.gradual.scores.unreached import impute


def layer(shape, kind="linear"):
    return SimpleNamespace(shape=shape, kind=kind)


def reached(rows, cols, size):
    values = np.full(cols, float(size))
    return LayerCurvature(np.full(rows, float(size)), moment=values, conditional=values / 2, tokens=8)


def test_what_no_token_reached_is_as_dear_as_what_is_like_it():
    layers = {
        "words": layer((10, 4), "embedding"),
        "experts.0": layer((3, 4), "expert"),
        "experts.1": layer((3, 4), "expert"),
        "other": layer((3, 4)),
        "positions": layer((6, 4), "table"),
    }
    found = {
        "words": reached(10, 4, 5),
        "experts.0": reached(3, 4, 2),
        "experts.1": LayerCurvature(np.zeros(3)),
        "other": reached(3, 4, 9),
        "positions": LayerCurvature(np.zeros(6)),
    }
    assert impute(found, layers, "words") == ["experts.1", "positions"]
    np.testing.assert_array_equal(found["experts.1"].rows, found["experts.0"].rows)
    np.testing.assert_array_equal(found["experts.1"].moment, found["experts.0"].moment)
    np.testing.assert_array_equal(found["experts.1"].conditional, found["experts.0"].conditional)
    np.testing.assert_allclose(found["positions"].rows, 1 / 6)
    np.testing.assert_array_equal(found["positions"].moment, found["words"].moment)


def test_without_its_like_the_mean_of_all_counts():
    layers = {"words": layer((10, 4), "embedding"), "a": layer((3, 4)), "b": layer((5, 2)), "tower": layer((7, 6))}
    found = {
        "words": reached(10, 4, 5),
        "a": reached(3, 4, 1),
        "b": reached(5, 2, 3),
        "tower": LayerCurvature(np.zeros(7)),
    }
    impute(found, layers, "words")
    np.testing.assert_allclose(found["tower"].rows, np.full(7, 2.0))
    np.testing.assert_allclose(found["tower"].moment, np.full(6, 2.0))


def test_text_that_reaches_nothing_is_an_error():
    layers = {"words": layer((10, 4), "embedding"), "a": layer((3, 4))}
    with pytest.raises(ValueError, match="reached none"):
        impute({"words": reached(10, 4, 5), "a": LayerCurvature(np.zeros(3))}, layers, "words")
