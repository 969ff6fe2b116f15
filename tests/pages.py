"""Reading pages of HTML strictly: what every page of a report must keep to."""

import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr", "base", "wbr"}
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\u202e'\"&{{ 7*7 }}\x1b[31m\x00\uffff\n"
)


class Page(HTMLParser):
    """Reads a page strictly: every element that is opened is closed, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words, self.ids = [], Counter(), [], [], []
        self.headings = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for key, value in attrs if key == "id"]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.words))


def assert_inert(html):
    """Nothing in `html` runs, and nothing is fetched."""
    page = Page(html)
    forbidden = {"script", "iframe", "object", "embed", "img", "link", "form", "base", "use"}
    assert not forbidden & set(page.tags)
    for tag, key, value in page.attributes:
        assert not key.startswith("on"), (tag, key)
        if key in {"href", "src", "xlink:href", "action", "srcdoc", "formaction"}:
            assert value.startswith("#"), (tag, key, value)
        assert "javascript:" not in (value or ""), (tag, key, value)
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target.startswith("#"), target
    assert "@import" not in html
    assert not [name for name, count in Counter(page.ids).items() if count > 1]
    return page


def shown(html):
    """What is written on a page, without the drawings."""
    bare = re.sub(r"<(style|svg).*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<wbr>|<[^>]*>", "", bare)))
