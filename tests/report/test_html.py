"""The HTML report in a real browser, by clicks and keys, on real sessions and on bad ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pages
import pytest

from gradscope.errors import NotAnalysedError
from gradscope.findings import Finding, Source, State
from gradscope.flow import FlowGraph, FlowNode
from gradscope.merging import Part, merged
from gradscope.report import boxes, issue
from gradscope.report.formats import render
from gradscope.scanning.scanner import scan
from gradscope.session import Comparison, Session


@pytest.fixture(scope="session")
def deepseek() -> Session:
    """Trace the real encoder, once."""
    pytest.importorskip("deepseek_ocr_encoder")
    from gradscope.targets.deepseek_ocr import preset
    from gradscope.targets.request import Request
    from gradscope.tracing.tracer import trace_subject
    from gradscope.tracing.workshops import open_workshop

    return trace_subject(preset(Request()), open_workshop("structural", "auto", None))


@pytest.fixture(scope="session")
def scanned() -> Session:
    pytest.importorskip("deepseek_ocr_encoder")
    return scan("deepseek_ocr_encoder", cache=False)


@pytest.fixture(scope="session")
def checked(scanned: Session) -> Session:
    parts = [Part("scan deepseek_ocr_encoder", "scan", scanned), Part("trace m", "trace", pages.thousand(10)),
             Part("trace n", "trace", failure=NotAnalysedError("There is no n."))]  # fmt: skip
    return merged(parts, "pyproject.toml")


def in_sight(locator: Any) -> bool:
    """Tell whether the top left corner of an element is what is seen there: on the screen and not covered."""
    seen: bool = locator.evaluate(
        """node => {
            const { left, top } = node.getBoundingClientRect();
            const there = document.elementFromPoint(left + 8, top + 8);
            return !!there && node.contains(there);
        }"""
    )
    return seen


# --- what is on the page ---------------------------------------------------------------------------


def test_the_founding_case_is_told_from_the_verdict_down(deepseek: Session, opened: Any) -> None:
    shown = opened(deepseek)
    page = shown.page
    assert shown.file.stat().st_size < 1_000_000
    assert page.locator("h1").inner_text().endswith("The gradient does not arrive.")
    order = ["#verdict", "#fix", "#findings", "#graph", "#sources", "#limits"]
    tops = [page.locator(name).bounding_box()["y"] for name in order]
    assert tops == sorted(tops)
    assert page.locator("article.finding").count() == len(deepseek.findings)
    assert "verified by running it" in page.locator("#fix").inner_text()
    for remark in deepseek.remarks:
        assert remark in page.locator("#limits").inner_text()


def test_the_marked_line_is_the_line_in_the_file(deepseek: Session, opened: Any) -> None:
    import deepseek_ocr_encoder

    page = opened(deepseek).page
    folder = Path(deepseek_ocr_encoder.__file__).parents[1]
    for finding in deepseek.findings:
        lines = (folder / finding.path).read_text(encoding="utf-8").splitlines()
        card = page.locator(f"#{finding.id}")
        card.locator("details").evaluate("details => { details.open = true }")
        hit = card.locator(".row.hit")
        assert hit.locator(".number").inner_text().strip("▶ \n") == str(finding.line)
        assert hit.locator(".text").inner_text().rstrip("\n") == lines[finding.line - 1].rstrip()
        assert card.locator(".row").count() == 7


def test_a_scan_is_told_too(scanned: Session, opened: Any) -> None:
    page = opened(scanned).page
    assert page.locator("article.finding").count() == len(scanned.findings)
    assert page.locator("#graph, #sources").count() == 0
    ways = page.locator("#entries li.way")
    assert ways.count() == len(scanned.entries)
    assert "encode ✂ inference_mode, line 171" in " ".join(ways.nth(0).inner_text().split())
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.id") == "F1"
    page.locator("#finding-search").fill("cached")
    kept = [finding.id for finding in scanned.findings if "cached" in finding.name + finding.message]
    assert [card.get_attribute("id") for card in page.locator("article.finding:visible").all()] == kept != []


def test_it_reads_without_scripts(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek, java_script_enabled=False).page
    text = page.locator("main").inner_text()
    assert deepseek.findings[0].message in text
    assert "need JavaScript" in text
    assert page.get_by_role("button", name="Show in graph").count() == 0


# --- the graph -------------------------------------------------------------------------------------


def test_from_a_finding_to_its_box_and_back(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page
    page.locator("#F3 summary").click()
    for finding in deepseek.findings:
        page.locator(f"#{finding.id}").get_by_role("button", name="Show in graph").click()
        box = page.locator(".label:focus")
        assert in_sight(box)
        tag = box.locator(".tag")
        assert tag.inner_text() == f"{finding.id} {finding.rule}"
        tag.click()
        assert page.evaluate("document.activeElement.id") == finding.id
        assert in_sight(page.locator(f"#{finding.id}"))
        page.keyboard.press("s")
        assert page.locator(".label:focus .tag").inner_text() == f"{finding.id} {finding.rule}"
        page.keyboard.press("s")
        assert page.evaluate("document.activeElement.id") == finding.id


def test_repeats_open_to_all_their_members_and_shut_again(deepseek: Session, opened: Any) -> None:
    shown = opened(deepseek)
    page = shown.page
    before = page.locator(".box").count()
    folded = shown.box("blocks.0-11")
    assert folded.locator("> .label").get_attribute("aria-expanded") == "false"
    folded.locator("> .label").click()
    names = [each.inner_text() for each in folded.locator("> .body > .line > .box > .label > .name").all()]
    assert names == [f"blocks.{number}" for number in range(12)]
    folded.locator("> .label").click()
    assert page.locator(".box").count() == before


def test_every_node_is_in_the_graph_once(deepseek: Session, opened: Any) -> None:
    shown = opened(deepseek)
    shown.page.get_by_role("button", name="Open all").click()
    drawn = shown.page.locator(".pane:not([hidden]) .box:not(.k-group) > .label > .name").all_inner_texts()
    assert sorted(drawn) == sorted(" ".join(node.label.split()) for node in deepseek.graph.nodes)
    assert shown.page.locator(".body:not(:has(.box))").count() == 0


@pytest.mark.parametrize("zoomed", [False, True])
def test_edges_run_from_box_to_box(deepseek: Session, opened: Any, zoomed: bool) -> None:
    shown = opened(deepseek)
    for label in ("blocks.0-11", "blocks.3", "clip_tr", "layers.0-23"):
        shown.box(label).first.locator("> .label").click()
    if zoomed:
        shown.page.get_by_role("button", name="Zoom out").click()
    off = shown.page.evaluate(
        """() => [...document.querySelectorAll(".pane:not([hidden]) .edge")].flatMap(edge => {
            const path = edge.querySelector("path"), matrix = path.getScreenCTM();
            return [["from", 0], ["to", path.getTotalLength()]].flatMap(([end, at]) => {
                const point = path.getPointAtLength(at).matrixTransform(matrix);
                const item = edge.closest(".pane").querySelector(`[data-index="${edge.dataset[end]}"]`);
                const { left, right, top, bottom } = item.getBoundingClientRect();
                // How far outside the box, below 0 inside of it.
                const dx = Math.max(left - point.x, point.x - right), dy = Math.max(top - point.y, point.y - bottom);
                return Math.abs(Math.max(dx, dy)) > 2 ? [[edge.dataset.from, edge.dataset.to, end, dx, dy]] : [];
            });
        })"""
    )
    assert shown.page.locator(".edge").count() > 40
    assert off == []


@pytest.mark.parametrize("made", ["deepseek", "thousand", "lattice"])
def test_edges_cross_no_box(made: str, opened: Any, request: pytest.FixtureRequest) -> None:
    session = getattr(pages, made)() if hasattr(pages, made) else request.getfixturevalue(made)
    page = opened(session, full=True).page
    if session.healed is not None:
        page.get_by_role("button", name="Side by side").click()
    crossing = page.evaluate(
        """() => [...document.querySelectorAll(".body")].flatMap(body => {
            const boxes = [...body.querySelectorAll(":scope > .line > .box")];
            const places = boxes.map(box => [box.dataset.index, box.getBoundingClientRect()]);
            return [...body.querySelectorAll(":scope > svg > .edge")].flatMap(edge => {
                const path = edge.querySelector("path"), step = path.getTotalLength() / 39;
                const matrix = path.getScreenCTM();
                const points = [...Array(40).keys()].map(n => path.getPointAtLength(step * n).matrixTransform(matrix));
                const hit = ([index, b]) => {
                    const own = index === edge.dataset.from || index === edge.dataset.to ? 3 : 0;
                    return points.some(p => p.x > b.left + own && p.x < b.right - own && p.y > b.top + own
                        && p.y < b.bottom - own);
                };
                return places.filter(hit).map(([index]) => [edge.dataset.from, edge.dataset.to, index]);
            });
        })"""
    )
    assert page.locator(".edge").count() >= len(session.graph.edges)
    assert crossing == []


def test_no_two_boxes_overlap_but_by_nesting(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek, full=True).page
    overlapping = page.evaluate(
        """() => [...document.querySelectorAll(".body")].flatMap(body => {
            const places = [...body.querySelectorAll(":scope > .line > .box")].map(box => box.getBoundingClientRect());
            const o = body.getBoundingClientRect();
            const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
            const out = (a) => a.left < o.left - 1 || a.right > o.right + 1 || a.bottom > o.bottom + 1;
            return places.filter((a, i) => out(a) || places.slice(i + 1).some(b => meet(a, b)));
        }).length"""
    )
    assert page.locator(".box").count() > 200
    assert overlapping == 0


def test_the_arrows_walk_the_boxes(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page

    def name() -> str:
        text: str = page.locator(".label:focus > .name").inner_text()
        return " ".join(text.split())

    page.keyboard.press("g")
    assert name() == "image 1024x1024"
    for key, expected in (("ArrowDown", "made once, in the constructor"), ("ArrowDown", "encode @inference_mode"),
                          ("ArrowRight", "preprocess (7 steps)"), ("ArrowLeft", "encode @inference_mode"),
                          ("End", "output.0"), ("Home", "image 1024x1024")):  # fmt: skip
        page.keyboard.press(key)
        assert name() == expected
        assert in_sight(page.locator(".label:focus"))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert page.locator(".label:focus").get_attribute("aria-expanded") == "true"
    assert page.locator('.label[tabindex="0"]').count() == 1


def test_search_finds_what_is_folded_away(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page
    page.locator("#graph").scroll_into_view_if_needed()
    page.keyboard.press("/")
    page.keyboard.type("layers.17 mlp")
    wanted = [node for node in deepseek.graph.nodes if "layers.17" in node.module and "mlp" in node.module]
    assert page.locator("#graph-hits").inner_text() == f"{len(wanted)} box" + "es" * (len(wanted) != 1)
    page.keyboard.press("Enter")
    found = page.locator(".box.selected")
    assert found.locator("> .label > .name").inner_text() == "mlp"
    assert in_sight(found)
    said = page.locator("#selected").inner_text()
    assert "clip_tr.layers.17.mlp" in said
    assert "null" not in said
    page.get_by_role("button", name="Its 4 sources").click()
    assert page.locator("#source-table tbody tr").count() == 4


def test_before_and_after_stand_side_by_side(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page
    page.get_by_role("button", name="Side by side").click()
    first, second = page.locator(".pane").all()
    assert first.bounding_box()["y"] == second.bounding_box()["y"]
    assert first.locator(".box.cut").count() == 2
    assert second.locator(".box.s-blocked").count() == 0
    # What is opened in one is opened in the other.
    first.locator(".name", has_text="clip_tr").click()
    assert second.locator(".name", has_text="layers.0-23").count() == 1
    assert deepseek.healed is not None
    before = {node.module: node.status for node in deepseek.graph.nodes if node.kind == "module"}
    assert [node.module for node in deepseek.healed.nodes if node.kind == "module" and node.status == "blocked"] == []
    assert before["sam"] == "blocked"
    assert "was ✗" in second.locator(".box", has_text="patch_embed").last.inner_text()
    page.get_by_role("button", name="Without F1 + F2").click()
    assert [pane.is_visible() for pane in page.locator(".pane").all()] == [False, True]


def test_the_graph_is_moved_by_the_mouse_and_zoomed_by_the_wheel(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page
    page.locator(".view").first.scroll_into_view_if_needed()
    frame = page.locator(".view").first.bounding_box()
    x, y = frame["x"] + 30, frame["y"] + frame["height"] - 40
    selected = page.locator(".box.selected").count()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - 200, steps=4)
    page.mouse.up()
    assert page.locator(".view").first.evaluate("view => view.scrollTop") == 200
    assert page.locator(".box.selected").count() == selected
    box = page.locator('.box[data-index="0"]').first
    before = box.bounding_box()["width"]
    page.keyboard.down("Control")
    page.mouse.wheel(0, -120)
    page.keyboard.up("Control")
    assert box.bounding_box()["width"] > before * 1.2
    page.keyboard.press("0")
    assert box.bounding_box()["width"] == pytest.approx(before, abs=1)


# --- the table -------------------------------------------------------------------------------------


def test_the_table_filters_and_sorts(opened: Any) -> None:
    session = pages.thousand()
    page = opened(session).page

    def names() -> list[str]:
        found: list[str] = page.locator("#source-table tbody th").all_inner_texts()
        return found

    page.locator("#source-search").fill("stage7 F1")
    wanted = [s.name for s in session.sources.values() if s.name.startswith("stage7.") and s.findings]
    assert page.locator("#source-count").inner_text() == f"{len(wanted)} of 5000"
    assert names() == wanted[: len(names())]
    page.locator("#source-search").fill("")
    page.get_by_role("button", name="Gradient norm").click()
    norm = {name: source.gradient.norm_l2 for name, source in session.sources.items() if source.gradient}
    assert [norm[name] for name in names()] == sorted(norm.values())[: len(names())]
    page.get_by_role("button", name="Gradient norm").click()
    assert page.locator("th[aria-sort=descending]").count() == 1
    assert norm[names()[0]] == max(norm.values())
    # The rest comes as one scrolls.
    page.locator("#sources .scroller").evaluate("node => { node.scrollTop = node.scrollHeight }")
    page.locator("#source-table tbody tr").nth(200).wait_for(state="attached")


def test_a_chip_of_a_finding_filters_the_table(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page
    page.locator("#F2 .chip", has_text="sam.").click()
    wanted = sum(name.startswith("sam.") for name in deepseek.findings[1].cuts)
    assert page.locator("#source-count").inner_text() == f"{wanted} of {len(deepseek.sources)}"


# --- keys, copying, themes -------------------------------------------------------------------------


def test_keys_go_from_finding_to_finding(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek).page
    seen = []
    for key in ("j", "j", "j", "j", "k"):
        page.keyboard.press(key)
        seen.append(page.evaluate("document.activeElement.id"))
    assert seen == ["F1", "F2", "F3", "F3", "F2"]
    assert page.url.endswith("#F2")
    page.keyboard.press("?")
    assert page.locator("dialog#help").is_visible()
    page.keyboard.press("j")
    page.keyboard.press("Escape")
    assert not page.locator("dialog#help").is_visible()
    assert page.url.endswith("#F2")


def test_all_that_can_be_pressed_is_reached_and_shows_it(scanned: Session, opened: Any) -> None:
    page = opened(scanned).page
    wanted = page.locator(
        "a[href]:visible, button:visible, summary:visible, input:visible, pre[tabindex]:visible"
    ).count()
    reached = set()
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        mark = page.evaluate(
            """() => {
                const node = document.activeElement, style = getComputedStyle(node);
                const index = [...document.querySelectorAll("*")].indexOf(node);
                const outlined = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
                return [index, outlined || node === document.body];
            }"""
        )
        assert mark[1]
        reached.add(mark[0])
    assert len(reached) >= wanted


def test_an_issue_is_copied_whole(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek, permissions=["clipboard-read", "clipboard-write"]).page
    page.locator("#F1").get_by_role("button", name="Copy Markdown").click()
    page.wait_for_selector(".toast.on")
    text = page.evaluate("navigator.clipboard.readText()")
    assert text == issue.text(deepseek.findings[0], deepseek)
    page.locator("#F1").get_by_role("button", name="Copy the command").click()
    assert page.evaluate("navigator.clipboard.readText()") == "gradscope explain GS101"


def test_a_browser_without_a_clipboard_copies_too(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek, permissions=["clipboard-read"]).page
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('not here')) }")
    page.locator("#F1").get_by_role("button", name="Copy file:line").click()
    page.wait_for_selector(".toast.on")
    assert (
        page.evaluate("navigator.clipboard.readText()")
        == f"deepseek_ocr_encoder/encoder.py:{deepseek.findings[0].line}"
    )


def test_the_theme_follows_the_system_until_one_is_chosen(scanned: Session, opened: Any) -> None:
    page = opened(scanned, color_scheme="dark").page
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.keyboard.press("d")
    light = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == light
    page.locator("#theme").click()
    assert page.evaluate(ground) == dark


# --- bad strings, large graphs, small screens ------------------------------------------------------


@pytest.mark.parametrize("kind", ["trace", "scan"])
def test_nothing_a_program_is_called_by_is_run(opened: Any, kind: str) -> None:
    session = pages.hostile()
    session.kind = kind
    if kind == "scan":
        session.verdict = "blocked"
    page = opened(session, full=True).page
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    message = page.locator("#F1 .message").inner_text()
    for text in pages.HOSTILE[:6]:
        assert text in message
    assert r"\u202e\u2066evil\u2069 \u200b" in message
    assert "漢字 עברית 🙂" in message
    name = page.locator(".box .name").first.inner_text()
    assert "<img src=x" in name
    assert r"\u202e\u2066evil\u2069 \u200b" in name
    if kind == "trace":
        assert page.locator("#source-table tbody td.number").inner_text() == "not finite"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("made", ["deepseek", "scanned", "hostile", "thousand"])
def test_a_phone_shows_it_without_scrolling_sideways(made: str, opened: Any, request: pytest.FixtureRequest) -> None:
    session = getattr(pages, made)() if hasattr(pages, made) else request.getfixturevalue(made)
    page = opened(session, width=390, height=844, is_mobile=True, has_touch=True).page
    assert page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390]


def test_a_card_has_one_margin_on_a_phone(deepseek: Session, opened: Any) -> None:
    page = opened(deepseek, width=390, height=844, is_mobile=True, has_touch=True).page
    card, text = page.locator("#F1").bounding_box(), page.locator("#F1 .message").bounding_box()
    assert text["x"] - card["x"] < 20
    assert page.locator("#source-search").bounding_box()["width"] == page.locator("#sources").bounding_box()["width"]


def test_a_frame_is_as_high_as_its_graph_and_no_higher_than_the_screen(deepseek: Session, opened: Any) -> None:
    nodes = [FlowNode(name, name * 3, "module", "flows", module=name) for name in "abc"]
    low = opened(Session("trace", "flows", target=pages.TARGET, graph=FlowGraph(nodes))).page
    high = opened(deepseek).page

    def height(page: Any, name: str) -> float:
        found: float = page.locator(name).first.bounding_box()["height"]
        return found

    before = height(low, ".canvas")
    assert 0 < height(low, ".view") - before < 4
    assert height(high, ".view") < 700 < height(high, ".canvas")
    # What was made smaller is made larger again by the same button.
    low.get_by_role("button", name="Zoom out").click()
    low.get_by_role("button", name="Fit").click()
    assert height(low, ".canvas") == pytest.approx(before, abs=1)


def test_a_thousand_nodes_stay_quick(opened: Any) -> None:
    shown = opened(pages.thousand())
    page = shown.page
    assert page.locator(".box").count() <= boxes.MOST_VISIBLE
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert took < 3000
    clock = """name => { const t = performance.now();
        [...document.querySelectorAll('button')].find(b => b.textContent === name).click();
        document.querySelector('.canvas').offsetHeight; return performance.now() - t }"""
    assert page.evaluate(clock, "Open all") < 3000
    assert page.locator(".box:not(.k-group)").count() == 1001
    toggle = """() => { const t = performance.now();
        document.querySelector('.box.k-module > .label').click();
        document.querySelector('.canvas').offsetHeight; return performance.now() - t }"""
    assert page.evaluate(toggle) < 1000
    page.locator("#F1").get_by_role("button", name="Show in graph").click()
    assert in_sight(page.locator(".label:focus"))
    filtering = """() => { const t = performance.now(), field = document.querySelector('#source-search');
        field.value = 'w49'; field.dispatchEvent(new Event('input')); return performance.now() - t }"""
    assert page.evaluate(filtering) < 500


def test_a_thousand_boxes_in_one_are_drawn(opened: Any) -> None:
    session = pages.thousand()
    session.graph.edges.clear()
    for node in session.graph.nodes:
        node.parent = None
    assert opened(session, full=True).page.locator(".box:not(.k-group)").count() == 1001


def test_print_has_all_of_it(deepseek: Session, opened: Any, tmp_path: Path) -> None:
    pymupdf = pytest.importorskip("pymupdf")
    page = opened(deepseek).page
    page.pdf(path=tmp_path / "report.pdf", print_background=True)
    with pymupdf.open(tmp_path / "report.pdf") as document:
        text = "".join(sheet.get_text() for sheet in document)
    for name in (deepseek.findings[2].message.split(".")[0], list(deepseek.sources)[-1], "What could not be seen"):
        assert name in text


# --- accessibility ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def axe() -> str:
    """Return axe-core's script: from GRADSCOPE_AXE, or a node_modules folder above here (npm install axe-core)."""
    folders = [Path(__file__).parents[level] / "node_modules" / "axe-core" for level in (1, 2)]
    places = [Path(os.environ.get("GRADSCOPE_AXE", "")), *(folder / "axe.min.js" for folder in folders)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        pytest.skip("axe-core is not here: npm install axe-core, or point GRADSCOPE_AXE at its axe.min.js")
    return found.read_text(encoding="utf-8")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
@pytest.mark.parametrize("made", ["deepseek", "scanned", "thousand", "checked"])
def test_axe_finds_nothing_serious(
    made: str, scheme: str, width: int, axe: str, opened: Any, request: pytest.FixtureRequest
) -> None:
    session = pages.thousand(200) if made == "thousand" else request.getfixturevalue(made)
    page = opened(session, full=made != "thousand", color_scheme=scheme, width=width).page
    for details in page.locator("#rules details").all():
        details.evaluate("node => { node.open = true }")
    if session.healed is not None:
        page.get_by_role("button", name="Side by side").click()
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")
    grave = [
        (each["id"], each["impact"], each["nodes"][0]["html"][:200], each["nodes"][0].get("failureSummary"))
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
    ]
    assert grave == []


def test_the_page_refuses_what_was_not_written_into_it(scanned: Session, opened: Any) -> None:
    shown = opened(scanned)
    refused = shown.page.evaluate(
        """async () => {
            const tries = {
                markup: () => { document.body.innerHTML = "<b>x</b>"; },
                script: () => { document.body.append(Object.assign(document.createElement("script"), { text: "1" })); },
                handler: () => { document.body.setAttribute("onclick", "1"); },
                request: () => fetch("https://example.org/"),
            };
            const refused = [];
            for (const [name, attempt] of Object.entries(tries))
                try { await attempt(); } catch { refused.push(name); }
            return refused;
        }"""
    )
    assert {"markup", "script", "request"} <= set(refused)
    assert all(
        "Content Security Policy" in said or "TrustedHTML" in said or "Trusted" in said for said in shown.complaints
    )
    shown.complaints.clear()


# --- what needs no browser -------------------------------------------------------------------------


def test_the_assets_name_no_place_outside() -> None:
    from gradscope.report.html import ASSETS, SCRIPTS

    for name in (*SCRIPTS, "theme.js", "report.css", "report.html"):
        text = ASSETS.joinpath(name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for word in ("http:", "https:", "innerHTML", "url(", "@import", "eval("):
            assert word not in text.replace("url(#arrow", "").replace("scaleEval(", ""), (name, word)


def test_a_session_without_graph_sources_or_findings_is_a_page_too() -> None:
    text = render(Session("trace", "flows", target=pages.TARGET), "html").decode()
    assert "The gradient arrives." in text
    assert 'id="graph"' not in text


def held(state: State, **fields: Any) -> Session:
    cut = Finding("F1", "GS201", "detach", "error", "A detach.", "m.py", 3, cuts=("w",), verified=True, state=state)
    return Session("trace", "blocked", target=pages.TARGET, sources={"w": Source("w", "parameter", "blocked", False,
                   ["F1"])}, findings=[cut], **fields)  # fmt: skip


@pytest.mark.parametrize("fmt", ["html", "markdown", "text"])
def test_every_report_says_how_it_stands_and_mends_nothing_that_is_meant(fmt: str) -> None:
    known = render(held("unchanged", fix_set=["F1"], baseline=Comparison("b.json", 2)), fmt).decode().lower()
    assert "beside b.json: 0 new, 1 unchanged, 2 fixed" in known and "smallest fix" in known
    meant = render(held("expected", fix_set=["F1"]), fmt).decode().lower()
    assert "1 finding is expected and does not count" in meant and "smallest fix" not in meant


@pytest.mark.parametrize("fmt", ["html", "text"])
def test_what_was_taken_away_for_a_run_is_not_said_to_stay(fmt: str) -> None:
    shown = render(held(""), fmt).decode()  # the other part of its fix set is left out by --ignore, say
    assert "taken away for a run" not in shown


def test_edges_of_folded_boxes_join_boxes_with_one_parent(deepseek: Session) -> None:
    drawn = boxes.build(deepseek.graph, deepseek)
    for first, second, _ in drawn["edges"]:
        assert drawn["boxes"][first]["up"] == drawn["boxes"][second]["up"]
    assert all(box["up"] < index for index, box in enumerate(drawn["boxes"]))


def test_an_issue_is_markdown_that_says_what_was_found(deepseek: Session) -> None:
    from markdown_it import MarkdownIt

    finding = deepseek.findings[1]
    tokens = MarkdownIt().parse(issue.text(finding, deepseek))
    plain = ["".join(child.content for child in token.children or []) for token in tokens if token.type == "inline"]
    assert plain[0] == finding.message
    assert any("__wrapped__" in line for line in plain)
    (fence,) = [token for token in tokens if token.type == "fence"]
    assert finding.excerpt is not None
    rows = fence.content.splitlines()
    assert [row.split("  ", 1)[-1].strip() for row in rows if row.startswith(">")] == [finding.source]
    bad = pages.hostile()
    (fence,) = [token for token in MarkdownIt().parse(issue.text(bad.findings[0], bad)) if token.type == "fence"]
    assert len(fence.content.splitlines()) >= 3
