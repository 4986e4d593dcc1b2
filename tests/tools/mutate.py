"""Mutation check: changes the code in small ways, one at a time, and counts the changes that the fast tests notice.

`python tests/tools/mutate.py [--modules baseline slots ...] [--jobs 2] [--json FILE]` prints a table and every change
that no test noticed. What a change costs is a fork of this process, which has imported the heavy libraries but none of
ours, and the tests of the changed module up to the first that fails. Tests that train are left out.
"""

import argparse
import ast
import contextlib
import copy
import gc
import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path


TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PACKAGE = ROOT / "treerpo_trl"

# Which tests concern a module.
PACKED = ["prefix_sharing/test_prefix_packing.py", "prefix_sharing/test_prefix_sharing.py"]
SPLIT = ["growth/test_split_rules.py", "growth/test_delimiters.py"]
TESTS_OF = {
    "credit.values": ["credit/test_credit.py", "credit/test_credit_paths.py"],
    "credit.siblings": ["credit/test_credit.py", "credit/test_credit_unbiased.py"],
    "credit.paths": ["credit/test_credit_paths.py"],
    "credit.baseline": ["credit/test_credit_baseline.py"],
    "credit.estimators": ["credit/test_credit.py", "credit/test_credit_paths.py"],
    "credit.assign": ["credit/test_credit.py", "credit/test_credit_paths.py", "credit/test_credit_baseline.py"],
    "rows.slots": ["rows/test_rows.py"],
    "growth.shape": ["growth/test_sampling.py", "rows/test_rows.py", *SPLIT],
    "growth.waves": ["growth/test_sampling.py", "rows/test_rows.py"],
    "growth.forks": ["growth/test_sampling.py", "rows/test_rows.py", "reporting/test_metrics.py", *SPLIT],
    "growth.delimiters": ["growth/test_sampling.py", *SPLIT],
    "prefix_sharing.attention": PACKED,
    "prefix_sharing.flex": PACKED,
    "prefix_sharing.forward": PACKED,
    "prefix_sharing.layout": PACKED,
    "prefix_sharing.packing": PACKED,
    "prefix_sharing.sharing": PACKED,
    "prefix_sharing.support": PACKED,
}
LEAST_SCORE = 0.9
CONTEXT = 25  # characters on each side of a change that are printed
EXAMPLES = 40  # of each law; the tests themselves draw 100

# Changes that no test can notice, because they change no result: module -> reason -> changes, as they are printed.
EQUIVALENT: dict[str, dict[str, list[str]]] = {
    "credit.values": {
        "both are made of equal length; the check is for readers": [
            "ValuedTree.of: …ip(tree.nodes, num_tokens, strict=True)))  ->  …ip(tree.nodes, num_tokens)))",
            "ValuedTree.of: …odes, num_tokens, strict=True)))  ->  …odes, num_tokens, strict=False)))",
        ],
    },
    "credit.assign": {
        "without a reward no group has a value, so nothing is compared": [
            "_kept: …rd is not None), default=0.0)  ->  …rd is not None), default=1.0)",
        ],
        "the trees are held against what was made of the rewards once more, at the end": [
            "assign_batch: …rds in zip(trees, rewards, strict=True)]  ->  …rds in zip(trees, rewards)]",
            "assign_batch: …p(trees, rewards, strict=True)]  ->  …p(trees, rewards, strict=False)]",
        ],
        "a node that is compared with no sibling is not kept": [
            "_of_tree: advantages = [0.0] * len(tree.parents)  ->  advantages = [1.0] * len(tree.parents)",
        ],
    },
    "credit.paths": {
        "both are made of equal length; the check is for readers": [
            "tree_mean: …ount in zip(total, counts, strict=True)]  ->  …ount in zip(total, counts)]",
            "tree_mean: …ip(total, counts, strict=True)]  ->  …ip(total, counts, strict=False)]",
        ],
    },
    "credit.baseline": {
        "only the root has depth 0, and it is not trained": [
            "optimal_baseline: for depth in range(1, max((max(tree.depths) f…  ->  "
            "for depth in range(0, max((max(tree.depths) f…",
            "optimal_baseline: …orest) for node in range(1, len(tree.parents)) if t…  ->  "
            "…orest) for node in range(0, len(tree.parents)) if t…",
        ],
        "both are made of equal length; the check is for readers": [
            "optimal_baseline: …odes, value_M, baseline_M, strict=True):  ->  …odes, value_M, baseline_M):",
            "optimal_baseline: …ue_M, baseline_M, strict=True):  ->  …ue_M, baseline_M, strict=False):",
        ],
        "the root has no siblings, and no node stands before its parent": [
            "_sibling_means: for node in range(1, len(tree.parents)):  ->  for node in range(0, len(tree.parents)):",
            "_mean_outside: …or index in range(node + 1, len(tree.parents)):  ->  "
            "…or index in range(node + 0, len(tree.parents)):",
        ],
        "features of nodes that lack one have no weight": [
            "fit_baselines: …_M[:, None], feature_MF, 0.0)  ->  …_M[:, None], feature_MF, 1.0)",
        ],
        "any number far below a variance and far above rounding does": [
            "module: FLAT = 1e-10  ->  FLAT = 2e-10",
            "module: ROUNDING = 1e-07  ->  ROUNDING = 2e-07",
        ],
    },
    "rows.slots": {
        "what stands behind the last node of a path is only looked up for padding, which is masked": [
            "lay_out: …en for node in nodes] + [False] * missing)  ->  …en for node in nodes] + [True] * missing)",
        ],
    },
    "prefix_sharing.attention": {
        "any shape of four dimensions that no mask has does; nobody reads the values": [
            "module: NO_MASK_SHAPE = (1, 1, 1, 1)  ->  NO_MASK_SHAPE = (0, 1, 1, 1)",
            "module: NO_MASK_SHAPE = (1, 1, 1, 1)  ->  NO_MASK_SHAPE = (2, 1, 1, 1)",
            "module: …O_MASK_SHAPE = (1, 1, 1, 1)  ->  …O_MASK_SHAPE = (1, 1, 1, 2)",
            "module: …O_MASK_SHAPE = (1, 1, 1, 1)  ->  …O_MASK_SHAPE = (1, 1, 1, 0)",
            "module: NO_MASK_SHAPE = (1, 1, 1, 1)  ->  NO_MASK_SHAPE = (1, 2, 1, 1)",
            "module: NO_MASK_SHAPE = (1, 1, 1, 1)  ->  NO_MASK_SHAPE = (1, 0, 1, 1)",
            "module: NO_MASK_SHAPE = (1, 1, 1, 1)  ->  NO_MASK_SHAPE = (1, 1, 2, 1)",
            "module: NO_MASK_SHAPE = (1, 1, 1, 1)  ->  NO_MASK_SHAPE = (1, 1, 0, 1)",
        ],
        "both are made of equal length; the check is for readers": [
            "_attend_in_groups: …m_keys in shapes], dim=1), strict=True)  ->  …m_keys in shapes], dim=1))",
            "_attend_in_groups: … shapes], dim=1), strict=True)  ->  … shapes], dim=1), strict=False)",
        ],
        "the flag means nothing where there are as many key heads as heads": [
            "_attend: …ing, enable_gqa=repeats > 1)  ->  …ing, enable_gqa=repeats >= 1)",
            "_attend: …ng, enable_gqa=repeats > 1)  ->  …ng, enable_gqa=repeats > 0)",
        ],
        "two ways to the same sum, of which one is faster on a CPU": [
            "_Take.backward: if grad.device.type == 'cpu':  ->  if grad.device.type != 'cpu':",
        ],
    },
    "prefix_sharing.forward": {
        "any shape of four dimensions that no mask has does; nobody reads the values": [
            "forward_shared: …ts, attention_mask=torch.zeros(NO_MASK_SHAPE, device=p…  ->  "
            "…ts, attention_mask=torch.ones(NO_MASK_SHAPE, device=p…",
        ],
        "pack_rows takes any truth values": [
            "find_difference: …sk, torch.ones_like(dense, dtype=torch.bool)).log_probs  ->  "
            "…sk, torch.ones_like(dense)).log_probs",
        ],
    },
    "prefix_sharing.packing": {
        "any number that no position is next to does": [
            "module: PADDING = -2  ->  PADDING = -3",
        ],
        "both are made of equal length; the check is for readers": [
            "_segments: …rsts, wanted_ends, shared, strict=True):  ->  …rsts, wanted_ends, shared):",
            "_segments: …ted_ends, shared, strict=True):  ->  …ted_ends, shared, strict=False):",
            "_segments: …, end in zip(starts, ends, strict=True))):  ->  …, end in zip(starts, ends))):",
            "_segments: …zip(starts, ends, strict=True))):  ->  …zip(starts, ends, strict=False))):",
            "_place: …zip(starts, ends, strict=True)]  ->  …zip(starts, ends, strict=False)]",
            "_place: …, end in zip(starts, ends, strict=True)]  ->  …, end in zip(starts, ends)]",
            "_place: …, end in zip(firsts, ends, strict=True)])  ->  …, end in zip(firsts, ends)])",
            "_place: …zip(firsts, ends, strict=True)])  ->  …zip(firsts, ends, strict=False)])",
            "_gather: …p(pairwise(bounds), first, strict=True) if position != PADDING]  ->  "
            "…p(pairwise(bounds), first) if position != PADDING]",
            "_gather: …e(bounds), first, strict=True) if position != PADDING…  ->  "
            "…e(bounds), first, strict=False) if position != PADDING…",
        ],
        "the first row begins at its first column whatever it shares": [
            "_segments: shared = [0, *same_BL.long().cumprod…  ->  shared = [1, *same_BL.long().cumprod…",
            "_segments: computed = 0  ->  computed = 1",
        ],
        "rows without a segment own no column": [
            "_place: offset_B = torch.zeros_like(length_B)  ->  offset_B = torch.ones_like(length_B)",
        ],
        "a row without a segment begins where the rows before stop, and later rows own what follows": [
            "_place: …= column_L) & (length_B > 0)[:, None]  ->  …= column_L) & (length_B >= 0)[:, None]",
        ],
        "the first row begins a group, which sets it": [
            "_group: area = 0  ->  pass",
            "_group: area = 0  ->  area = 1",
        ],
    },
    "prefix_sharing.support": {
        "only an encoder-decoder model has another text model, and it is refused in any case": [
            "unsupported_reason: …l.config.get_text_config(decoder=True)  ->  …l.config.get_text_config()",
        ],
        "every model of transformers has the attribute": [
            "unsupported_reason: …r(model, '_is_stateful', False):  ->  …r(model, '_is_stateful', True):",
            "unsupported_reason: …orts_attention_backend', False):  ->  …orts_attention_backend', True):",
        ],
    },
}


# Making mutants


@dataclass(frozen=True)
class Mutant:
    """One small change of a module.

    Args:
        module: Name below the package.
        line: Where the change is, in the module as it stands.
        change: The function and what is around the change, before and after; without a line number, so that it lasts.
        source: The changed module.
    """

    module: str
    line: int
    change: str
    source: str


OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.In: ast.NotIn, ast.Is: ast.IsNot,
    ast.LtE: ast.Lt, ast.GtE: ast.Gt, ast.NotEq: ast.Eq, ast.NotIn: ast.In, ast.IsNot: ast.Is,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = [
    ("min", "max"), ("any", "all"), ("amin", "amax"), ("argmin", "argmax"), ("cumsum", "cumprod"),
    ("cummin", "cummax"), ("zeros", "ones"), ("zeros_like", "ones_like"), ("new_zeros", "new_ones"),
    ("startswith", "endswith"), ("removeprefix", "removesuffix"),
]  # fmt: skip
NAMES = dict(PAIRS) | {second: first for first, second in PAIRS} | {"reversed": "iter"}


def changed(node: ast.AST, **fields) -> ast.AST:
    """A copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def without(items: list, index: int) -> list:
    return items[:index] + items[index + 1 :]


def negated(test: ast.expr) -> ast.expr:
    match test:
        case ast.UnaryOp(op=ast.Not()):
            return test.operand
        case ast.Compare(ops=[ast.Eq() | ast.NotEq() | ast.In() | ast.NotIn() | ast.Is() | ast.IsNot() as operator]):
            return changed(test, ops=[OPERATORS[type(operator)]()])
    return ast.UnaryOp(ast.Not(), test)


def replacements(node: ast.AST, rebound: set[str]) -> Iterator[ast.AST]:
    """Everything that may stand in the place of a node. `rebound` are the names that its function binds repeatedly."""
    match node:
        case ast.Compare():
            for index, operator in enumerate(node.ops):
                yield changed(node, ops=[*node.ops[:index], OPERATORS[type(operator)](), *node.ops[index + 1 :]])
        case ast.BinOp() | ast.BoolOp():
            yield changed(node, op=OPERATORS[type(node.op)]())
        case ast.UnaryOp():
            yield node.operand
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int()):
            yield ast.Constant(node.value + 1)
            if node.value == 1:
                yield ast.Constant(0)
        case ast.Constant(value=float()):
            yield ast.Constant(2 * node.value or 1.0)
        case ast.Name(ctx=ast.Load()) if node.id in NAMES:
            yield changed(node, id=NAMES[node.id])
        case ast.Attribute(ctx=ast.Load()) if node.attr in NAMES:
            yield changed(node, attr=NAMES[node.attr])
        case ast.Slice():
            for name in ("lower", "upper"):
                if (bound := getattr(node, name)) is not None:
                    yield changed(node, **{name: None})
                    if not isinstance(bound, ast.Constant):
                        yield changed(node, **{name: ast.BinOp(bound, ast.Add(), ast.Constant(1))})
        case ast.Call():
            for index in range(len(node.keywords)):
                yield changed(node, keywords=without(node.keywords, index))
        case ast.If() | ast.While() | ast.IfExp():
            yield changed(node, test=negated(node.test))
        case ast.comprehension():
            for index, test in enumerate(node.ifs):
                yield changed(node, ifs=[*node.ifs[:index], negated(test), *node.ifs[index + 1 :]])
        case ast.AugAssign():
            yield changed(node, op=OPERATORS[type(node.op)]())
            yield ast.Pass()
        case ast.Return(value=ast.expr()):
            yield changed(node, value=ast.Constant(None))
        case ast.Assign() if has_effect(node, rebound):
            yield ast.Pass()
        case ast.Expr() | ast.Raise() | ast.Continue() | ast.Break() | ast.Return():
            yield ast.Pass()


def has_effect(node: ast.Assign, rebound: set[str]) -> bool:
    """Whether code can run, and do something else, without an assignment. Others would only leave a name unbound."""
    targets = [target for each in node.targets for target in ast.walk(each)]
    return any(
        isinstance(target, ast.Attribute | ast.Subscript) or (isinstance(target, ast.Name) and target.id in rebound)
        for target in targets
    )


def is_skipped(node: ast.AST) -> bool:
    """Docstrings, `__all__`, and code for type checkers."""
    match node:
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
    return False


def rebound_names(function: ast.AST) -> set[str]:
    names = Counter(
        each.arg if isinstance(each, ast.arg) else each.id
        for each in ast.walk(function)
        if isinstance(each, ast.arg) or (isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))
    )
    return {name for name, count in names.items() if count > 1}


def header(statement: ast.stmt) -> str:
    """A statement without the statements in it."""
    emptied = {name: [] for name in ("body", "orelse", "handlers", "finalbody") if hasattr(statement, name)}
    return " ".join(ast.unparse(changed(statement, **emptied)).split())


def common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def difference(before: str, after: str) -> str:
    """Both texts, without what is far from where they differ."""
    start = common(before, after)
    same = common(before[start:][::-1], after[start:][::-1])
    cut = max(0, start - CONTEXT)
    ends = [("…" if cut else "") + text[cut : len(text) - same + CONTEXT] + "…" * (same > CONTEXT)
            for text in (before, after)]  # fmt: skip
    return "  ->  ".join(ends)


def mutants_of(module: str, text: str | None = None) -> list[Mutant]:
    """Every mutant of a module, in order; those that read the same only once. `text` stands for the file's."""
    tops = ast.parse(path_of(module).read_text() if text is None else text).body
    texts = [ast.unparse(top) for top in tops]
    found: dict[str, Mutant] = {}

    def visit(node: ast.AST, statement: ast.AST, scope: list[str], rebound: set[str]) -> None:
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for index, child in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(child, ast.AST) or is_skipped(child):
                    continue
                inner = child if isinstance(child, ast.stmt) else statement
                for new in replacements(child, rebound):
                    put(node, name, index, new)
                    source = "\n".join([*texts[:position], ast.unparse(top), *texts[position + 1 :]])
                    after = header(new if inner is child else inner)
                    put(node, name, index, child)
                    change = f"{'.'.join(scope) or 'module'}: {difference(header(inner), after)}"
                    found.setdefault(source, Mutant(module, inner.lineno, change, source))
                if isinstance(child, ast.FunctionDef | ast.ClassDef):
                    visit(child, inner, [*scope, child.name], rebound_names(child))
                elif not isinstance(child, ast.Raise):  # messages
                    visit(child, inner, scope, rebound)

    for position in range(len(tops)):
        top = ast.Module([tops[position]], [])
        visit(top, top, [], set())
    found.pop("\n".join(texts), None)
    return list(found.values())


def put(node: ast.AST, name: str, index: int, new: ast.AST) -> None:
    """Put a node in the place of a child."""
    value = getattr(node, name)
    if isinstance(value, list):
        value[index] = new
    else:
        setattr(node, name, new)


def path_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


# Running tests


class MutantFinder:
    """Imports one module from other source than its file's."""

    def __init__(self, mutant: Mutant):
        self.name, self.path, self.source = f"treerpo_trl.{mutant.module}", path_of(mutant.module), mutant.source

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        loader = SourceFileLoader(name, str(self.path))
        loader.get_code = lambda name: compile(self.source, str(self.path), "exec", dont_inherit=True)
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


@dataclass
class Guide:
    """A plugin of pytest that runs the tests first that noticed most so far, then the quickest, and none that train.

    Args:
        kills: How many mutants of the module each test noticed.
        seconds: How long each test takes.
    """

    kills: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    failed: str | None = None

    def pytest_collection_modifyitems(self, items):
        from hypothesis import settings

        assert settings.default.max_examples == EXAMPLES, "conftest.py's profile won"
        quick = [item for item in items if "make_args" not in item.fixturenames]
        items[:] = sorted(quick, key=lambda item: (-self.kills[item.nodeid], self.seconds[item.nodeid]))

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed = report.nodeid


def run_tests(module: str, mutant: Mutant | None, guide: Guide) -> int:
    """pytest's exit status."""
    import pytest
    import torch
    from hypothesis import HealthCheck, Phase, settings

    torch.set_num_threads(1)
    settings.register_profile(
        "mutate", deadline=None, derandomize=True, database=None, max_examples=EXAMPLES,
        phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    if mutant is not None:
        sys.meta_path.insert(0, MutantFinder(mutant))
    files = [str(TESTS / name) for name in TESTS_OF[module]]
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "--hypothesis-profile=mutate"]
    return int(pytest.main([*files, *options], plugins=[guide]))


@dataclass
class Child:
    """A forked process that runs tests."""

    mutant: Mutant | None
    folder: Path
    deadline: float


def fork(module: str, mutant: Mutant | None, guide: Guide, cpu_seconds: float, folder: Path) -> tuple[int, Child]:
    """Start the tests of a module. Their output, and what the guide saw, come to lie in `folder`."""
    folder.mkdir()
    if pid := os.fork():
        # Other processes may slow this one down, so the limit that counts is that of its own time.
        return pid, Child(mutant, folder, time.monotonic() + 60 + 10 * cpu_seconds)
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_seconds) + 1, int(cpu_seconds) + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(folder / "output" if mutant is None else os.devnull, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        status = run_tests(module, mutant, guide)
        libraries = [
            name for name, each in sys.modules.items() if not is_ours(getattr(each, "__file__", None)) and "." in name
        ]
        report = {"failed": guide.failed, "seconds": guide.seconds}
        (folder / "report.json").write_text(json.dumps(report | ({"libraries": libraries} if mutant is None else {})))
    finally:
        os._exit(status)


def is_ours(file: str | None) -> bool:
    return file is not None and Path(file).is_relative_to(ROOT) and "site-packages" not in file


def wait(children: dict[int, Child]) -> tuple[Child, str, str | None, float]:
    """The next child that ends: what became of it, which test failed, and the processor time it took."""
    while True:
        for pid, child in children.items():
            done, status, usage = os.wait4(pid, os.WNOHANG)
            is_late = not done and time.monotonic() > child.deadline
            if is_late:
                os.killpg(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
            if done or is_late:
                del children[pid]
                report = child.folder / "report.json"
                failed = json.loads(report.read_text())["failed"] if report.exists() else None
                code = os.waitstatus_to_exitcode(status)
                is_late = is_late or code in (-signal.SIGXCPU, -signal.SIGKILL)
                outcome = "timed out" if is_late else "killed" if code else "survived"
                return child, outcome, failed, usage.ru_utime + usage.ru_stime
        time.sleep(0.01)


def run_unchanged(module: str, folder: Path) -> tuple[Guide, float]:
    """Run the tests on the code as it is, which must pass, and load the libraries they use into this process."""
    pid, child = fork(module, None, Guide(), 600, folder)
    _, outcome, _, cpu_seconds = wait({pid: child})
    if outcome != "survived":
        sys.exit(f"{(folder / 'output').read_text()}\nthe tests of {module} fail on the unchanged code ({outcome})")
    report = json.loads((folder / "report.json").read_text())
    for name in report["libraries"]:
        with contextlib.suppress(Exception):  # some exist only inside pytest
            importlib.import_module(name)
    gc.freeze()  # or each child would go through all of their objects
    return Guide(seconds=Counter(report["seconds"])), cpu_seconds


def check(module: str, jobs: int, folder: Path) -> list[tuple[Mutant, str, str | None]]:
    """Each mutant of a module, what became of it, and the test that noticed it."""
    guide, cpu_seconds = run_unchanged(module, folder / module)
    waiting, running, results = mutants_of(module)[::-1], {}, []
    total = len(waiting)
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            target = folder / f"{module}-{len(waiting)}"
            pid, child = fork(module, mutant, guide, max(20, 4 * cpu_seconds), target)
            running[pid] = child
        child, outcome, failed, _ = wait(running)
        results.append((child.mutant, outcome, failed))
        if failed:
            guide.kills[failed] += 1
        done = f"{module} {len(results)} of {total}"
        news = "" if outcome == "killed" else f" {outcome}: {child.mutant.change}\n"
        print(f"\r{done}{news}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    run_unchanged(module, folder / f"{module}-again")  # or somebody changed the code meanwhile, and the kills are his
    return sorted(results, key=lambda result: result[0].line)


# Reporting


def equivalents(module: str) -> dict[str, str]:
    """Change -> why it is none."""
    return {change: reason for reason, changes in EQUIVALENT.get(module, {}).items() for change in changes}


def score(results, excused=frozenset()) -> float:
    counted = [outcome for mutant, outcome, _ in results if outcome != "survived" or mutant.change not in excused]
    return sum(outcome != "survived" for outcome in counted) / max(1, len(counted))


def show(results: dict[str, list[tuple[Mutant, str, str | None]]]) -> None:
    for module, outcomes in results.items():
        known = equivalents(module)
        survivors = [mutant for mutant, outcome, _ in outcomes if outcome == "survived"]
        for mutant in sorted(survivors, key=lambda mutant: mutant.change in known):
            where = f"{path_of(module).relative_to(ROOT)}:{mutant.line}"
            reason = f"\n    equivalent: {known[mutant.change]}" if mutant.change in known else ""
            print(f"{where} {mutant.change}{reason}")
        for change in known.keys() - {mutant.change for mutant in survivors}:
            print(f"{module}: no survivor, so not equivalent: {change}")
    columns = ("mutants", "killed", "timed out", "survived", "equivalent", "score", "without equivalents")
    print(f"\n{'module':26}" + "  ".join(columns))
    for module, outcomes in results.items():
        counts = Counter(outcome for _, outcome, _ in outcomes)
        excused = equivalents(module).keys()
        equivalent = sum(outcome == "survived" and mutant.change in excused for mutant, outcome, _ in outcomes)
        numbers = (
            len(outcomes), counts["killed"], counts["timed out"], counts["survived"], equivalent,
            f"{score(outcomes):.1%}", f"{score(outcomes, excused):.1%}",
        )  # fmt: skip
        cells = (f"{number:>{len(name)}}" for number, name in zip(numbers, columns, strict=True))
        print(f"{module:26}" + "  ".join(cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", help="names, whole or their last part; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="how many mutants to test at a time")
    parser.add_argument("--json", type=Path, help="file to write every mutant and its outcome to")
    parser.add_argument("--no-gate", action="store_true", help=f"succeed with a score below {LEAST_SCORE:.0%} too")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    options = parser.parse_args()
    modules = [
        name for name in TESTS_OF if options.modules is None or {name, name.rpartition(".")[2]} & set(options.modules)
    ]
    if options.list:
        for mutant in (mutant for module in modules for mutant in mutants_of(module)):
            print(f"{mutant.module}:{mutant.line} {mutant.change}")
        return 0
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in ("torch", "transformers", "trl", "peft", "datasets", "hypothesis", "pytest"):
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        results = {module: check(module, options.jobs, Path(folder)) for module in modules}
    show(results)
    if options.json:
        rows = [
            asdict(mutant) | {"outcome": outcome, "test": failed}
            for outcomes in results.values()
            for mutant, outcome, failed in outcomes
        ]
        options.json.write_text(json.dumps(rows, indent=1))
    return int(not options.no_gate and any(score(outcomes) < LEAST_SCORE for outcomes in results.values()))


if __name__ == "__main__":
    sys.exit(main())
