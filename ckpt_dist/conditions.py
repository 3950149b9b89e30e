"""What the conditions of a family's table say of a config: which weights such a model has, and in which layers.

A condition is a text, `l < first_k_dense_replace`, in which numbers, keys of the config (None where it lacks one),
arithmetic and comparisons mean something. Invariant: nothing of a table or a config is run.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from typing import Any

from ckpt_dist.family import Family

Config = Mapping[str, Any]
OPERATORS: dict[type[ast.operator | ast.cmpop], Any] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.GtE: operator.ge,
    ast.Gt: operator.gt,
    ast.Mod: operator.mod,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def weights(family: Family, config: Config) -> list[str]:
    """The weights of a model of that config, copies of tied ones among them; none that are zeros unless stored."""
    having = [w for w in family.weights if computed(family.optional.get(w, "True"), config)]
    return [w for w in having if w not in family.zeros]


def layers(family: Family, weight: str, config: Config, count: int) -> list[int]:
    """Which of so many layers have a weight."""
    condition = family.layers.get(weight, "True")
    return [i for i in range(count) if computed(condition, {**config, "l": i})]


def computed(text: str, config: Config) -> Any:
    """What an expression of a table is for this config. Raises ValueError where that cannot be said."""
    try:
        return _value(ast.parse(text, mode="eval").body, config)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{text!r} cannot be computed: {error}") from None


def _value(node: ast.expr, config: Config) -> Any:
    """A number, a text, a key of the config (None where it lacks it); arithmetic, comparisons, `or`, `and`, `not`."""
    match node:
        case ast.Constant(value=number):
            return number
        case ast.Name(id=key):
            return config.get(key)
        case ast.BoolOp(op=ast.Or(), values=values):
            return next((v for v in (_value(n, config) for n in values) if v), None)
        case ast.BoolOp(op=ast.And(), values=values):
            return all(_value(n, config) for n in values)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, config)
        case ast.Compare(left=left, ops=[ast.In() | ast.NotIn() as op], comparators=[right]):
            return (_value(left, config) in (_value(right, config) or ())) == isinstance(op, ast.In)
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return OPERATORS[type(op)](_value(left, config), _value(right, config))
        case ast.BinOp(left=left, op=op, right=right):
            return OPERATORS[type(op)](_value(left, config), _value(right, config))
    raise ValueError(f"{ast.unparse(node)} is no number, key or arithmetic")
