"""Keywords: one name for each field, in Python as on the command line."""

from __future__ import annotations

import pytest

from pyprune.config import SECTIONS, Calibration, ConfigError
from pyprune.keywords import Fields, configuration_fields, keywords, nested


def test_every_field_has_a_name_of_its_own():
    names = keywords()
    assert sorted(names.values()) == sorted(configuration_fields())
    assert names["num_samples"] == "calibration.num_samples" and names["epochs"] == "reconstruction.epochs"
    assert names["dtype"] == "dtype" and names["evaluation_dtype"] == "evaluation.dtype"
    assert keywords(["evaluation.dtype"]) == {"dtype": "evaluation.dtype"}, "short where nothing else has the name"


def test_editors_know_every_keyword():
    assert set(Fields.__annotations__) == {*keywords(), *SECTIONS} - {"model"}, "as keywords.Fields says them"


def test_keywords_become_the_sections_they_belong_to():
    assert nested({"num_samples": 8, "sparsity": 0.3, "evaluation": False}) == {
        "calibration": {"num_samples": 8},
        "sparsity": 0.3,
        "evaluation": {"enabled": False},
    }
    whole = {"calibration": lambda value: value if isinstance(value, Calibration) else {"source": value}}
    assert nested({"calibration": "x.txt", "seq_len": 9}, whole=whole)["calibration"] == {
        "source": "x.txt",
        "seq_len": 9,
    }
    both = nested({"calibration": Calibration(source="y.txt"), "seq_len": 9}, whole=whole)["calibration"]
    assert (both["source"], both["seq_len"], both["held_out"]) == ("y.txt", 9, 4)


def test_an_unknown_keyword_names_one_that_exists():
    with pytest.raises(ConfigError, match="unknown setting 'num_sample'; did you mean 'num_samples'?"):
        nested({"num_sample": 8})
    with pytest.raises(ConfigError, match="there are model, output, method"):
        nested({"xyzzy": 1})
