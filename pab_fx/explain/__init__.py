"""What PAB does to a model, for people to see.

explain     captures a model and measures it; a report like `PAB.report()`, with times
content     what is said of a report: tables and lines
text, markdown, html, json     ways to say it
outline, drawing               the graphs before and after the rewrite
"""

from .explain import explain

__all__ = ["explain"]
