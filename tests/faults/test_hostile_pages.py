"""What strangers write stays text on every page, in a real browser."""

import json

import pytest
from tests.faults.payloads import ALL, PAYLOADS
from tests.serve.browser import chromium, opened
from tests.serve.parts import app_of, direction_of, guard_of, served
from tests.tiny import tiny_model

pytest.importorskip("fastapi")
pytest.importorskip("playwright")


@pytest.fixture(scope="module")
def browser():
    with chromium() as own:
        yield own


def assert_nothing_ran(browser, html, tmp_path):
    """Open a page as a file; nothing of it may run, ask for anything, or open a dialogue."""
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    context = browser.new_context()
    page = context.new_page()
    wanted, dialogues = [], []
    page.on("request", lambda request: wanted.append(request.url))
    page.on("dialog", lambda one: (dialogues.append(one.message), one.dismiss()))
    page.route("http*://**", lambda route: route.abort())
    try:
        page.goto(path.as_uri(), wait_until="load")
        for one in page.locator("summary").all()[:50]:
            one.evaluate("one => one.parentElement.open = true")
        page.keyboard.press("Tab")
        page.mouse.move(200, 200)
        page.wait_for_timeout(100)
        assert {one.evaluate("typeof window.pwned") for one in page.frames} == {"undefined"}
        assert dialogues == []
        return [url for url in wanted if url != path.as_uri()]
    finally:
        context.close()


@pytest.mark.slow
def test_a_report_of_hostile_text_runs_nothing(browser, tmp_path):
    from tests.report import sample

    from demur.report import build
    from demur.results import Reply

    whole = sample.audit()
    said = [
        Reply(arm=arm, on=on, prompt=ALL, response=ALL, outcome=ALL, reason=ALL)
        for arm in ("unedited", ALL)
        for on in ("harmful", "harmless")
    ]
    model = dict.fromkeys(("name", "adapter", "system", "family", "revision"), ALL)
    results = sample.audit(
        model=whole.model.model_copy(update=model),
        positions=[one.model_copy(update={"text": ALL}) for one in whole.positions],
        refusal_tokens=[one.model_copy(update={"text": ALL}) for one in whole.refusal_tokens],
        notes=[ALL],
        verdict=whole.verdict.model_copy(update={"headline": ALL, "reasons": [ALL]}),
        legs=[one.model_copy(update={"arm": ALL, "edit": ALL}) for one in whole.legs[:2]],
        edits=[one.model_copy(update={"edit": ALL}) for one in whole.edits[:2]],
        candidates=[
            one.model_copy(update={"rejected_by": ALL, "site": one.site + ALL})
            for one in whole.candidates[:2]
        ],
        readings=[],
        nulls=[],
        dose=[],
        validation=[],
        projections=[],
        prompts=whole.prompts.model_copy(update={"harmful_source": ALL}),
    )
    html = build(sample.save(tmp_path / "run", results, said))
    assert assert_nothing_ran(browser, html, tmp_path) == []
    assert "window.pwned=1" in html  # As text.


def test_notebook_cells_run_nothing_but_what_draws(browser, tmp_path):
    import torch

    from demur.directions import Direction
    from demur.sites import Site

    def direction(seed):
        vector = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        return Direction.from_vector(vector, site=Site(1, "resid_pre"), position=-1, recipe=ALL)

    table = direction(0)._repr_html_()
    assert assert_nothing_ran(browser, f"<!doctype html><body>{table}", tmp_path) == []
    chart = direction(0).plot({text: direction(i + 1) for i, text in enumerate(PAYLOADS)})
    # Altair's page loads Vega from elsewhere, where it has not been told otherwise.
    wanted = assert_nothing_ran(browser, chart.to_html(), tmp_path)
    assert all("vega" in url for url in wanted), wanted


def event(**delta):
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return f"data: {json.dumps({'id': 'x', 'object': 'chat.completion.chunk', 'created': 0, 'model': 'm', 'choices': [choice]})}\n\n"  # noqa: E501


def test_the_playground_runs_nothing_of_what_it_shows(browser, tmp_path):
    runs = tmp_path / "runs"
    for i, text in enumerate(("<img src=x onerror=window.pwned=1>", "\"'><svg onload=pwned=1>")):
        own = runs / f"{i}{text}"
        own.mkdir(parents=True)
        (own / "results.json").write_text(json.dumps({"verdict": {"headline": ALL}}))
        (own / "report.html").write_text(f"<!doctype html><title>x</title><h1>read</h1>{ALL}")
    model = tiny_model()
    directions = {text: direction_of(model, i) for i, text in enumerate(PAYLOADS[:4])}
    app = app_of(
        model, guard=guard_of(model, 0.6), directions=directions, name=ALL, runs=runs, max_tokens=8
    )
    expected = ("Content Security Policy", "Content-Security-Policy", "sandboxed", "evil.example")
    with served(app) as address, opened(browser, address, errors=expected) as (page, _):
        page.add_init_script("window.pwned = undefined")
        page.on("dialog", lambda one: pytest.fail(one.message))
        page.get_by_label("Message", exact=True).fill(PAYLOADS[2])
        page.get_by_label("Message", exact=True).press("Enter")
        page.locator(".turn .reply[aria-busy=false]").first.wait_for()
        assert page.locator(".question").text_content() == PAYLOADS[2]
        page.get_by_role("link", name="Heat map").click()
        page.locator(".labels li").first.wait_for()
        page.get_by_role("link", name="Chat").click()
        body = event(role="assistant", content="") + event(content=ALL) + "data: [DONE]\n\n"
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(
                status=200, body=body, headers={"content-type": "text/event-stream"}
            ),
        )
        page.get_by_label("Message", exact=True).fill("again")
        page.get_by_label("Message", exact=True).press("Enter")
        page.locator(".turn").nth(1).locator(".reply[aria-busy=false]").first.wait_for()
        assert "window.pwned=1" in page.locator(".turn").nth(1).text_content()
        page.get_by_role("link", name="Runs").click()
        page.locator("tr[data-run]").first.wait_for()
        assert page.locator("tr[data-run]").count() == 2
        for side in ("left", "right"):
            page.locator("tr[data-run]").first.get_by_text(f"Open {side}").click()
            frame = page.frame_locator(f".report.{side} iframe")
            frame.locator("h1").wait_for()
        assert page.locator("#views img, #views script, #views iframe[srcdoc]").count() == 0
        found = page.evaluate("typeof window.pwned")
        assert found == "undefined"
