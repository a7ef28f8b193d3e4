"""Rules of the source that no linter knows, each with a table of the files that still break it.

A file that breaks a rule must stand in ``OFFENDERS``, and a file that stands there must break it:
whoever mends a file takes it out of the table.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from streamcomp.recipe import FORMS, METHODS
from tests.test_imports import MODULES, PACKAGE

MOST_PARAMETERS = 8
MOST_LINES = 500
_FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef

# A rule -> files that break it -> why they may.
OFFENDERS: dict[str, dict[str, str]] = {}

# Takes a module's path, tree and text, and gives the lines that break the rule.
Rule = Callable[[str, ast.Module, str], Iterator[int]]


def last_name(node: ast.expr) -> str:
    """The last part of a dotted name, or the string in brackets: ``kind`` of ``step["kind"]``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            return name
    return ""


def constants(tree: ast.Module) -> dict[str, set[str]]:
    """Strings in the constants of a module, by the constant's name."""
    named: dict[str, set[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named[node.targets[0].id] = strings(node.value, {})
    return named


def strings(node: ast.AST, named: dict[str, set[str]]) -> set[str]:
    """The string that an expression is, or those in the tuple, list, set or dict that it is."""
    match node:
        case ast.Constant(value=str(text)):
            return {text}
        case ast.Name(id=name):
            return named.get(name, set())
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return {text for item in items for text in strings(item, named)}
        case ast.Dict(keys=keys):
            return {text for key in keys if key for text in strings(key, named)}
        case ast.MatchValue(value=value):
            return strings(value, named)
        case ast.MatchOr(patterns=patterns):
            return {text for pattern in patterns for text in strings(pattern, named)}
    return set()


def comparisons(tree: ast.Module) -> Iterator[tuple[int, set[str], list[ast.expr]]]:
    """A line, the strings that something is compared with there, and all that is compared.

    A choice by a dict, ``{"uv": one, "pivot": other}[form]``, is a comparison too.
    """
    named = constants(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Compare(left=left, comparators=others):
                sides = [left, *others]
                yield node.lineno, {s for side in sides for s in strings(side, named)}, sides
            case ast.Match(subject=subject, cases=cases):
                for choice in cases:
                    yield choice.pattern.lineno, strings(choice.pattern, named), [subject]
            case ast.Subscript(value=ast.Dict() as table, slice=key):
                yield node.lineno, strings(table, named), [key]


def names_of(node: ast.AST) -> set[str]:
    """Names, attributes and keys within an expression: ``{"step", "kind"}`` of ``step.kind``."""
    return {last_name(part) for part in ast.walk(node) if isinstance(part, ast.expr)}


def compares_forms(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    if not path.startswith("forms/"):
        yield from (line for line, texts, _ in comparisons(tree) if texts & set(FORMS))


def compares_methods(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    if not path.startswith("methods/"):
        yield from (line for line, texts, _ in comparisons(tree) if texts & set(METHODS))


def asks_for_a_method(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    yield from asks_for(classes_of("methods"), tree)


def asks_for_a_step(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    yield from asks_for(classes_of("job/steps"), tree)


def asks_for(classes: frozenset[str], tree: ast.Module) -> Iterator[int]:
    for line, kinds in classes_asked_for(tree):
        if {last_name(kind) for kind in kinds} & classes:
            yield line


@cache
def classes_of(room: str) -> frozenset[str]:
    """Names of all classes in a room."""
    return frozenset(
        node.name
        for path in (PACKAGE / room).glob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef)
    )


def classes_asked_for(tree: ast.Module) -> Iterator[tuple[int, list[ast.expr]]]:
    """A line, and the classes that ``isinstance``, ``issubclass``, ``type`` or a case asks for."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                yield node.lineno, [part for part in ast.walk(kinds) if isinstance(part, ast.expr)]
            case ast.Compare(left=ast.Call(func=ast.Name(id="type")), comparators=kinds):
                yield node.lineno, kinds
            case ast.MatchClass(cls=kind):
                yield node.lineno, [kind]


def asks_for_nn_linear(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    """Sites know where weights are, and the modules of stored forms are linears themselves."""
    if path in ("model/sites.py", "forms/install.py", "forms/runtime.py"):
        return
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.nn")
        for alias in node.names
        if alias.name == "Linear"
    }
    for line, kinds in classes_asked_for(tree):
        for kind in kinds:
            whole = ast.unparse(kind)
            if whole in imported or re.fullmatch(r"(torch\.)?nn\.([a-z.]+\.)?Linear", whole):
                yield line
                break


def builds_attribute_names(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    """``getattr(self, f"_{kind}")``: a reader who looks for ``_copy`` does not find its caller.

    A name that is not put together is allowed, as in a loop over a dataclass's fields: a variable,
    an attribute or an item, unless the same function assigns it something that is put together.
    """
    for scope in (tree, *(node for node in ast.walk(tree) if isinstance(node, _FUNCTIONS))):
        nodes = list(nodes_of(scope))
        built = {
            target.id
            for node in nodes
            if isinstance(node, ast.Assign | ast.NamedExpr | ast.AnnAssign)
            and node.value is not None
            and is_built(node.value)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for node in nodes:
            match node:
                case ast.Call(
                    func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr"),
                    args=[_, name, *_],
                ) if is_built(name) or (isinstance(name, ast.Name) and name.id in built):
                    yield node.lineno


def nodes_of(scope: ast.AST) -> Iterator[ast.AST]:
    """All nodes in a function or module that are in no function within it."""
    for node in ast.iter_child_nodes(scope):
        yield node
        if not isinstance(node, _FUNCTIONS):
            yield from nodes_of(node)


def is_built(name: ast.expr) -> bool:
    return not isinstance(name, ast.Constant | ast.Name | ast.Attribute | ast.Subscript)


def takes_many_parameters(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    """``self`` and ``cls`` do not count, ``*args`` and ``**kwargs`` count as one each."""
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS | ast.Lambda):
            taken = node.args
            names = [a.arg for a in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)]
            names += [a.arg for a in (taken.vararg, taken.kwarg) if a is not None]
            if len(names) - (names[:1] in (["self"], ["cls"])) > MOST_PARAMETERS:
                yield node.lineno


def is_long(path: str, tree: ast.Module, text: str) -> Iterator[int]:
    if text.count("\n") > MOST_LINES:
        yield MOST_LINES + 1


RULES: dict[str, Rule] = {
    "compares with the name of a form": compares_forms,
    "compares with the name of a method": compares_methods,
    "asks whether something is a method's class": asks_for_a_method,
    "asks whether something is a step's class": asks_for_a_step,
    "asks for nn.Linear": asks_for_nn_linear,
    "gets an attribute by a name put together": builds_attribute_names,
    f"has a function of more than {MOST_PARAMETERS} parameters": takes_many_parameters,
    f"is longer than {MOST_LINES} lines": is_long,
}


def broken(rule: Rule, source: str, path: str = "job/example.py") -> list[int]:
    return sorted(set(rule(path, ast.parse(source), source)))


@pytest.mark.parametrize("rule", RULES)
def test_no_file_breaks_a_rule_but_those_that_are_named(rule: str) -> None:
    lines = {
        path.as_posix(): broken(RULES[rule], (PACKAGE / path).read_text("utf-8"), path.as_posix())
        for path in MODULES
    }
    offenders = {path: at for path, at in lines.items() if at}
    named = OFFENDERS.get(rule, {})

    unnamed = {path: at for path, at in offenders.items() if path not in named}
    assert not unnamed, f"{rule}: path -> lines: {unnamed}"
    mended = named.keys() - offenders.keys()
    assert not mended, f"{rule} no longer, take them out of OFFENDERS: {sorted(mended)}"


def test_the_table_names_rules_that_there_are() -> None:
    assert OFFENDERS.keys() <= RULES.keys()


# -- each rule can be broken ---------------------------------------------------------------------

_MANY = ", ".join("abcdefgh")

BREAKS: list[tuple[Rule, str]] = [
    (compares_forms, 'form == "pivot"'),
    (compares_forms, 'form not in ("dense", "uv")'),
    (compares_forms, '"uv" != spec["form"]'),
    (compares_forms, 'match form:\n    case "x" | "shared":\n        pass'),
    (compares_forms, '_WIDE = ("pivot", "uv")\nwide = form in _WIDE'),
    (compares_forms, '{"pivot": 1, "uv": 2}[form]'),
    (compares_methods, 'recipe.method == "swsc"'),
    (compares_methods, 'match method:\n    case "two-sided":\n        pass'),
    (compares_methods, 'method in {"rom", "svd-llm"}'),
    (asks_for_a_step, "isinstance(step, WriteBlock)"),
    (asks_for_a_step, "type(planned.step) is Copy"),
    (asks_for_a_step, "match step:\n    case Forward():\n        pass"),
    (asks_for_a_method, "isinstance(method, Swsc)"),
    (asks_for_a_method, "issubclass(kind, (int, methods.TwoSided))"),
    (asks_for_a_method, "isinstance(method, Rom | SvdLlm)"),
    (asks_for_a_method, "type(method) is Swsc"),
    (asks_for_a_method, "match method:\n    case Swsc():\n        pass"),
    (asks_for_nn_linear, "isinstance(module, nn.Linear)"),
    (asks_for_nn_linear, "isinstance(module, (torch.nn.Linear, int))"),
    (asks_for_nn_linear, "from torch.nn import Linear as L\nisinstance(module, L)"),
    (asks_for_nn_linear, "type(module) is nn.Linear"),
    (builds_attribute_names, 'getattr(self, f"_{step.kind}")(step)'),
    (builds_attribute_names, 'setattr(self, "_" + kind, value)'),
    (builds_attribute_names, 'getattr(self, "_%s" % kind)'),
    (builds_attribute_names, "getattr(self, kind.lower())"),
    (builds_attribute_names, 'def f(self):\n    name = f"_{kind}"\n    getattr(self, name)'),
    (takes_many_parameters, f"def f({_MANY}, i): pass"),
    (takes_many_parameters, f"def f(self, {_MANY}, *, i): pass"),
    (takes_many_parameters, f"f = lambda {_MANY}, *i: 0"),
    (is_long, "pass\n" * 501),
]

KEEPS: list[tuple[Rule, str, str]] = [
    (compares_forms, 'form == "pivot"', "forms/pivot.py"),
    (compares_forms, 'FORMS = ("pivot", "uv")\nform = "pivot"', "recipe.py"),
    (compares_methods, 'method == "swsc"', "methods/swsc.py"),
    (asks_for_a_method, "isinstance(method, str)", "job/run.py"),
    (asks_for_nn_linear, "isinstance(module, nn.Linear)", "model/sites.py"),
    (asks_for_nn_linear, "isinstance(module, Linear)", "job/run.py"),
    (asks_for_nn_linear, "isinstance(module, nn.Module)", "job/run.py"),
    (builds_attribute_names, 'getattr(config, "top_k", 0)', "job/run.py"),
    (builds_attribute_names, "for name in names: getattr(self, name)", "recipe.py"),
    (builds_attribute_names, "getattr(transformers, cls.target)", "job/run.py"),
    (
        builds_attribute_names,
        "def f():\n    name = key.lower()\n\ndef g(name):\n    getattr(x, name)",
        "job/run.py",
    ),
    (takes_many_parameters, f"def f(self, {_MANY}): pass", "job/run.py"),
    (is_long, "pass\n" * 500, "job/run.py"),
]


@pytest.mark.parametrize(("rule", "source"), BREAKS)
def test_a_rule_sees_what_breaks_it(rule: Rule, source: str) -> None:
    assert broken(rule, source)


@pytest.mark.parametrize(("rule", "source", "path"), KEEPS)
def test_a_rule_lets_pass_what_keeps_it(rule: Rule, source: str, path: str) -> None:
    assert not broken(rule, source, path)


def test_steps_and_methods_are_found() -> None:
    assert {"Tokenize", "Reverse", "WriteBlock", "Copy"} <= classes_of("job/steps")
    assert {"TwoSided", "SvdLlm", "Rom", "Swsc"} <= classes_of("methods")


def test_every_rule_is_seen_broken() -> None:
    assert {rule for rule, _ in BREAKS} == set(RULES.values())
