"""tools/complexity.py: what is counted is what section 3.2 of the paper says."""

import json

from tools import complexity, figures


def test_products_are_those_of_the_formulas():
    rows = {(row["kind"], row["side"]): row for row in complexity.by_side()}
    assert all(row["products"] == row["formula"] for row in rows.values())
    assert rows["LSA", 56]["products"] == 2 * 56**2 * 49 * 64 and rows["full", 56]["products"] == 2 * 56**4 * 64
    for kind, growth in (("LSA", 4), ("GSA", 16), ("full", 16)):  # of twice the side, so of four times the tokens
        assert rows[kind, 112]["products"] == growth * rows[kind, 56]["products"]
    projections = 4 * 56**2 * 64**2  # of q, k, v and the output
    assert rows["LSA", 56]["layer"] == rows["LSA", 56]["products"] + projections
    assert rows["full", 56]["layer"] == rows["full", 56]["products"] + projections


def test_the_best_window_is_near_the_root_of_the_side():
    rows = complexity.by_window()
    assert all(row["products"] == row["formula"] for row in rows)
    assert min(rows, key=lambda row: row["products"])["window"] in (7, 8)  # sqrt(56) is 7.5


def test_the_record_and_the_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(complexity, "SIDES", (14, 28))
    for words, panels in (([], 2), (["--time", "--repeats", "1"], 3)):
        complexity.main([*words, "--output", str(tmp_path)])
        record = json.loads((tmp_path / "complexity.json").read_text())
        assert [row["side"] for row in record["by_side"]] == [14, 28] * 3
        assert all((row["ms"] or 0) > 0 for row in record["by_side"]) == bool(words)
        figure = figures.complexity(tmp_path)
        assert len(figure.axes) == panels
        formula, counted = (line.get_ydata() for line in figure.axes[0].lines[:2])
        assert list(formula) == list(counted)
