"""The page: one file that fetches nothing and holds every run and every figure."""

from __future__ import annotations

import json
import re
import struct
from html.parser import HTMLParser

import pytest

from eval.report import main
from eval.runs.page.page import script_json
from eval.runs.page.panels import PANELS
from tests.panel_runs import write_run, write_sweep

NAMES = ["dense", "going", "half", "most", "most-twin"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_sweep(folder / "sweep")
    main([f"runs={folder}/sweep", f"page={folder}/out/levels.html", "title=Five & one"])
    return folder / "out" / "levels.html"


@pytest.fixture(scope="module")
def html(page):
    return page.read_text()


class Tags(HTMLParser):
    """A parser that keeps (tag, attributes) of every element, and checks that all elements are closed."""

    VOID = ("meta", "input", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tags(html):
    parsed = Tags(html)
    assert parsed.open == []
    return parsed.found


def curves_of(html):
    return json.loads(re.search(r'id="curves">(.*?)</script>', html, re.S)[1])


def test_the_page_and_a_png_of_each_figure_are_written(page, html):
    pngs = {file.stem for file in page.with_suffix("").glob("*.png")}
    lines = {panel.name for panel in PANELS if panel.kind != "layers"} - {"heldout_loss"}
    assert pngs == lines | {"layer_density-1", "layer_density-2", "layer_density-3"}
    for file in page.with_suffix("").glob("*.png"):
        width, height = struct.unpack(">II", file.read_bytes()[16:24])
        assert width == 960
        assert height > 200
    assert len(html) < 500_000


def test_the_table_has_a_row_for_each_run_in_the_series_columns(html):
    rows = re.findall(r"<tr.*?>(.*?)</tr>", html, re.S)
    assert len(rows) == 1 + len(NAMES)
    assert re.findall(r"<th scope=\"col\">(.*?)</th>", rows[0])[-1] == "Perplexity"
    assert [re.search(r"scope=\"row\">([\w-]+)", row)[1] for row in rows[1:]] == NAMES
    cells = {name: re.findall(r"<td>(.*?)</td>", row) for name, row in zip(NAMES, rows[1:], strict=True)}
    assert cells["half"][2:5] == ["22.56K", "15.04K", "50.00%"]
    assert cells["half"][8].endswith("± 0.010")
    assert cells["going"][8:] == ["", ""]
    assert "not finished: step 12 of 40" in rows[2]


def test_every_panel_that_runs_fill_is_a_figure_with_words_and_an_svg(tags, html):
    figures = [attributes["id"] for tag, attributes in tags if tag == "figure"]
    expected = [
        name
        for panel in PANELS
        for name in ([f"layer_density-{run}" for run in (1, 2, 3)] if panel.kind == "layers" else [panel.name])
        if name != "heldout_loss"
    ]
    assert figures == expected
    plots = [attributes for _, attributes in tags if attributes.get("role") == "img" and "aria-label" in attributes]
    assert len(plots) == len(expected)
    assert all("most ends at" in plot["aria-label"] for plot in plots if plot.get("data-panel") == "density")
    assert "<b>Held-out loss against tokens</b>: no run has recorded it." in html


def test_nothing_is_fetched_from_anywhere(tags, html):
    policy = next(a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    assert {"link", "img", "iframe", "image", "object"}.isdisjoint(tag for tag, _ in tags)
    for tag, attributes in tags:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "srcset", "action"):
                assert value.startswith("#"), (tag, name, value)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)


def test_ids_are_those_of_one_element_and_references_lead_to_one(tags):
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in tags:
        if (target := attributes.get("xlink:href")) is not None:
            assert target[1:] in ids


def test_a_run_can_be_hidden_everywhere_it_is_drawn(html):
    for number in range(len(NAMES)):
        assert f'body:has(#show-{number}:not(:checked)) [data-run="{number}"] {{ display: none; }}' in html
    drawn = re.findall(r'<g data-run="(\d)"', html)
    assert {run: drawn.count(str(run)) for run in range(5)} == {0: 11, 1: 8, 2: 12, 3: 12, 4: 11}


def test_a_figure_of_one_run_is_hidden_with_it(tags):
    own = {attributes["id"]: attributes.get("data-run") for tag, attributes in tags if tag == "figure"}
    assert {name: run for name, run in own.items() if run} == {f"layer_density-{run}": str(run) for run in (1, 2, 3)}


def test_data_cannot_end_the_script_that_holds_it():
    assert script_json({"name": "</script>"}) == '{"name":"\\u003c/script>"}'


def test_the_values_under_the_pointer_are_the_runs_own(html):
    data = curves_of(html)
    assert [run["name"] for run in data["runs"]] == NAMES
    panel = data["panels"]["density"]
    half = next(curve for curve in panel["curves"] if curve["run"] == 2)
    assert (half["x"][:2], half["y"][0], half["y"][-1]) == ([256, 512], 1, 0.5)
    assert panel["y"][0] == 0
    left, top, right, bottom = panel["box"]
    assert 0 < left < right < 6.4 * 72
    assert 0 < top < bottom < 3.4 * 72


def test_colours_are_the_pages_own_in_light_and_dark(html):
    svgs = "".join(re.findall(r"<svg .*?</svg>", html, re.S))
    assert "var(--pair-" in svgs
    assert "var(--ink)" in svgs
    assert not re.search(r"#(1f5fa8|1c1c1c|fdfdfd|000000)\b", svgs)
    assert "@media (prefers-color-scheme: dark)" in html
    used = set(re.findall(r"var\((--[\w-]+)\)", html))
    for theme in re.findall(r":root \{(.*?)\}", html, re.S):
        assert used - {"--own"} <= set(re.findall(r"(--[\w-]+):", theme))


def test_the_law_and_the_samples_are_on_the_page_and_text_is_text(html):
    assert "Five &amp; one" in html
    assert "L = A / N^alpha with A = " in html
    assert "The most says &lt;b&gt;" in html
    assert "law at 5.1K tokens" in html


@pytest.mark.parametrize("name", ["<img src=x>", "ünï 8 % & 'more'"])
def test_a_run_of_any_name_cannot_break_the_page(tmp_path, name):
    write_run(tmp_path / "sweep" / name, steps=3)
    main([f"runs={tmp_path}/sweep", f"page={tmp_path}/page.html"])
    html = (tmp_path / "page.html").read_text()
    assert "img" not in {tag for tag, _ in Tags(html).found}
    assert curves_of(html)["runs"][0]["name"] == name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "runs=[] names nothing"),
        (["runs=missing"], "runs=missing is not there"),
        (["runs=.", "page=report.pdf"], "page=report.pdf is not an HTML file"),
        (["runs=.", "form=cubic"], "choose one of auto, nd, n, power"),
        (["runs=.", "los=x"], "did you mean loss?"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in said
    assert said.count("\n") == 1


def test_a_run_states_the_choices_that_move_its_results(tmp_path):
    write_run(tmp_path / "a", sparsity=0.5, choices=["scores of <q> times 0.0625", "drawn by fan-in"])
    write_run(tmp_path / "b", sparsity=0.5, choices=3)
    write_run(tmp_path / "c", sparsity=0.5)
    main([f"runs={tmp_path}", f"page={tmp_path}/page.html"])
    html = (tmp_path / "page.html").read_text()
    assert ">a<small>scores of &lt;q&gt; times 0.0625, drawn by fan-in</small></th>" in html
    assert html.count("<small>scores") == 1
