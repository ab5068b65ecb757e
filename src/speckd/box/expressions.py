"""The value of a test's expression: plain, or an expression of the program's, or what comes back for one."""

import ast
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

from speckd.box import known
from speckd.box.known import BUILTINS, GATHERING, METHODS, Known
from speckd.box.operators import COMPARE, COMPUTE, SIGN, NotJudgeable, one_of_a_kind
from speckd.box.outcomes import Outcome
from speckd.box.sources import UNKNOWN, Inside, Unknown, source, unknown

Names = dict[str, Any]
_STEPS = 50_000
_BRACKETS: dict[type[ast.expr], tuple[str, str, type]] = {
    ast.List: ("[", "]", list),
    ast.Tuple: ("(", ",)", tuple),
    ast.Set: ("{", "}", set),
}


class TestFails(Exception):
    """A test that does not hold; says which and why."""

    __test__ = False  # no test of pytest's


@dataclass(frozen=True)
class Module:
    """What a test may use of a module."""

    parts: Mapping[str, Any]


@dataclass
class Expressions(ABC):
    """One walk through a test.

    Args:
        inside: name in the test -> name in the program, of what the test may call there.
        helpers: functions that come with the task, computed out here.
        answers: of the calls, in the order in which the first walk found them; None for the first walk.
    """

    inside: Mapping[str, str]
    helpers: Mapping[str, ast.FunctionDef]
    answers: Sequence[Outcome] | None = None
    calls: list[str] = field(default_factory=list)
    _steps: int = 0
    _modules: dict[str, dict[str, Any]] = field(default_factory=known.modules)

    @abstractmethod
    def helper(self, function: ast.FunctionDef, values: list[Any]) -> Any:
        """What a function that comes with the task gives for plain values."""

    def value(self, node: ast.expr, names: Names) -> Any:
        """A plain value, a function, a module, `Inside` or `UNKNOWN`.

        Raises:
            NotJudgeable: an expression that is not read.
            TestFails: the program's answer is none.
        """
        self._steps += 1
        if self._steps > _STEPS:
            raise NotJudgeable("it takes too many steps")
        read = self._READERS.get(type(node))
        if read is None:
            raise NotJudgeable(f"it holds `{ast.unparse(node)[:80]}`")
        return read(self, node, names)

    def items(self, node: ast.expr, names: Names) -> list[Any]:
        """What a loop goes through, which must be known out here."""
        found: list[Any] = self.compute(list, [known_here(self.value(node, names))])
        return found

    def decided(self, node: ast.expr, names: Names) -> bool:
        """A condition, which must be known out here."""
        return bool(known_here(self.value(node, names)))

    def bind(self, target: ast.expr, value: Any, names: Names) -> None:
        """Assigns to a name, or to several."""
        match target:
            case ast.Name(id=name):
                names[name] = value
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                parts = self.compute(list, [known_here(value)])
                if len(parts) != len(targets):
                    raise NotJudgeable(f"`{ast.unparse(target)}` takes {len(targets)} values of {len(parts)}")
                for one, part in zip(targets, parts, strict=True):
                    self.bind(one, part, names)
            case _:
                raise NotJudgeable(f"it assigns to `{ast.unparse(target)[:80]}`")

    def module(self, name: str) -> Module:
        """A module that a test may use."""
        if name not in self._modules:
            raise NotJudgeable(f"it imports {name}")
        return Module(self._modules[name])

    def outside(self, value: Any) -> Any:
        """The plain value; of an expression of the program's, its answer."""
        if isinstance(value, Known):
            return value.act
        if isinstance(value, list | tuple) and any(isinstance(item, Inside) for item in value):
            return type(value)(self.outside(item) for item in value)
        if not isinstance(value, Inside):
            return value
        number = len(self.calls)
        self.calls.append(value.source)
        if self.answers is None:
            return UNKNOWN
        answer = self.answers[number]
        if answer.kind != "value":
            raise TestFails(f"`{value.source[:200]}`: {answer.kind}: {answer.detail}")
        return answer.value

    def compute(self, act: Callable[..., Any] | None, values: Sequence[Any]) -> Any:
        """`act` on the plain values."""
        if act is None:
            raise NotJudgeable("it uses an operator that is not read")
        plain = [self.outside(value) for value in values]
        if any(map(unknown, plain)):
            return UNKNOWN
        try:
            return act(*plain)
        except (NotJudgeable, TestFails):
            raise
        except Exception as error:
            if self.answers is None:
                raise NotJudgeable(f"it fails by itself: {error}") from None
            raise TestFails(f"what the program gives cannot be compared: {type(error).__name__}: {str(error)[:200]}") from None

    def _name(self, node: ast.Name, names: Names) -> Any:
        name = node.id
        if name in names:
            return names[name]
        if name in self.inside:
            return Inside(self.inside[name])
        if name in self.helpers:
            return self.helpers[name]
        if name in BUILTINS:
            return BUILTINS[name]
        if name in self._modules:  # tests of MBPP lean on what the reference imports
            return self.module(name)
        raise NotJudgeable(f"nothing is known of `{name}`")

    def _collection(self, node: ast.List | ast.Tuple | ast.Set, names: Names) -> Any:
        items = [self.value(item, names) for item in node.elts]
        left, right, kind = _BRACKETS[type(node)]
        if any(isinstance(item, Inside) for item in items):
            return Inside(left + ", ".join(map(source, items)) + right)
        return self.compute(kind, [items])

    def _dictionary(self, node: ast.Dict, names: Names) -> Any:
        pairs = [(self.value(k, names), self.value(v, names)) for k, v in zip(node.keys, node.values, strict=True) if k]
        if len(pairs) < len(node.keys):
            raise NotJudgeable("it unpacks a dictionary")
        if any(isinstance(part, Inside) for pair in pairs for part in pair):
            return Inside("{" + ", ".join(f"{source(key)}: {source(value)}" for key, value in pairs) + "}")
        return self.compute(dict, [pairs])

    def _call(self, node: ast.Call, names: Names) -> Any:
        act = self.value(node.func, names)
        given: list[Any] = []
        for argument in node.args:
            given += self.items(argument.value, names) if isinstance(argument, ast.Starred) else [self.value(argument, names)]
        if any(keyword.arg is None for keyword in node.keywords):
            raise NotJudgeable("it unpacks keyword arguments")
        options = {str(keyword.arg): self.value(keyword.value, names) for keyword in node.keywords}
        if isinstance(act, Inside):
            parts = [source(a) for a in given] + [f"{name}={source(value)}" for name, value in options.items()]
            return Inside(f"{act.source}({', '.join(parts)})")
        if isinstance(act, ast.FunctionDef):
            return self._helped(act, given, options)
        if not isinstance(act, Known):
            raise NotJudgeable(f"it calls `{ast.unparse(node.func)[:80]}`")
        if act.name in GATHERING and len(given) == 1 and isinstance(given[0], Inside) and not options:
            return Inside(f"{act.name}({given[0].source})")
        return self.compute(_with_options(act.act, len(given), list(options)), [*given, *options.values()])

    def _helped(self, function: ast.FunctionDef, given: list[Any], options: Names) -> Any:
        if options or len(given) != len(function.args.args) or function.decorator_list:
            raise NotJudgeable(f"it calls {function.name} in a way that is not read")
        return self.compute(lambda *values: self.helper(function, list(values)), given)

    def _attribute(self, node: ast.Attribute, names: Names) -> Any:
        owner, name = self.value(node.value, names), node.attr
        if name.startswith("_"):
            raise NotJudgeable(f"it uses {name}")
        if isinstance(owner, Inside):
            return Inside(f"{owner.source}.{name}")
        if isinstance(owner, Module):
            return part(owner, name)
        if name in METHODS.get(type(owner), ()):
            return Known(f"method {name}", getattr(owner, name))
        raise NotJudgeable(f"it uses {name} of a {type(owner).__name__}")

    def _subscript(self, node: ast.Subscript, names: Names) -> Any:
        owner, index = self.value(node.value, names), self.value(node.slice, names)
        if isinstance(owner, Inside) and not isinstance(index, slice | Unknown):
            return Inside(f"{owner.source}[{source(index)}]")
        return self.compute(operator.getitem, [owner, index])

    def _slice(self, node: ast.Slice, names: Names) -> Any:
        bounds = (node.lower, node.upper, node.step)
        return self.compute(slice, [None if bound is None else self.value(bound, names) for bound in bounds])

    def _signed(self, node: ast.UnaryOp, names: Names) -> Any:
        return self.compute(SIGN[type(node.op)], [self.value(node.operand, names)])

    def _computed(self, node: ast.BinOp, names: Names) -> Any:
        return self.compute(COMPUTE.get(type(node.op)), [self.value(node.left, names), self.value(node.right, names)])

    def _logic(self, node: ast.BoolOp, names: Names) -> Any:
        """All sides are computed, so that both walks find the same calls."""
        holds = all if isinstance(node.op, ast.And) else any
        return self.compute(lambda *sides: holds(sides), [self.value(side, names) for side in node.values])

    def _comparison(self, node: ast.Compare, names: Names) -> Any:
        sides, asked = [], []
        for side in (node.left, *node.comparators):
            before = len(self.calls)
            sides.append(self.outside(self.value(side, names)))
            asked.append(self.calls[before:])
        if any(left and right and left != right for left, right in pairwise(asked)):
            raise NotJudgeable(f"`{ast.unparse(node)[:80]}` compares the program with itself")
        if any(
            isinstance(op, ast.Is | ast.IsNot) and not one_of_a_kind(pair)
            for op, pair in zip(node.ops, pairwise(sides), strict=True)
        ):
            raise NotJudgeable("it asks whether two values are the same object")
        found = [self.compute(COMPARE[type(op)], pair) for op, pair in zip(node.ops, pairwise(sides), strict=True)]
        return UNKNOWN if any(map(unknown, found)) else all(found)

    def _choice(self, node: ast.IfExp, names: Names) -> Any:
        return self.value(node.body if self.decided(node.test, names) else node.orelse, names)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp, names: Names) -> Any:
        found = [self.value(node.elt, scope) for scope in self._scopes(node.generators, names)]
        return self.compute(set if isinstance(node, ast.SetComp) else list, [found])

    def _mapping(self, node: ast.DictComp, names: Names) -> Any:
        scopes = self._scopes(node.generators, names)
        return self.compute(dict, [[(self.value(node.key, scope), self.value(node.value, scope)) for scope in scopes]])

    def _scopes(self, generators: Sequence[ast.comprehension], names: Names) -> Iterator[Names]:
        if not generators:
            yield names
            return
        first = generators[0]
        for item in self.items(first.iter, names):
            scope = dict(names)
            self.bind(first.target, item, scope)
            if all(self.decided(test, scope) for test in first.ifs):
                yield from self._scopes(generators[1:], scope)

    def _lambda(self, node: ast.Lambda, names: Names) -> Any:
        """As an argument of the program's; it may use nothing of the test's own."""
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        if used & (set(names) | set(self.helpers)):
            raise NotJudgeable(f"it holds `{ast.unparse(node)[:80]}`")
        return Inside(f"({ast.unparse(node)})")

    _READERS: ClassVar[dict[type[ast.expr], Callable[["Expressions", Any, Names], Any]]] = {
        ast.Constant: lambda self, node, names: node.value,
        ast.Name: _name,
        ast.List: _collection,
        ast.Tuple: _collection,
        ast.Set: _collection,
        ast.Dict: _dictionary,
        ast.Call: _call,
        ast.Attribute: _attribute,
        ast.Subscript: _subscript,
        ast.Slice: _slice,
        ast.UnaryOp: _signed,
        ast.BinOp: _computed,
        ast.BoolOp: _logic,
        ast.Compare: _comparison,
        ast.IfExp: _choice,
        ast.ListComp: _comprehension,
        ast.GeneratorExp: _comprehension,
        ast.SetComp: _comprehension,
        ast.DictComp: _mapping,
        ast.Lambda: _lambda,
    }


def part(module: Module, name: str) -> Any:
    """What a module has under a name that a test may use."""
    if name not in module.parts:
        raise NotJudgeable(f"it uses {name} of a module")
    found = module.parts[name]
    return Known(name, found) if callable(found) else found


def known_here(value: Any) -> Any:
    """The value, where it does not depend on the program."""
    if isinstance(value, Inside | Unknown):
        raise NotJudgeable("what it does next depends on the program")
    return value


def _with_options(act: Callable[..., Any], given: int, options: list[str]) -> Callable[..., Any]:
    return lambda *values: act(*values[:given], **dict(zip(options, values[given:], strict=True)))
