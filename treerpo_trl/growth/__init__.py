"""Growing trees: when and where to branch, and what draws the segments (`backends`)."""

from .waves import Backend, TreeShape, Wave, grow, plan_wave


__all__ = ["Backend", "TreeShape", "Wave", "grow", "plan_wave"]
