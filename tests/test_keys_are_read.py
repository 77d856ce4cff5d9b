"""Every key of the schema is read by code, so that no setting is without effect."""

import ast
from pathlib import Path

from expert_iteration import keys
from expert_iteration.cli import CONFIG_DIR
from expert_iteration.config import Config

REPO = CONFIG_DIR.parent
NOT_READERS = {"keys.py", "validation.py", "resolve.py", "cli.py", "effects.py", "reward_rules.py"}
SECTION_OF_CLASS = {
    Config.__annotations__[section].__name__: section for section in keys.sections() if "." not in section
} | {"SchedulerConfig": "optimizer.scheduler", "Config": ""}


def product_files() -> list[Path]:
    package = [path for path in (REPO / "expert_iteration").glob("*.py") if path.name not in NOT_READERS]
    return sorted([*package, *REPO.glob("ei_utils.py"), *REPO.glob("expert-iteration-*.py")])


class ReadKeys(ast.NodeVisitor):
    """Collects the keys that code reads: attribute chains from a `Config`, from a section, or from a name for one.

    A name stands for a section when it is annotated with the section's class, assigned from a chain that leads there,
    or called like it (`train`, `train_cfg`, `cfg_optimizer`).
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.names: dict[str, str] = {"cfg": "", "config": ""}
        for section in keys.sections():
            short = section.rpartition(".")[2]
            for name in (short, f"{short}_cfg", f"{short}_config", f"cfg_{short}"):
                self.names[name] = section

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self.names = self.names, dict(self.names)
        for argument in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]:
            kind = ast.unparse(argument.annotation).strip("'\"") if argument.annotation else ""
            section = SECTION_OF_CLASS.get(kind.rpartition(".")[2])
            if section is not None:
                self.names[argument.arg] = section
        self.generic_visit(node)
        self.names = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for name, value in pairs:
                section = self.path(value)
                if section is not None and section in keys.sections():
                    self.names[ast.unparse(name)] = section

    def visit_Attribute(self, node: ast.Attribute) -> None:
        path = self.path(node)
        if path is not None and isinstance(node.ctx, ast.Load):
            self.found.add(path)
        self.generic_visit(node)

    def path(self, node: ast.expr) -> str | None:
        """The dotted key that an expression reads, if it does."""
        text = ast.unparse(node)
        if text in self.names:
            return self.names[text]
        if not isinstance(node, ast.Attribute):
            return None
        before = self.path(node.value)
        if before is None:
            # self.cfg.train.topk_size and the like: any chain through a section's name.
            return node.attr if node.attr in keys.sections() else None
        return f"{before}.{node.attr}" if before else node.attr


def read_keys(source: str) -> set[str]:
    reader = ReadKeys()
    reader.visit(ast.parse(source))
    return reader.found & set(keys.leaf_keys())


def test_every_key_is_read_by_code():
    read = set().union(*(read_keys(path.read_text()) for path in product_files()))
    assert sorted(set(keys.leaf_keys()) - read) == []


def test_the_walk_finds_reads_and_only_those():
    assert read_keys("def f(cfg: Config): return cfg.train.topk_size + cfg.seed") == {"train.topk_size", "seed"}
    assert read_keys("def f(c: 'InferenceModelConfig'): return c.top_p") == {"inference_model.top_p"}
    assert read_keys("train, e = cfg.train, cfg.env\ntrain.epochs; e.repeats") == {"train.epochs", "env.repeats"}
    assert read_keys("def f(scheduler_cfg):\n  s = scheduler_cfg\n  s.type") == {"optimizer.scheduler.type"}
    assert read_keys("self.cfg.optimizer.scheduler.num_cycles") == {"optimizer.scheduler.num_cycles"}
    assert read_keys("topk_size = 3; x.topk_size; cfg.env.topk_size; cfg.train.epochs = 3") == set()
