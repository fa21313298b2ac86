"""Tables of numbers as datasets: what is read, and what is refused in one line."""

import numpy as np
import pytest

from autorank_jax.datasets import DatasetError, fetch_dataset, load_dataset, read_table

ROWS = np.random.default_rng(1).normal(size=(50, 3))


def table(folder, target, header="width,height,depth,goal", separator=","):
    lines = [separator.join([*(repr(float(x)) for x in row), str(y)]) for row, y in zip(ROWS, target, strict=True)]
    path = folder / "mine.csv"
    path.write_text("\n".join([header.replace(",", separator), *lines, ""]))
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_words_are_classes_and_features_are_standardised(tmp_path, separator):
    words = ["low" if row[0] < 0 else "high" for row in ROWS]
    path = fetch_dataset("mine", source=table(tmp_path, words, separator=separator), cache=tmp_path)
    data = load_dataset("mine", cache=tmp_path)
    assert path.name == "mine.npz"
    assert (data.classes, data.x_train.shape, data.x_test.shape) == (2, (40, 3), (10, 3))
    assert (data.x_train.dtype, data.y_train.dtype) == (np.float32, np.int32)
    np.testing.assert_allclose([data.x_train.mean(0), data.x_train.std(0)], [[0] * 3, [1] * 3], atol=1e-5)
    order = np.argsort(np.concatenate([data.x_train, data.x_test])[:, 1], kind="stable")  # the rows, by height
    expected = np.array([word == "low" for word in words])[np.argsort(ROWS[:, 1], kind="stable")]
    np.testing.assert_array_equal(np.concatenate([data.y_train, data.y_test])[order], expected)


def test_numbers_are_predicted_and_few_whole_ones_are_classes(tmp_path):
    goal = ROWS @ [1.0, 2.0, 3.0]
    data = read_table(table(tmp_path, goal), name="mine")
    assert (data.classes, data.y_train.shape, data.y_train.dtype) == (0, (40,), np.float32)
    solution, *_ = np.linalg.lstsq(data.x_train, data.y_train, rcond=None)
    np.testing.assert_allclose(data.x_test @ solution, data.y_test, atol=1e-4)
    digits = read_table(table(tmp_path, np.arange(50) % 3 + 7), name="mine")
    assert digits.classes == 3
    first = read_table(table(tmp_path, np.arange(50) % 3), name="mine", target="width")
    assert (first.classes, first.x_train.shape) == (0, (40, 3))
    np.testing.assert_array_equal(np.unique(np.round(first.x_train[:, 2], 4)).size, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected at least two columns of different names in the first line, got nothing"),
        ("1,2\n3,4\n5,6\n", "different names in the first line, got '1', '2'"),
        ("a,a\n1,2\n3,4\n", "different names in the first line, got 'a', 'a'"),
        ("a,b\n1,2\n", "at least two rows below the header, got 1"),
        ("a,b\n1,2\n\n3\n", "expected 2 values in line 4, got 1"),
        ("a,b\n1,2\n,\n3,4\n", "finite number in line 3, column 'a', got nothing"),
        ("a,b\n1,2\n  \n3\n", "expected 2 values in line 4, got 1"),
        ("a,b\n1,2\n,\n , \n", "at least two rows below the header, got 1"),
        ("a,b\n1,2\nx,3\n", "finite number in line 3, column 'a', got 'x': encode or remove it"),
        ("a,b\n1,2\nnan,3\n", "finite number in line 3, column 'a', got 'nan'"),
        ("a,b\n1,2\n,3\n", "finite number in line 3, column 'a', got nothing"),
        ("a,b\n1,2\n3,\n", "expected something in line 3, column 'b', got nothing"),
        ("a,b\n1,x\n3,x\n", "column 'b': expected different values to predict, got 'x' everywhere"),
        ("a,b\n1,x\n3,y\n4,z\n", "labels that examples share, got 3 different ones in 3 rows, such as x, y, z"),
        ("a,b\n1,0\n2,1\n3,NaN\n4,1\n", "only words, got 1 of 4 that are no numbers, such as 'NaN'"),
        ("a,b\n1,0\n2,1\n3,1_0\n4,1\n", "only words, got 1 of 4 that are no numbers, such as '1_0'"),
        ("a,b\n1e307,x\n3,y\n4,y\n", "finite number in line 2, column 'a', got '1e307'"),
    ],
)
def test_bad_tables_are_one_line_and_leave_nothing(tmp_path, text, message):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message) as raised:
        fetch_dataset("mine", source=path, cache=tmp_path / "cache")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "cache").exists()


def test_sources_and_targets_that_make_no_sense(tmp_path):
    with pytest.raises(DatasetError, match=r"expected a table at .*missing.csv, got: No such file"):
        fetch_dataset("mine", source=tmp_path / "missing.csv", cache=tmp_path)
    with pytest.raises(
        DatasetError, match="expected a target among the columns width, height, depth, goal, got 'gaol'"
    ):
        read_table(table(tmp_path, range(50)), name="mine", target="gaol")
    with pytest.raises(DatasetError, match=r"target: expected a table FILE.csv as source for column 'goal', got None"):
        fetch_dataset("mine", target="goal", cache=tmp_path)
    (tmp_path / "binary.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(DatasetError, match="expected a CSV file in UTF-8"):
        read_table(tmp_path / "binary.csv", name="mine")
