"""An HTML page as the tests read it, by Python's own parser: elements with their attributes and text, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


@dataclass
class Element:
    """A node of the page."""

    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Element | str] = field(default_factory=list)

    def walk(self) -> Iterator[Element]:
        """This element and all below it, in the order of the page."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    def all(self, tag: str, where: Callable[[Element], bool] = lambda _: True) -> list[Element]:
        """The elements below it that have a tag."""
        return [item for item in self.walk() if item.tag == tag and where(item)]

    def with_class(self, tag: str, name: str) -> list[Element]:
        """The elements below it that have a tag and a class."""
        return self.all(tag, lambda item: name in item.attributes.get("class", "").split())

    def by_id(self, key: str) -> Element:
        """The one element with an id."""
        (found,) = [item for item in self.walk() if item.attributes.get("id") == key]
        return found

    @property
    def text(self) -> str:
        """All text below it, white space collapsed."""
        return " ".join("".join(self._texts()).split())

    def _texts(self) -> Iterator[str]:
        for child in self.children:
            if isinstance(child, str):
                yield child
            else:
                yield from child._texts()

    def __iter__(self) -> Iterator[Element]:
        return (child for child in self.children if isinstance(child, Element))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("document")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_html(text: str) -> Element:
    """The page; every element must be closed in its order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root], f"<{reader.open[-1].tag}> is never closed"
    return reader.root


def rows_of(table: Element) -> list[Element]:
    """Rows of its body."""
    (body,) = table.all("tbody")
    return body.all("tr")


def texts(row: Element) -> list[str]:
    """Texts of its cells."""
    return [cell.text for cell in row if cell.tag in ("th", "td")]
