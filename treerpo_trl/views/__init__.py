"""Trees for people to look at: in the terminal, as a table in parquet files, and as pages for a browser."""

from .console import print_tree, render_tree
from .html import render_page, write_page
from .index import build_index
from .records import read_trees, tree_records, write_trees


__all__ = [
    "build_index",
    "print_tree",
    "read_trees",
    "render_page",
    "render_tree",
    "tree_records",
    "write_page",
    "write_trees",
]
