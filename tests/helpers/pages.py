"""The README and the pages of docs/, in parts: prose, code blocks, tables, headings and links."""

import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^( *)(```|~~~|:::)\{?([\w-]*).*?\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")


class Block(NamedTuple):
    """A code block: its language, such as "bash", and its text."""

    language: str
    text: str


class Page:
    """One file.

    Args:
      path: a Markdown file.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.text = path.read_text()
        self.blocks = [Block(language, text) for _, _, language, text in BLOCK.findall(self.text)]
        self.outside = BLOCK.sub("", self.text)  # everything but code blocks
        self.spans = [" ".join(span.split()) for span in SPAN.findall(self.outside)]
        self.links = [link or image for link, image in LINK.findall(self.outside)]

    @property
    def anchors(self) -> set[str]:
        """The anchors of the headings, as GitHub and MyST make them."""
        headings = re.findall(r"^#+ +(.*)$", self.outside, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    @property
    def tables(self) -> list[list[list[str]]]:
        """Tables as lists of rows, each a list of cells. The first row is the header."""
        found = re.findall(r"(?:^\|.*\|[ ]*\n)+", self.outside + "\n", re.MULTILINE)
        tables = [[[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in t.splitlines()] for t in found]
        return [[rows[0], *rows[2:]] for rows in tables]

    @property
    def sentences(self) -> list[str]:
        """Sentences outside of code, tables and headings. A list item begins a new one."""
        kept = [line for line in self.outside.splitlines() if not line.startswith(("|", "#", "    "))]
        parts = re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.) |(?<=:)\n", "\n".join(kept))
        return [s for part in parts for s in re.split(r"(?<=[.!?])\s+", re.sub(r"\s+", " ", part).strip()) if s]


PAGES = [Page(path) for path in FILES]
