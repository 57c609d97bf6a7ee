"""New data become observations as the data of the run did."""

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_vae.data.datasets import Column, Pixels, Schema
from pyro_vae.data.images import Dataset, Images
from pyro_vae.data.incoming import conditions, observations, restored
from pyro_vae.errors import DataError

RNG = np.random.default_rng(0)
RULES = ("dynamic", "static", "threshold", "dequantized", "integers", "none")
KINDS = {
    "8 bits": (RNG.integers(0, 256, (12, 2, 3), np.uint8), 255),
    "16 levels": (RNG.integers(0, 17, (12, 2, 3), np.uint8), 16),
    "16 bits": (RNG.integers(0, 65536, (12, 2, 3)), 65535),
    "colours": (RNG.integers(0, 256, (12, 3, 2, 2), np.uint8), 255),
    "real": (RNG.random((12, 2, 3), np.float32), 1),
}


class Own(Dataset):
    """A data set of given images."""

    def read(self):
        train, test, largest = self.images
        return Images(train, test, largest)


def loaded(images, largest, rule, seed=5):
    dataset = Own("unused", rule, seed, 3)
    dataset.images = images[:6], images[6:], largest
    return dataset.load()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_the_test_set_of_a_run_gives_its_observations(kind, rule):
    images, largest = KINDS[kind]
    if (kind, rule) == ("real", "integers"):
        with pytest.raises(DataError):
            loaded(images, largest, rule)
        return
    data, raw, lines = loaded(images, largest, rule), images[6:], []
    flat = raw.reshape(6, -1)
    types = (raw, torch.from_numpy(raw), flat, raw.astype(np.float64), pd.DataFrame(flat))
    for form in (*types, *([] if kind == "real" else [raw.astype(np.int64), raw.astype(np.float32)])):
        torch.testing.assert_close(observations(form, data.schema, lines.append), data.test, rtol=0, atol=0)
    drawn = rule in ("dynamic", "static") or (rule == "dequantized" and kind != "real")
    assert ("seed 5" in lines[0]) == drawn
    assert len(set(lines)) == 1, "what is done is told, the same for all"


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float32", "float64"])
@pytest.mark.parametrize("largest", [1, 255])
def test_zeros_and_ones_are_the_observations_of_a_binary_model(dtype, largest):
    x = RNG.integers(0, 2, (5, 1, 2, 3)).astype(dtype)
    lines = []
    schema = Schema((1, 2, 3), pixels=Pixels("dynamic", 1, largest))
    assert np.array_equal(observations(x, schema, lines.append), x.reshape(5, 6).astype(np.float32))
    assert [*map(type, lines)] == [str] * (dtype in ("uint8", "int64") and largest > 1)


def test_gaps_stay_gaps_and_change_nothing_else():
    images, largest = KINDS["16 levels"]
    data = loaded(images, largest, "dynamic")
    x = images[6:].astype(float)
    x[1, 0, 0] = np.nan
    found = observations(x, data.schema, lambda line: None)
    assert found.isnan().nonzero().tolist() == [[1, 0]]
    assert torch.equal(found.nan_to_num(7).flatten()[7:], data.test.flatten()[7:])


BINARY = Schema((1, 2, 3), pixels=Pixels("dynamic", 1, 255))
WHOLE = Schema((1, 2, 3), pixels=Pixels("integers", 1, 255))
DENSE = Schema((1, 2, 3), pixels=Pixels("dequantized", 1, 255))
good = np.full((4, 2, 3), 0.5)


def at(place, value, dtype=float):
    x = np.full((4, 2, 3), 0.5 if dtype is float else 3).astype(dtype)
    x[place] = value
    return x


@pytest.mark.parametrize(
    ("raw", "schema", "message"),
    [
        ([[0.0] * 6], BINARY, "got list"),
        (np.array([["a"] * 6]), BINARY, "array of <U1"),
        (good.astype(complex), BINARY, "complex128"),
        (good[0], BINARY, r"one image is an array of N = 1"),
        (good[:0], BINARY, "there is no image"),
        (np.zeros((4, 3, 2)), BINARY, r"shape \(N, 1, 2, 3\) or \(N, 6\) or \(N, 2, 3\), got an array of shape"),
        (np.zeros((4, 5, 6, 3)), Schema((3, 5, 6)), "channels come first"),
        (at(2, 300, int), BINARY, "row 2: pixels must be in 0..255, there is 300"),
        (at(2, -1, int), BINARY, "row 2: pixels must be in 0..255, there is -1"),
        (at(1, 1.5), BINARY, "row 1: pixels must be in 0..1, there is 1.5"),
        (at(1, np.inf), BINARY, "row 1: pixels must be in 0..1, there is inf"),
        (good, WHOLE, "row 0: pixels must be whole numbers, there is 0.5"),
        (np.eye(6, dtype=np.uint8), DENSE, "0 and 1 alone"),
        (np.eye(6), DENSE, "0 and 1 alone"),
        (at(3, np.inf), Schema((2, 3)), "row 3: numbers must be finite"),
    ],
)
def test_what_cannot_be_an_observation_is_refused(raw, schema, message):
    with pytest.raises(DataError, match=message) as refused:
        observations(raw, schema, lambda line: None)
    assert "\n" not in str(refused.value)


TABLE = Schema(
    (4,),
    "row",
    (
        Column("length", "real"),
        Column("number", "count"),
        Column("colour", "categorical", ("blue", "red")),
        Column("grade", "ordinal", (1.0, 2.0, 4.0)),
    ),
    missing=True,
)
FRAME = pd.DataFrame(
    {
        "grade": [4, 1, np.nan],
        "more": [0, 0, 0],
        "colour": ["red", "blue", None],
        "number": [3, 0, 7],
        "length": [1.5, np.nan, -2],
    }
)
STORED = [[1.5, 3, 1, 2], [np.nan, 0, 0, 0], [-2, 7, np.nan, np.nan]]


def test_columns_are_found_by_name_and_given_back():
    lines = []
    x = observations(FRAME, TABLE, lines.append)
    assert np.array_equal(x, np.array(STORED, np.float32), equal_nan=True)
    assert lines == ["columns that the model does not know are left out: more"]
    back = restored(x, TABLE)
    assert list(back) == [column.name for column in TABLE.columns]
    assert np.array_equal(observations(back, TABLE), x, equal_nan=True)
    lines.clear()
    assert observations(FRAME.drop(columns="number"), TABLE, lines.append)[:, 1].isnan().all()
    assert "number" in lines[-1]


def change(column, row, value):
    frame = FRAME.astype(object)
    frame.loc[row, column] = value
    return frame


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (change("colour", 1, "green"), "column 'colour', row 1: 'green' is none of the values 'blue', 'red'"),
        (change("grade", 0, 3), "column 'grade', row 0: 3 is none of the values 1, 2, 4"),
        (change("number", 2, 1.5), "column 'number', row 2: 1.5 is no count"),
        (change("length", 2, "long"), "column 'length', row 2: 'long' is no number"),
        (change("length", 2, np.inf), "column 'length', row 2: inf is not finite"),
        (FRAME.iloc[:0], "holds no rows"),
        (FRAME.rename(columns={"more": "length"}), "both called 'length'"),
        (FRAME.iloc[2:].assign(number=np.nan, length=np.nan), "row 0: nothing was seen"),
        (FRAME[["more"]], "no column 'length'; it has more"),
    ],
)
def test_a_bad_table_is_refused_by_row_and_column(frame, message):
    with pytest.raises(DataError, match=message):
        observations(frame, TABLE, lambda line: None)


def test_what_is_missing_is_refused_by_a_model_that_knows_no_gaps():
    with pytest.raises(DataError, match="column 'length', row 1: the value is missing"):
        observations(FRAME, Schema((4,), "row", TABLE.columns), lambda line: None)


LABELLED = Schema((1, 2, 3), condition=(Column("label", "categorical", (0.0, 1.0, 3.0)),))
TWO = Schema(
    (2,), "row", condition=(Column("label", "categorical", ("a", "b")), Column("age", "real", loc=40.0, scale=10.0))
)


@pytest.mark.parametrize("given", [3, "3", 3.0, np.array([3, 3]), torch.tensor([3, 3]), {"label": [3, 3]}])
def test_a_condition_is_one_value_or_one_of_each_row(given):
    assert conditions(given, 2, LABELLED).tolist() == [[0, 0, 1]] * 2


def test_a_condition_of_two_columns():
    found = conditions(pd.DataFrame({"age": [30, 55], "label": ["b", "a"]}), 2, TWO)
    assert found.tolist() == [[0, 1, -1], [1, 0, 1.5]]
    assert conditions({"age": 40, "label": "a"}, 3, TWO).tolist() == [[1, 0, 0]] * 3
    assert conditions(None, 2, BINARY) is None


@pytest.mark.parametrize(
    ("given", "schema", "message"),
    [
        (1, BINARY, "has no condition"),
        (None, LABELLED, "give label"),
        (2, LABELLED, "column 'label', row 0: 2 is none of the values 0, 1, 3"),
        (np.array([0, 1, 0]), LABELLED, "one value, or 2 of them"),
        (1, TWO, "label, age"),
        ({"label": "a"}, TWO, "'age' is not given"),
    ],
)
def test_a_bad_condition_is_refused(given, schema, message):
    with pytest.raises(DataError, match=message):
        conditions(given, 2, schema)
