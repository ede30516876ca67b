"""What a test sees of the page in a browser."""

from playwright import sync_api


def ready(page):
    """The page when all is drawn; it goes on asking for what the slider may show."""
    page.wait_for_selector("#main:not([hidden])")
    page.wait_for_selector("#chart .line", state="attached")
    return page


def told(page, place, words):
    """Waits for words; what playwright calls waiting for a function would need eval, which the page forbids."""
    sync_api.expect(page.locator(place)).to_contain_text(words, timeout=20_000)


def heights(page):
    return page.eval_on_selector_all(".fill", "fills => fills.map((fill) => fill.style.height)")


def tiles(page):
    names, values = page.locator("#tiles dt").all_inner_texts(), page.locator("#tiles dd > span").all_inner_texts()
    return dict(zip(names, values, strict=True))
