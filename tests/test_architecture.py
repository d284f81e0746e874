"""The structure: who may import whom, what is public, how large it is, what is never used."""

import ast
import doctest
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import minilora
from minilora import initialization, methods
from minilora.peft_format import apply, config, keys

inject = importlib.import_module("minilora.inject")  # `minilora.inject` is the function

ROOT = Path(minilora.__file__).resolve().parent
REPOSITORY = ROOT.parent

# What LoRA is, in the order of reading. It imports nothing of what is around it but the leaves.
HEART = (
    "functional", "config", "linears", "initialization", "layer", "targets", "inject", "merge",
)  # fmt: skip
LEAVES = ("modules", "conventions", "reports", "fused")
LIBRARY_LINES = 1576  # DESIGN: 1,300, without AdaLoRA, prompts and prefixes
APART = ("nf4", "methods", "conformance", "many", "__main__")  # topics by themselves

# The folders of the task. Each imports only those before it, and files of its own.
TASK = ("errors", "presets", "settings", "files", "hub", "processes", "data", "model", "evaluation",
        "training", "predict", "report", "flags", "merged", "commands", "cli")  # fmt: skip

# The public names of the design, and how Python spells what is not a function of the package.
PUBLIC = (
    "LoRAConfig", "LoRALinear", "LoRAError", "inject", "config_of", "trainable_parameters",
    "merge", "unmerge", "disabled", "unwrap", "unload", "save_adapter", "load_adapter",
    "read_adapter", "write_adapter", "Adapter", "MergeReport", "combine", "quantize",
    "parameter_groups",
)  # fmt: skip


EVERYTHING = sorted(ROOT.rglob("*.py"))


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of what a file imports, at whatever depth; relative ones written out."""
    package = path.relative_to(REPOSITORY).with_suffix("").parts[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *filter(None, [node.module])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def files_imported(path: Path, package: str) -> set[str]:
    """Which files of a package a file imports, by their stems."""
    folder = REPOSITORY / package.replace(".", "/")
    inside = (name.removeprefix(package) for name in imports(path) if name.startswith(package))
    stems = {name.split(".")[1] for name in inside if "." in name}
    return {stem for stem in stems if (folder / f"{stem}.py").exists()}


LIBRARY = [path for path in EVERYTHING if "summarization" not in path.parts]


def test_imports_are_seen_in_every_spelling() -> None:
    assert files_imported(ROOT / "linears.py", "minilora") == {"config"}
    assert files_imported(ROOT / "merge.py", "minilora") >= {"linears", "config", "inject", "layer"}
    assert {"torch", "torch.Tensor", "typing.Protocol"} <= set(imports(ROOT / "linears.py"))


def parts_imported(path: Path) -> set[str]:
    """Which files and folders of the library a file imports: the first part of their names."""
    names = (name.split(".") for name in imports(path) if name.startswith("minilora."))
    parts = {name[1] for name in names}
    return {p for p in parts if (ROOT / p).is_dir() or (ROOT / f"{p}.py").exists()}


@pytest.mark.parametrize("name", HEART)
def test_the_heart_imports_what_is_read_before_it_and_leaves(name: str) -> None:
    before = {*HEART[: HEART.index(name)], *LEAVES}
    assert parts_imported(ROOT / f"{name}.py") <= before


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_imports_the_configuration_and_the_leaves_before_it(name: str) -> None:
    assert parts_imported(ROOT / f"{name}.py") <= {"config", *LEAVES[: LEAVES.index(name)]}


def test_no_two_parts_of_the_library_import_each_other() -> None:
    """One direction, without a list to keep: parts that import nothing left are taken away."""
    parts: dict[str, set[str]] = {}
    for path in LIBRARY:
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if part not in ("__init__", "__main__"):
            parts.setdefault(part, set()).update(parts_imported(path) - {part})
    while free := [part for part, needed in parts.items() if not needed & parts.keys()]:
        for part in free:
            del parts[part]
    assert parts == {}


def test_the_heart_loads_nothing_of_what_is_around_it() -> None:
    """In an interpreter where `minilora/__init__.py`, which imports everything, is empty."""
    code = f"""
import sys, types
package = types.ModuleType("minilora")
package.__path__ = [{str(ROOT)!r}]
sys.modules["minilora"] = package
import minilora.layer, minilora.inject, minilora.merge
print(sorted(name for name in sys.modules if name.startswith("minilora.")))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    loaded = ast.literal_eval(done.stdout)
    assert set(loaded) == {f"minilora.{name}" for name in (*HEART, *LEAVES)}


def test_the_docstring_of_methods_names_the_tables_that_hold_them() -> None:
    tables = {
        "LAYERS": inject, "EXTRAS": inject, "DEQUANTIZERS": inject, "STARTS": initialization,
        "PARAMETERS": keys, "KINDS": config, "CONVERSIONS": apply,
    }  # fmt: skip
    assert methods.__doc__
    for name, module in tables.items():
        assert name in methods.__doc__
        assert getattr(module, name)  # and is filled


@pytest.mark.parametrize("field", ["dora", "lora_bias", "pissa", "adalora", None])
def test_the_parameters_of_a_layer_are_those_of_the_table(field: str | None) -> None:
    """Whoever adds a layer to LAYERS adds its parameters to PARAMETERS, or they are not saved."""
    assert set(inject.LAYERS) == {"dora", "lora_bias", "pissa", "adalora"}
    asked = {"pissa": {"init": "pissa"}, "adalora": {}, None: {}}.get(field, {field: True})
    config = minilora.LoRAConfig(rank=2, **asked)
    if field == "adalora":
        config = methods.AdaLoRAConfig(rank=2, target_rank=1, total_steps=1)
    layer = inject.layer_for(config)(torch.nn.Linear(6, 4), rank=2)
    found = {
        f"{keys.PREFIX}fc{keys.SUFFIXES[name]}": (tuple(parameter.shape), True)
        for name, parameter in layer.named_parameters(recurse=False)
    }
    assert found == keys.expected_of(config, "fc", 4, 6)


@pytest.mark.parametrize("path", modules(ROOT / "methods"), ids=lambda path: path.stem)
def test_a_method_is_a_file_of_at_most_150_lines(path: Path) -> None:
    assert code_lines(path) <= 150


@pytest.mark.slow
def test_inject_and_merge_are_functions_whatever_was_imported_first() -> None:
    code = "import minilora.merge, minilora.inject; print(minilora.merge, minilora.inject)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert done.stdout.startswith("<function merge")
    assert "<function inject" in done.stdout


@pytest.mark.parametrize("name", TASK)
def test_a_folder_of_the_task_imports_only_folders_before_it(name: str) -> None:
    folder = ROOT / "summarization"
    paths = sorted((folder / name).rglob("*.py")) or [folder / f"{name}.py"]
    before = TASK[: TASK.index(name) + 1]
    for path in paths:
        inside = (m.split(".") for m in imports(path) if m.startswith("minilora.summarization."))
        assert {parts[2] for parts in inside} <= set(before), path


def test_the_training_loop_fits_on_one_screen() -> None:
    """autocast, loss, scale, backward, unscale, clip, step, update: in at most 40 lines."""
    path = ROOT / "summarization" / "training" / "trainer.py"
    (trainer,) = (node for node in tree(path).body if getattr(node, "name", "") == "Trainer")
    assert isinstance(trainer, ast.ClassDef)
    lines = {node.name: node for node in trainer.body if isinstance(node, ast.FunctionDef)}
    loop = [lines["train_epoch"], lines["step"]]
    assert sum(node.end_lineno - node.lineno + 1 for node in loop if node.end_lineno) <= 40
    text = ast.unparse(loop[1])
    words = ("autocast()", "loss = ", "scale(", "backward()", "unscale_(", "clip(", "step(self.opt")
    places = [text.index(word) for word in (*words, "scaler.update()")]
    assert places == sorted(places)


def test_every_file_of_the_task_is_in_one_of_its_folders() -> None:
    folder = ROOT / "summarization"
    found = {path.stem for path in modules(folder)} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert found == set(TASK)


# Packages that a machine may lack: imported only inside the functions that use them.
LAZY = {"datasets", "rouge_score"}


@pytest.mark.slow
def test_the_task_starts_without_datasets_and_rouge_score() -> None:
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({sorted(LAZY)}))\n"  # importing them raises
        "from minilora.summarization.cli import evaluate_main, train_main"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_help_a_misspelt_flag_and_a_hub_name_offline_import_no_transformers() -> None:
    code = """
import sys
from minilora.__main__ import main as command
from minilora.summarization.cli import evaluate_main, train_main
calls = [(train_main, ["--help"]), (train_main, ["--rnak", "8"]), (evaluate_main, [])]
calls += [(train_main, ["--model", "nobody/nothing"])]
calls += [(command, [name, "--help"]) for name in ("train", "evaluate", "predict", "inspect")]
calls += [(command, ["--help"]), (command, ["trian"])]
for main, argv in calls:
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    print(code, {"transformers", "datasets"} & set(sys.modules), file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert "--rank RANK" in result.stdout
    ends = [line for line in result.stderr.splitlines() if not re.match("[a-z.]+: ", line)]
    assert ends == [f"{code} set()" for code in (0, 2, 2, 2, 0, 0, 0, 0, 0, 2)]


def test_the_library_imports_torch_safetensors_and_the_standard_library_only() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "safetensors", "minilora"}
    for path in LIBRARY:
        if path.name != "__main__.py":
            assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_the_library_knows_nothing_of_the_task() -> None:
    for path in LIBRARY:
        if path.name != "__main__.py":  # the command line of both
            assert not [name for name in imports(path) if "summarization" in name], path


def test_importing_the_library_loads_no_transformers() -> None:
    code = (
        "import sys, minilora; "
        "print({'transformers', 'datasets', 'peft', 'minilora.summarization'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_the_entry_points_hold_no_logic(name: str) -> None:
    path = REPOSITORY / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    nodes = list(ast.walk(tree(path)))
    assert sum(isinstance(node, ast.stmt) for node in nodes) <= 10
    assert not [node for node in nodes if isinstance(node, ast.For | ast.While | ast.With)]
    own = {module for module in imports(path) if module.startswith("minilora")}
    assert all(module.startswith("minilora.summarization.cli") for module in own)


def test_the_public_names_of_the_design_are_exported_and_documented() -> None:
    assert [name for name in PUBLIC if name not in minilora.__all__] == []
    assert len(set(minilora.__all__)) == len(minilora.__all__)
    for name in minilora.__all__:
        assert getattr(minilora, name).__doc__, name
        assert not name.startswith("_")


def test_every_file_says_what_it_is() -> None:
    assert [path for path in EVERYTHING if not ast.get_docstring(tree(path))] == []


RUNNING = {"pickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "torch.load"}


@pytest.mark.parametrize("path", EVERYTHING, ids=lambda path: path.stem)
def test_nothing_can_run_code_from_a_file_or_the_hub(path: Path) -> None:
    assert not RUNNING & {*imports(path), *(name.split(".")[0] for name in imports(path))}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in RUNNING
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "__import__"}
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert ast.unparse(node.value) == "False"


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    source = path.read_text(encoding="utf-8")
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in skip and token.string
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_code_lines_are_counted_without_words_and_blanks(tmp_path: Path) -> None:
    path = tmp_path / "file.py"
    words = '"""Words\n\nwords."""\n\n# words\n'
    path.write_text(words + 'x = (\n    1,  # words\n)\n\n\ny = """a\nb"""\n')
    assert code_lines(path) == 5


def test_the_heart_is_read_in_an_hour() -> None:
    sizes = {name: code_lines(ROOT / f"{name}.py") for name in HEART}
    assert sum(sizes.values()) <= 500, sizes


def test_the_library_is_read_in_an_evening() -> None:
    sizes = {
        str(path.relative_to(ROOT)): code_lines(path)
        for path in LIBRARY
        if path.relative_to(ROOT).parts[0].removesuffix(".py") not in APART
    }
    assert sum(sizes.values()) <= LIBRARY_LINES, sizes


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_examples_in_the_docstrings_are_true(path: Path) -> None:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    assert doctest.testmod(module).failed == 0


def test_the_readers_of_types_are_told_that_they_are_there() -> None:
    assert (ROOT / "py.typed").exists()
