"""A page of ``inspect`` in a browser: as numpy counts, whole without a network, harmless, on a phone too."""

import itertools

import pytest

import mlx_kvret
from mlx_kvret.core.history import History

from .browsing import classes, expected, opened, shades, slide

HOSTILE = (
    "<script>alert(1)</script> <img src=x onerror=alert(2)> </script> \u202e javascript:alert(3) é 🙂\n\n"
    "{{alert(4)}} &lt;b&gt; "
)


@pytest.fixture(scope="module")
def found():
    pytest.importorskip("mlx_lm")
    model, tokenizer = mlx_kvret.load("demo", backend="mlx")
    text = HOSTILE + "remember Stella salmon rumour Anna has blue " * 12
    return mlx_kvret.inspect(
        model,
        tokenizer,
        text,
        prompt="recall Stella",
        budget=16,
        buffer=4,
        title="<b onclick=alert(5)>demo</b>",
    )


@pytest.fixture(scope="module")
def address(found, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    found.save(path)
    return path.as_uri()


def test_shades_are_those_of_numpy(browser, address, found):
    history: History = found.history
    with opened(browser, address) as seen:
        page = seen.page
        page.wait_for_selector("#view[data-ready]")
        assert page.inner_text("h1") == "What the cache remembers"
        assert shades(page) == expected(history, None)
        last = len(history.compactions)
        assert last > 2
        for at in range(0, last, 3):
            slide(page, at)
            assert shades(page) == expected(history, at)
            lost = [i for i, name in enumerate(classes(page)) if "lost" in name.split()]
            assert lost == [i for i, count in enumerate(history.lost(at)) if count]
        slide(page, 1)
        page.select_option("select[aria-label=layer]", "1")
        assert shades(page) == expected(history, 1, 1)
        page.select_option("select[aria-label=head]", "0")
        assert shades(page) == expected(history, 1, 1, 0)
        page.click("summary")
        cell = page.locator(".grid button[data-layer='0'][data-head='1']")
        assert f"{history.held(1, 0, 1).sum()} entries" in cell.get_attribute("title")
        cell.click()
        assert shades(page) == expected(history, 1, 0, 1)
        cell.click()
        assert shades(page) == expected(history, 1)
        page.click(".text span[data-at='3']")
        heads = history.layers * history.kv_heads
        assert f"token 3: kept by {history.held(1)[3]} of {heads} heads" in page.inner_text(".detail")
        page.keyboard.press("ArrowRight")
        assert f"token 4: kept by {history.held(1)[4]} of {heads} heads" in page.inner_text(".detail")
        assert seen.asked == [address] and seen.complaints == []


def test_nothing_in_a_text_runs(browser, address, found):
    with opened(browser, address) as seen:
        page = seen.page
        page.wait_for_selector("#view[data-ready]")
        assert page.evaluate(
            "[...document.querySelectorAll('.text span')].map(s => s.textContent).join('')"
        ) == ("".join(found.data["texts"]))
        assert found.data["model"] in page.inner_text(".said")
        assert page.locator(".text *:not(span)").count() == 0 and page.locator("b[onclick]").count() == 0
        # even what got in would not run
        page.evaluate(
            "document.body.insertAdjacentHTML('beforeend', '<img src=x: onerror=\"window.ran = 1\">')"
        )
        page.wait_for_timeout(50)
        assert page.evaluate("window.ran") is None
        assert [url for url in seen.asked if url.startswith("http")] == []


def test_the_gauge(browser, address, found):
    moments, full = found.history.compactions, found.data["full_bytes_per_token"]
    with opened(browser, address) as seen:
        seen.page.wait_for_selector("#view[data-ready]")
        for at in (1, len(moments)):
            slide(seen.page, at)
            told = seen.page.evaluate("({...document.querySelector('.gauge').dataset})")
            moment = found.history.moment(at if at < len(moments) else None)
            assert told == {"bounded": str(moment.nbytes), "full": str(moment.seen * full)}
        bars = seen.page.evaluate("[...document.querySelectorAll('meter')].map(m => m.value)")
        assert bars[1] == 1 and 0 < bars[0] < 1


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone(browser, address, width):
    """Nothing reaches over the edge, and what is to be touched is large enough."""
    with opened(browser, address, width, 700) as seen:
        page = seen.page
        page.wait_for_selector("#view[data-ready]")
        page.click("summary")
        page.click(".text span[data-at='3']")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        sizes = page.evaluate(
            "[...document.querySelectorAll('select, input')].map(e => e.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 24


def test_shades_need_no_colours(browser, address):
    """Each is darker than the one before, and words are readable on it (contrast 4.5 and more)."""
    script = """() => [...document.querySelectorAll('.legend span')].slice(0, 9).map(e => {
        const s = getComputedStyle(e), channel = (c) => { c /= 255;
            return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4 };
        const light = (text) => { const [r, g, b] = text.match(/\\d+/g).map(Number).map(channel);
            return 0.2126 * r + 0.7152 * g + 0.0722 * b };
        return [light(s.backgroundColor), light(s.color)] })"""
    with opened(browser, address) as seen:
        seen.page.wait_for_selector("#view[data-ready]")
        shades = seen.page.evaluate(script)
    backs = [back for back, _ in shades]
    assert len(backs) == 9 and all(a > b * 1.05 for a, b in itertools.pairwise(backs))
    for back, ink in shades:
        assert (max(back, ink) + 0.05) / (min(back, ink) + 0.05) >= 4.5


def test_an_old_browser_is_told(browser, address):
    page = browser.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(address)
    page.wait_for_selector("#view:has-text('a browser of 2023')")
    page.close()
