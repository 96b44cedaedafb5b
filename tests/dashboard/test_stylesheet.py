"""The stylesheet is one file that all pages edit: a lost brace would put the rules after it into another rule."""

from dashboard.page_rendering import FOLDER


def test_each_block_of_the_stylesheet_is_closed() -> None:
    depth = 0
    for number, line in enumerate((FOLDER / "static" / "style.css").read_text().splitlines(), 1):
        assert not (line.startswith("/*") and depth), f"line {number} begins a part inside of a block"
        depth += line.count("{") - line.count("}")
    assert depth == 0
