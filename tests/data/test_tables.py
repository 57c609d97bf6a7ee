"""Tables: what their columns are taken for, how they are read, and what is refused."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from pyro_vae import Bernoulli, Gaussian
from pyro_vae.data import Column, Table, heads
from pyro_vae.data.columns import columns_of, encoded, frame_of, read_frame
from pyro_vae.errors import DataError
from pyro_vae.parts.likelihoods import NegativeBinomial
from pyro_vae.parts.mixed import Mixed, Scaled

ROWS = 40


def mixed_table():
    """A column of each kind."""
    draws = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "height": draws.normal(170, 8, ROWS).round(2),
            "change": draws.normal(0, 2, ROWS).round(2),
            "visits": draws.poisson(3, ROWS),
            "treated": np.arange(ROWS) % 2 == 0,
            "town": draws.choice(["Aachen", "Bonn", "Cork"], ROWS),
            "grade": pd.Categorical(draws.choice(["low", "mid", "high"], ROWS), ["low", "mid", "high"], ordered=True),
            "side": draws.choice([1, 2], ROWS),
        }
    )


KINDS = {
    **{"height": "positive", "change": "real", "visits": "count", "treated": "binary"},
    **{"town": "categorical", "grade": "ordinal", "side": "binary"},
}


def write(path, text):
    path.write_text(text)
    return path


def load(path, **settings):
    return Table("unused", path, **settings).load()


def test_kinds_are_told_from_the_entries():
    columns = columns_of(frame_of(mixed_table()), {})
    assert {column.name: column.kind for column in columns} == KINDS
    values = {column.name: column.values for column in columns}
    assert values["treated"] == ("False", "True")
    assert values["town"] == ("Aachen", "Bonn", "Cork")
    assert values["grade"] == ("low", "mid", "high")
    assert values["side"] == (1.0, 2.0)
    assert values["height"] == values["visits"] == ()


def test_a_text_file_is_read_as_pandas_reads_it(tmp_path):
    table = mixed_table().astype({"grade": str})
    table.loc[3, ["height", "town"]] = None
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    order = {"grade": ["low", "mid", "high"]}
    frame = read_frame(tmp_path / "a.csv")
    columns = columns_of(frame, order)
    x = encoded(frame, columns)
    of_pandas = frame_of(pd.read_csv(tmp_path / "a.csv"))
    assert columns_of(of_pandas, order) == columns
    assert {column.name: column.kind for column in columns} == KINDS
    np.testing.assert_array_equal(encoded(of_pandas, columns), x)
    np.testing.assert_array_equal(encoded(read_frame(tmp_path / "a.tsv"), columns), x)
    assert np.isnan(x).sum() == 2
    np.testing.assert_allclose(x[:, 0], table["height"], rtol=1e-6)
    assert [columns[4].values[int(code)] for code in np.delete(x[:, 4], 3)] == table["town"].drop(3).tolist()
    assert x[:, 5].tolist() == [["low", "mid", "high"].index(grade) for grade in table["grade"]]


def test_archives_hold_columns_or_matrices(tmp_path):
    table = mixed_table()[["height", "visits", "town"]]
    np.savez(
        tmp_path / "columns.npz",
        **{name: table[name].to_numpy().astype("U6" if name == "town" else float) for name in table},
    )
    columns = load(tmp_path / "columns.npz")
    assert columns.fingerprint == load(table).fingerprint
    x = table[["height", "visits"]].to_numpy()
    np.savez(tmp_path / "matrix.npz", train=x[:30], test=x[30:], names=np.array(["height", "visits"]))
    data = load(tmp_path / "matrix.npz")
    assert data.about == {"dataset": "Table", "columns": {"height": "positive", "visits": "count"}}
    np.testing.assert_allclose(data.test, x[30:], rtol=1e-6)
    np.savez(tmp_path / "one.npz", train=x)
    assert [column.name for column in load(tmp_path / "one.npz").columns] == ["x0", "x1"]


def test_rows_are_split_by_a_seed(tmp_path, capsys):
    table = pd.DataFrame({"a": np.arange(50) + 0.5, "b": np.tile([0, 1], 25)})
    data, again, other = load(table), load(table.copy()), load(table, split_seed=1)
    parts = data.train, data.validation, data.test
    assert [len(part) for part in parts] == [41, 4, 5]
    assert data.num_train == 41
    assert torch.cat(parts)[:, 0].sort().values.tolist() == table["a"].tolist()  # each row once
    assert again.fingerprint == data.fingerprint != other.fingerprint
    assert torch.equal(data.observe(torch.tensor([3, 5])), data.train[[3, 5]])
    assert "a" in capsys.readouterr().out
    apart = load(table, test_path=table[["b", "a"]].head(7), num_validation=10)  # in another order
    assert [len(apart.train), len(apart.validation)] == [40, 10]
    np.testing.assert_allclose(apart.test, table.head(7))


def test_what_is_read_is_printed(capsys):
    table = mixed_table()
    table.loc[:3, "height"] = None
    data = load(table)
    assert capsys.readouterr().out.splitlines() == [
        "the table, 7 columns: 40 rows, 1.4% of the entries missing; --dataset.columns overrides",
        *("  positive: height", "  real: change", "  count: visits", "  binary: treated, side"),
        *("  categorical: town (3)", "  ordinal: grade (3)"),
    ]
    assert data.schema.missing
    assert data.schema.shape == (7,)
    assert data.schema.noun == "row"
    height = data.columns[0]
    assert height.loc == pytest.approx(np.nanmean(torch.cat([data.train, data.validation])[:, 0]), rel=1e-6)
    assert not load(mixed_table()).schema.missing


def test_a_user_overrides_what_is_told():
    wishes = {"visits": "ordinal", "side": "count", "height": "real", "town": "ignore"}
    columns = {column.name: column for column in columns_of(frame_of(mixed_table()), wishes)}
    assert {name: columns[name].kind for name in ("visits", "side", "height")} == {
        **{"visits": "ordinal", "side": "count", "height": "real"}
    }
    assert columns["visits"].values == tuple(sorted(mixed_table()["visits"].unique()))
    assert "town" not in columns


def test_log_px_of_a_row_is_that_of_scipy_in_the_units_of_the_file():
    table = mixed_table().drop(columns="grade")
    data = load(table, num_test=5)
    head = heads(data.columns).double()
    head.initialize(data.train.double())
    outputs = head.marginal(data.train.double())
    found = head(*outputs).base_dist.log_prob(data.test.double())

    def softplus(value):
        return torch.nn.functional.softplus(value).numpy()

    parts, first = {}, 0
    for part in head.heads:
        parts[type(part).__name__] = outputs[first : first + len(part.sizes)]
        first += len(part.sizes)
    x = {column.name: data.test[:, place].double().numpy() for place, column in enumerate(data.columns)}
    loc, scale = parts["LogNormal"]
    logs = data.train[:, 0].double().log()
    mean, std = logs.mean().item(), logs.std().item()
    expected = stats.lognorm(std * (0.01 + softplus(scale)), scale=np.exp(mean + std * loc.numpy())).logpdf(x["height"])
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-6)
    unit = data.train[:, 1].double()
    (loc, scale), mean, std = parts["Scaled"], unit.mean().item(), unit.std().item()
    real = stats.norm(mean + std * loc.numpy(), std * (0.01 + softplus(scale)))
    np.testing.assert_allclose(found[:, 1], real.logpdf(x["change"]), rtol=1e-6)
    m, r = (value.exp().numpy() for value in parts["NegativeBinomial"])
    np.testing.assert_allclose(found[:, 2], stats.nbinom(r, r / (r + m)).logpmf(x["visits"]), rtol=1e-6)
    share = torch.sigmoid(parts["Bernoulli"][0]).numpy()
    np.testing.assert_allclose(found[:, 3], stats.bernoulli(share[0]).logpmf(x["treated"]), rtol=1e-6)
    np.testing.assert_allclose(found[:, 5], stats.bernoulli(share[1]).logpmf(x["side"]), rtol=1e-6)
    chances = parts["Categorical"][0].softmax(-1).numpy()
    np.testing.assert_allclose(found[:, 4], np.log(chances[x["town"].astype(int)]), rtol=1e-6)
    assert head.is_density


@pytest.mark.parametrize("count", [0.0, 10.0, 1e3, 1e5, 2.0**24])
@pytest.mark.parametrize("dispersion", [0.1, 10.0, 1e5])
def test_counts_of_any_size_are_scored_as_scipy_does(count, dispersion):
    head, mean = heads([Column("a", "count")]), 1.05 * count + 1
    outputs = torch.tensor([mean]).log(), torch.tensor([dispersion]).log()
    found = head(*outputs).log_prob(torch.tensor([count]))
    mean, dispersion = (value.double().exp().item() for value in outputs)
    expected = stats.nbinom(dispersion, dispersion / (dispersion + mean)).logpmf(count)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_columns_of_masses_alone_are_a_mass():
    assert heads([Column("a", "count"), Column("b", "binary", ("x", "y"))]).unit("row") == "nats per row, mass"
    assert heads([Column("a", "count"), Column("b", "real")]).unit("row") == "nats per row, density"


REFUSED = {
    "one value": (
        "a,b\n1.5,2\n2.5,2\n3,2\n4,2\n",
        {},
        "column 'b' holds one value in all training rows, 2; leave it out",
    ),
    "one word": ("a,b\n1.5,x\n2.5,x\n3,x\n4,x\n", {}, "column 'b' holds one value in all training rows, 'x'"),
    "texts": (
        "a,b\n" + "".join(f"{i}.5,name{i}\n" for i in range(30)),
        {},
        "column 'b' holds 30 different strings in 30 rows, such as 'name0': too many for categories",
    ),
    "percentages": (
        "a,b\n" + "".join(f"{i}.5,{i}.5%\n" for i in range(30)),
        {},
        "such as '0.5%': too many for categories; write numbers without %, leave it out",
    ),
    "infinite": ("a,b\n1.5,2\ninf,3\n3,2\n4,2\n", {}, "column 'a', line 3: inf is not finite"),
    "dates": ("a,b\n1.5,2020-01-02\n2,2020-01-03\n3,2021-02-03\n", {}, "column 'b', line 2: '2020-01-02' is a date"),
    "twice": ("a,b,a\n1,2,3\n", {}, "columns 1 and 3 are both called 'a'"),
    "no name": (",b\n1,2\n", {}, "column 1 has no name"),
    "empty row": ("a,b\n1.5,2\n,NA\n3,2\n4,2\n", {}, "line 3: nothing was seen of this row"),
    "empty line": ("a,b\n1.5,2\n\n3,2\n4,2\n", {}, "line 3: nothing was seen of this row"),
    "nothing": ("a,b\n1.5,\n2.5,\n3,NaN\n4,?\n", {}, "column 'b' holds nothing; leave it out"),
    "header only": ("a,b\n", {}, "holds no rows"),
    "no header": ("\n1,2\n", {}, "the first line must have the names of the columns"),
    "empty": ("", {}, "the first line must have the names of the columns"),
    "semicolons": ("a;b\n1;2\n", {}, "entries must be separated by commas"),
    "ragged": ('a,b\n1.5,"2\n"\n3\n3,2\n', {}, "line 4: 1 entries, where the first line names 2 columns"),
    "mixed": (
        "a,b\n1.5,2\n2.5,3\n3,x\n4,2\n",
        {},
        "column 'b', line 4: 'x' is no number, as others of this column are",
    ),
    "not a count": ("a\n1\n2\n-3\n4\n", {"a": "count"}, "column 'a', line 4: -3 is no count"),
    "half": ("a\n1\n2.5\n3\n4\n", {"a": "count"}, "column 'a', line 3: 2.5 is no count"),
    "large": (f"a\n1\n{2**24 + 1}\n3\n4\n", {}, "column 'a', line 3: counts go up to 16,777,216, this is 16777217"),
    "not positive": ("a\n1.5\n0\n3\n4\n", {"a": "positive"}, "column 'a', line 3: 0 is not positive"),
    "words": ("a\nx\ny\nx\ny\n", {"a": "real"}, "column 'a', line 2: 'x' is no number, and the column is real"),
    "many": ("a\n1\n2\n3\n4\n", {"a": "binary"}, "column 'a' is no binary column: it holds 4 values, 1, 2, 3, 4"),
    "order": ("a\nx\ny\nz\nx\n", {"a": "ordinal"}, "in which order? Name its values from first to last"),
    "other value": ("a\nx\ny\nz\nx\n", {"a": ["x", "y"]}, "column 'a', line 4: 'z' is none of the values 'x', 'y'"),
    "unknown": ("age,b\n1,2\n", {"agee": "real"}, "has no column 'agee' (did you mean 'age'?); it has age, b"),
    "all left out": ("a\n1\n", {"a": "ignore"}, "--dataset.columns leaves no column"),
    "too fine": (
        "a\n" + "".join(f"{1.7e9 + i / 100}\n" for i in range(9)),
        {"a": "real"},
        "its values differ too little for single precision",
    ),
    "too large": ("a\n1e39\n2.5\n3\n-4\n", {}, "column 'a', line 2: 1e+39 is too large for single precision"),
    "too few": ("a\n1\n2\n", {}, "a test set of 2 leaves nothing of 2 rows"),
}


@pytest.mark.parametrize(("text", "wishes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_no_table_is_refused_with_its_place(tmp_path, text, wishes, message):
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DataError) as refused:
        load(path, columns=wishes)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ("a,c\n1.5,2\n2,3\n", "has the column 'c', which"),
        ("a\n1.5\n2\n", "b.csv has no column 'b'; it has a"),
        ("a,b\n1.5,x\n2,z\n", "b.csv, column 'b', line 3: 'z' is none of the values 'x', 'y'"),
        ("a,b\n1.5,x\n", "a mean over test rows with its error needs at least 2, got 1"),
        ("a,b\n1.5,x\n,\n", "b.csv, line 3: nothing was seen of this row"),
    ],
)
def test_test_rows_must_fit(tmp_path, test, message):
    path = write(tmp_path / "a.csv", "a,b\n1.5,x\n2.5,y\n3,x\n4,y\n")
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        load(path, test_path=write(tmp_path / "b.csv", test))


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    (tmp_path / "no.npz").write_bytes(b"PK nothing")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 nothing")
    np.savez(tmp_path / "ragged.npz", a=np.arange(3), b=np.arange(4))
    np.savez(tmp_path / "wide.npz", a=np.zeros((3, 4)))
    for name, message in {
        "none.csv": "none.csv is no readable table: No such file",
        "none.parquet": "there is no such file",
        "latin.csv": "latin.csv is no readable table: its text is not in UTF-8; save it so",
        "no.npz": "no.npz is no readable .npz archive",
        "no.parquet": "no.parquet",
        "ragged.npz": r"of \[3, 4\] rows",
        "wide.npz": "the array 'a' has shape",
        "table.xlsx": "expected a file named .csv",
    }.items():
        with pytest.raises(DataError, match=message):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pd.date_range("2020-01-01", periods=9), "row 0: '2020-01-01 00:00:00' is a date"),
        ([1 + 2j] * 9, "complex numbers are no entries"),
        ([1.5, "x", 2.0] * 3, "row 0: '1.5' is no number|row 1: 'x' is no number"),
        ([[1], [2], [3]] * 3, "row 0: expected a number or a string, got a list"),
    ],
)
def test_frames_hold_numbers_and_words(values, message):
    with pytest.raises(DataError, match=message):
        load(pd.DataFrame({"a": values}))


def test_nullable_columns_of_pandas_have_gaps():
    table = pd.DataFrame({"a": pd.array([1, 2, None, 4] * 3, "Int64"), "b": pd.array([True, None, False, True] * 3)})
    columns = columns_of(frame_of(table), {})
    assert [column.kind for column in columns] == ["count", "binary"]
    x = encoded(frame_of(table), columns)
    np.testing.assert_array_equal(x[:4], [[1, 1], [2, np.nan], [np.nan, 0], [4, 1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": {"a": "integer"}}, "'a' must be real, positive, count"),
        ({"columns": {"a": ["x", "x"]}}, "'a' needs at least 2 different values"),
        ({"num_test": 1}, "num_test must be at least 2"),
        ({"num_validation": 0}, "num_validation must be at least 1"),
        ({"split_seed": -1}, "split_seed must be at least 0"),
        ({"num_test": 3, "test_path": "b.csv"}, "give test_path or num_test, not both"),
    ],
)
def test_settings_of_a_table_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Table("unused", "a.csv", **settings)


def test_likelihoods_that_do_not_score_columns_are_refused():
    data = load(mixed_table())
    data.check(heads(data.columns))
    for head, message in {
        Gaussian(7): "Gaussian is a density, of which the count column 'visits' has none; .* say --dataset.columns",
        NegativeBinomial(7): "NegativeBinomial is a mass, of which the positive column 'height' has none",
        Bernoulli(7): "Bernoulli is a mass, of which the positive column 'height' has none",
        Mixed([Scaled(Gaussian(2)), NegativeBinomial(1), Bernoulli(4)]): "binary columns, and 'town' is categorical",
    }.items():
        with pytest.raises(DataError, match=message):
            data.check(head)
