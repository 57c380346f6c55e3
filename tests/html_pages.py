"""What every page must be: well-formed, self-contained, accessible."""

from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "link"}


class _Checker(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.seen.add(tag)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        for name in ("src", "href", "data", "poster", "action"):
            address = found.get(name)
            assert address is None or address.startswith(("#", "data:")), f"{tag} {name}={address}"
        assert tag != "img" or found.get("alt"), "a picture without alternative text"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def check_page(page: str) -> None:
    """Fails if a page is not well-formed, asks for other files, or cannot be navigated."""
    checker = _Checker()
    checker.feed(page)
    assert not checker.open, f"not closed: {checker.open}"
    assert len(set(checker.ids)) == len(checker.ids), "an id occurs twice"
    assert {"h1", "main", "nav", "title", "button"} <= checker.seen
    assert "default-src 'none'" in page and 'name="viewport"' in page and '<html lang="en">' in page
