"""Pieces of a page: nothing from outside is HTML, and figures are data."""

import base64
import gzip
import json
import re
import sys

import pandas as pd
import pytest
from plotly.offline import get_plotlyjs

from dfkt.analysis.charts import blank
from dfkt.analysis.html import check_plotly, drawing, folded, is_ours, notes, page, paragraph, plot, section, table
from dfkt.errors import ConfigError

WILD = "<script>alert('x')</script>&\"'"


def test_no_text_from_outside_becomes_a_tag() -> None:
    figure = blank().add_scatter(x=[1], y=[1], name=WILD)
    parts = [
        paragraph(WILD),
        notes([WILD]),
        section(WILD, "x", name=WILD),
        folded(WILD, "x"),
        table(pd.DataFrame({WILD: [WILD]})),
        drawing("", WILD),
        plot(figure, WILD),
    ]
    for part in parts:
        assert "alert" in part
        assert "<script>" not in part
    assert "<script>" not in page(WILD, "", WILD).partition("<style>")[0]


def test_a_figures_data_cannot_end_its_script_and_is_read_back_whole() -> None:
    text = plot(blank().add_scatter(x=[1], y=[2], name="</script><b>"), "c")
    (data,) = re.findall(r'<script type="application/json">(.*?)</script>', text)
    assert json.loads(data)["data"][0]["name"] == "</script><b>"


def test_a_legend_names_every_trace_once_with_its_look() -> None:
    figure = blank().add_scatter(x=[1], y=[1], name="a", mode="markers", marker={"color": "red", "symbol": "star"})
    figure.add_scatter(x=[1], y=[1], name="b", mode="lines", line={"color": "blue", "dash": "dash"})
    figure.add_scatter(x=[1], y=[1], name="b", mode="lines", line={"color": "blue"}, showlegend=False)
    figure.add_bar(x=[1], y=[1], name="c", marker={"color": "green"})
    found = re.findall(r'<span><i style="color:(\w+)">(.+?)</i> (\w)</span>', plot(figure, "caption"))
    assert found == [("red", "★", "a"), ("blue", "╍╍", "b"), ("green", "●", "c")]
    assert 'class="key"' not in plot(blank().add_scatter(x=[1], y=[1]), "caption")


def test_a_wide_figure_scrolls_in_its_own_box() -> None:
    assert "min-width:900px" in plot(blank(), "c", least=900)
    assert "min-width" not in plot(blank(), "c")


def test_an_empty_part_has_no_title() -> None:
    assert section("title", "", "") == ""
    assert section("title", "x", level=4) == "<section><h4>title</h4>x</section>"


def test_cells_that_are_null_are_empty_and_long_ones_fold() -> None:
    text = table(pd.DataFrame({"a": [None, "word " * 20, "1" * 50]}))
    assert "<td></td>" in text
    assert '<td class="long">word' in text
    assert "<td>111" in text


def test_a_page_holds_plotly_and_loads_nothing() -> None:
    text = page("title", "<p>body</p>", "0.1.0")
    (packed,) = re.findall(r'id="packed">(.*?)</script>', text)
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    rest = text.replace(packed, "")
    assert not re.search(r"(src|href)=|https?:|@import", rest)
    assert "default-src 'none'" in rest
    assert len(text) < 3_000_000
    assert page("title", "<p>body</p>", "0.1.0") == text


def test_a_page_is_known_by_its_generator_only() -> None:
    assert is_ours(page("t", "", "1")[:4096])
    assert not is_ours("<html><p>dfkt report</p>")
    assert not is_ours('<meta name="generator" content="dfkt reporter">')


def test_without_plotly_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ConfigError, match=r"pip install 'dfkt\[report\]'"):
        check_plotly()
