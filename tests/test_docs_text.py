"""The texts of README and docs/: links lead somewhere, sentences are short, and a table of figures has one number per cell."""

import re

import pytest
from pages import PAGES, ROOT, Page

MOST_WORDS = 28
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
MARKUP = re.compile(r"[*_]|`[^`]*`|\[|\]\([^)]*\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in page.links:
        if re.match(r"https?:|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in Page(target).anchors, f"{link}: {sorted(Page(target).anchors)}"


def test_the_table_of_contents_lists_every_page():
    [index] = [page for page in PAGES if page.name == "docs/index.md"]
    listed = {line.split("<")[-1].strip("> ") for block in index.blocks for line in block.text.splitlines()}
    assert {page.path.stem for page in PAGES if page.path.parent.name == "docs" and page is not index} <= listed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page):
    words = {
        sentence: len(re.findall(r"[A-Za-z][\w'-]*", re.sub(r"`[^`]*`", "code", sentence))) for sentence in page.sentences
    }
    assert not {sentence: count for sentence, count in words.items() if count > MOST_WORDS}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_column_of_figures_has_one_number_per_cell(page):
    """A column holds figures if at least half of its cells, the empty ones not counted, begin with a number.

    The first column does not count, since it names the rows.
    """
    for header, *rows in page.tables:
        for i, name in list(enumerate(header))[1:]:
            cells = [text for row in rows if i < len(row) and (text := MARKUP.sub("", row[i]).strip())]
            if 2 * sum(NUMBER.match(text) is not None for text in cells) >= len(cells) > 0:
                assert not [text for text in cells if len(NUMBER.findall(text)) > 1], name


def test_every_row_of_a_table_has_as_many_cells_as_its_header():
    for page in PAGES:
        for header, *rows in page.tables:
            assert not [row for row in rows if len(row) != len(header)], page.name


def test_the_readme_is_short():
    assert len(PAGES[0].text.splitlines()) <= 150


def test_pictures_are_small():
    assert not [path for path in (ROOT / "docs" / "images").iterdir() if path.stat().st_size > 150_000]
