"""Trees for people to look at."""

from .console import print_tree, render_tree


__all__ = ["print_tree", "render_tree"]
