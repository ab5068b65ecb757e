"""The structure of a page: its elements and what they carry, without texts and pictures."""

from html.parser import HTMLParser

#: Of these the value is text; of all others it is the page's own and must stay.
TEXTS = {"alt", "aria-label", "content", "src", "srcset"}
VOID = {"img", "meta", "source", "br", "hr", "link", "input"}
Skeleton = tuple[tuple[str, ...], ...]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, ...]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # Of the page's own metas the value counts; a picture's place is the kind of address only.
        values = (f"{name}={_value(tag, name, value or '')}" for name, value in attrs)
        self.found.append((str(len(self.open)), tag, *values))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_comment(self, data: str) -> None:
        self.found.append((str(len(self.open)), "comment"))

    def handle_decl(self, decl: str) -> None:
        self.found.append((str(len(self.open)), "declaration", decl))

    def unknown_decl(self, data: str) -> None:
        self.found.append((str(len(self.open)), "unknown declaration"))

    def handle_pi(self, data: str) -> None:
        self.found.append((str(len(self.open)), "instruction"))


def _value(tag: str, name: str, value: str) -> str:
    if name in ("src", "srcset"):
        return value[:22]  # data:image/png;base64,
    return "…" if name in TEXTS and tag != "meta" else value


def skeleton(page: str) -> Skeleton:
    """Every element in order: its depth, name and attributes."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open, f"left open: {reader.open}"
    return tuple(reader.found)
