"""A small parser of mathematical expressions: a canonical text (see `latex`) becomes a tree."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

Node = tuple[Any, ...]
"""("num", Fraction), ("var", name), (operator, child, ...)."""


class Unsupported(ValueError):
    """The text is no expression of this grammar, has no value, or is too large."""


MAX_DEPTH = 40
MAX_TOKENS = 250
"""Bounds the depth of a tree: 1+1+1+... is nested to the left."""
_TOKEN = re.compile(
    r"\s*(?:(?P<num>\d+\.?\d*|\.\d+)|\\(?P<cmd>[A-Za-z]+)|(?P<word>[A-Za-z]+(?:'+)?)|⟪(?P<mark>[A-Za-z])⟫"
    r"|(?P<op>[-+*/^_(){}\[\]|!°%]))"
)
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp sqrt abs".split()
)
_SYMBOLS = frozenset(
    "alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi varphi omega psi chi eta "
    "xi kappa zeta Delta Omega Gamma Sigma Phi infty ell hbar".split()
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}


@lru_cache(maxsize=2048)
def parse(text: str) -> Node:
    """The tree of an expression.

    Raises:
        Unsupported: It is none.
    """
    return _Parser(_tokens(text)).whole()


def _tokens(text: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position, text = 0, text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unsupported(f"no token at {text[position : position + 20]!r}")
        position = match.end()
        kind = str(match.lastgroup)
        value = match[kind]
        if kind == "word":
            if value in _FUNCTIONS or value == "pi":
                tokens.append(("cmd", value))
            elif len(value.rstrip("'")) > 3:
                raise Unsupported(f"{value!r} is a word")
            else:
                tokens.extend(("var", part) for part in re.findall(r"[A-Za-z]'*", value))
        else:
            tokens.append(("var" if kind == "mark" else kind, value))
        if len(tokens) > MAX_TOKENS:
            raise Unsupported("too long")
    return tokens


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens
        self.i = 0
        self.depth = 0
        self.in_abs = 0

    def peek(self) -> tuple[str, str]:
        return self.tokens[self.i] if self.i < len(self.tokens) else ("end", "")

    def at(self, *operators: str) -> bool:
        kind, value = self.peek()
        return kind == "op" and value in operators

    def expect(self, operator: str) -> None:
        if not self.at(operator):
            raise Unsupported(f"expected {operator!r}, not {self.peek()[1]!r}")
        self.i += 1

    def whole(self) -> Node:
        node = self.sum()
        if self.i < len(self.tokens):
            raise Unsupported(f"unexpected {self.peek()[1]!r}")
        return node

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsupported("nested too deeply")
        node = self.product()
        while self.at("+", "-"):
            operator = self.peek()[1]
            self.i += 1
            node = (operator, node, self.product())
        self.depth -= 1
        return node

    def product(self) -> Node:
        node = self.signed()
        while True:
            if self.at("*", "/"):
                operator = self.peek()[1]
                self.i += 1
                node = (operator, node, self.signed())
            elif self.starts_factor():
                if self.peek()[0] == self.tokens[self.i - 1][0] == "num":
                    raise Unsupported("two numbers without an operator")
                node = ("*", node, self.power())
            else:
                return node

    def starts_factor(self) -> bool:
        kind, value = self.peek()
        return kind in ("num", "cmd", "var") or (
            kind == "op" and (value in ("(", "{", "[") or (value == "|" and not self.in_abs))
        )

    def signed(self) -> Node:
        negative = False
        while self.at("+", "-"):
            negative ^= self.peek()[1] == "-"
            self.i += 1
        node = self.power()
        return ("neg", node) if negative else node

    def power(self) -> Node:
        start = self.i
        node = self.atom()
        if node[0] == "num" and self.tokens[start][0] == "num" and self.peek() == ("cmd", "frac"):
            node = self.mixed(node)
        while True:
            if self.at("!"):
                node = ("!", node)
            elif self.at("°"):
                node = ("*", ("/", node, ("num", Fraction(180))), ("pi",))
            elif self.at("%"):
                node = ("/", node, ("num", Fraction(100)))
            elif self.at("^"):
                node = ("^", node, self.exponent())
                continue
            else:
                return node
            self.i += 1

    def exponent(self) -> Node:
        """What follows ``^``; 2^3^2 is 2^9."""
        self.expect("^")
        node = self.argument()
        return ("^", node, self.exponent()) if self.at("^") else node

    def mixed(self, whole: Node) -> Node:
        r"""``1\frac{1}{2}`` is 3/2, ``2\frac{x}{3}`` is a product."""
        start = self.i
        part = self.atom()
        if (
            whole[1].denominator == 1
            and part[0] == "/"
            and all(child[0] == "num" and child[1].denominator == 1 for child in part[1:])
            and 0 < part[1][1] < part[2][1]
        ):
            return ("+", whole, part)
        self.i = start
        return whole

    def argument(self, *, digit: bool = False) -> Node:
        r"""What a command or ``^`` takes: a group or one atom; of ``\frac12`` a single ``digit``."""
        kind, value = self.peek()
        if kind == "op" and value in ("-", "+"):
            self.i += 1
            node = self.argument()
            return ("neg", node) if value == "-" else node
        if digit and kind == "num" and len(value) > 1 and value.isdigit():
            self.tokens[self.i : self.i + 1] = [(kind, value[0]), (kind, value[1:])]
        return self.atom()

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unsupported("nested too deeply")
        node = self._atom()
        self.depth -= 1
        return node

    def _atom(self) -> Node:
        kind, value = self.peek()
        self.i += 1
        if kind == "num":
            return ("num", Fraction(value if not value.endswith(".") else value[:-1]))
        if kind == "var":
            return ("e",) if value == "e" else ("i",) if value == "i" else ("var", value + self.subscript())
        if kind == "op" and value in _CLOSING:
            node = self.sum()
            self.expect(_CLOSING[value])
            return node
        if kind == "op" and value == "|":
            self.in_abs += 1
            node = self.sum()
            self.in_abs -= 1
            self.expect("|")
            return ("abs", node)
        if kind == "cmd":
            return self.command(value)
        raise Unsupported(f"unexpected {value!r}")

    def command(self, name: str) -> Node:
        if name == "pi":
            return ("pi",)
        if name == "frac":
            top = self.argument(digit=True)
            return ("/", top, self.argument(digit=True))
        if name in ("binom", "dbinom", "tbinom"):
            top = self.argument(digit=True)
            return ("binom", top, self.argument(digit=True))
        if name == "sqrt":
            degree: Node = ("num", Fraction(2))
            if self.at("["):
                self.i += 1
                degree = self.sum()
                self.expect("]")
            return ("root", self.argument(), degree)
        if name in _SYMBOLS:
            return ("var", "\\" + name + self.subscript())
        if name in _FUNCTIONS:
            return self.function(name)
        raise Unsupported(f"unknown command {name!r}")

    def function(self, name: str) -> Node:
        base: Node | None = None
        if name == "log" and self.at("_"):
            self.i += 1
            self.i += 1
            alone = not self.starts_factor()
            self.i -= 1
            base = self.argument(digit=alone)  # \log_28 is of 8, \log_10 5 of 5
        exponent: Node | None = None
        if self.at("^"):
            self.i += 1
            exponent = self.argument()
        if self.at("(", "{", "["):
            argument = self.atom()
        else:  # \sin 2x is the sine of the product
            argument = self.signed() if self.at("-") else self.power()
            while self.starts_factor() and not (self.peek()[0] == "cmd" and self.peek()[1] in _FUNCTIONS):
                if self.at("(", "{", "["):
                    break
                argument = ("*", argument, self.power())
        node: Node = ("log", argument, base) if base is not None else (name, argument)
        if exponent is None:
            return node
        if exponent == ("neg", ("num", Fraction(1))) and name in ("sin", "cos", "tan"):
            return ("arc" + name, argument)
        return ("^", node, exponent)

    def subscript(self) -> str:
        if not self.at("_"):
            return ""
        self.i += 1
        if not self.at("{"):
            self.i += 1
            return "_" + self.tokens[self.i - 1][1] if self.i <= len(self.tokens) else ""
        start = self.i
        while self.i < len(self.tokens) and not self.at("}"):
            self.i += 1
        self.expect("}")
        return "_" + "".join(value for _, value in self.tokens[start + 1 : self.i - 1])
