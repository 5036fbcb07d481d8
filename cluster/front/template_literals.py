"""What a Jinja template itself says, as opposed to what it makes of its variables."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import nodes
from jinja2.visitor import NodeTransformer


class LiteralRewriter(NodeTransformer):
    """Rewrites the text and the string constants of a template in place, except for constants that its variables are
    compared with or searched for: those must stay what they are."""

    def __init__(self, rewrite: Callable[[str], str]) -> None:
        self._rewrite = rewrite

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        node.data = self._rewrite(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        if isinstance(node.value, str):
            node.value = self._rewrite(node.value)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        """``text.split('...')`` searches a text, ``macro('...')`` says something."""
        return self._only_subject(node) if isinstance(node.node, nodes.Getattr) else self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        return self._only_subject(node) if node.name == "replace" else self.generic_visit(node)

    def _only_subject(self, node: nodes.Call | nodes.Filter) -> nodes.Node:
        if node.node is not None:
            node.node = self.visit(node.node)
        return node
