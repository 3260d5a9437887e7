"""Who may import whom, and what `import minivlm` costs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minivlm"
HEAVY = ["torchvision", "PIL", "tokenizers", "safetensors", "transformers", "huggingface_hub", "open_clip", "tqdm"]


def run(script: str) -> str:
    """Standard output of a fresh Python process."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def text_files_without_encoding(path: Path) -> list[str]:
    """Calls of open, read_text and write_text for text that leave its encoding to the machine."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        attribute = isinstance(node.func, ast.Attribute)
        name = node.func.attr if attribute else getattr(node.func, "id", "")
        texts = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        modes = [text for text in texts if re.fullmatch("[rwaxbt+]+", text)]
        text = name == "open" and (not attribute or modes) and not any("b" in mode for mode in modes)
        if text or (attribute and name in ("read_text", "write_text")):
            found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    return found


def test_all_text_files_are_utf_8_on_every_machine():
    sources = [ROOT / "train.py", ROOT / "sample.py", *PACKAGE.rglob("*.py"), *(ROOT / "data").rglob("*.py")]
    assert not [call for path in sources for call in text_files_without_encoding(path)]


def imports(path: Path, *, inside_functions: bool) -> set[str]:
    """The minivlm modules that a file imports: "layers.vit", "losses" …, at its top or inside its functions as well."""
    tree = ast.parse(path.read_text())
    found = set()

    def visit(node: ast.AST):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and not inside_functions:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            found.update({f"{node.module}.{a.name}" for a in node.names} if node.module == "minivlm" else {node.module})
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return {name.removeprefix("minivlm.") for name in found if name.startswith("minivlm.")}


def files(*parts: str) -> list[Path]:
    found = []
    for part in parts:
        found += [PACKAGE / part] if part.endswith(".py") else sorted((PACKAGE / part).rglob("*.py"))
    assert all(path.exists() for path in found) and found
    return found


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", files("layers"), ids=name)
def test_a_layer_imports_torch_and_other_layers(path):
    """Language models are bricks that are models as well: they have a loss, a directory, and they speak; BERT is a model.
    Ids that the table of tokens has no row for, and pictures that no grid of patches fits, are a user's."""
    speaks = {"model", "generation", "losses"}
    more = {"language_model.py": speaks, "t5.py": speaks, "bert.py": {"model"}}
    more |= {
        "vocabulary.py": {"errors", "origins", "precision"},
        "vit.py": {"errors", "model"},
        "resnet.py": {"errors"},
    }
    more = more.get(path.name, set())
    assert {m.partition(".")[0] for m in imports(path, inside_functions=True)} <= {"layers"} | more


@pytest.mark.parametrize("path", files("losses", "errors.py"), ids=name)
def test_a_leaf_imports_nothing_of_the_package(path):
    own = {path.parent.name} if path.parent != PACKAGE else set()
    assert {m.partition(".")[0] for m in imports(path, inside_functions=True)} <= own


@pytest.mark.parametrize("path", files("testing"), ids=name)
def test_assertions_know_no_model(path):
    assert {m.partition(".")[0] for m in imports(path, inside_functions=True)} <= {"testing"}


def test_the_engine_that_speaks_knows_no_model():
    for path in files("generation"):
        assert {m.partition(".")[0] for m in imports(path, inside_functions=True)} <= {"errors", "generation"}


@pytest.mark.parametrize("path", files("models"), ids=name)
def test_a_model_imports_layers_and_losses(path):
    """Reading and writing a directory is a verb of every model, so its base reaches for `checkpoint` when asked to."""
    assert {m.partition(".")[0] for m in imports(path, inside_functions=True)} <= {
        *("model", "errors", "generation", "layers", "losses", "models")
    }


def test_the_base_of_all_models_reaches_for_directories_only_when_asked_to():
    [path] = files("model.py")
    top = lambda **how: {m.partition(".")[0] for m in imports(path, **how)}
    assert top(inside_functions=False) == {"errors", "generation", "losses", "origins"}  # which know no model
    later = {"errors", "generation", "layers", "losses", "origins"}  # it asks the package for `load` and `save`
    assert top(inside_functions=True) == later


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=name)
def test_nothing_below_knows_the_command_line(path):
    top = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    upper = {"recipes", "tasks", "evaluate", "bench", "run", "training", "training_log", "processes", "info", "zoo"}
    upper |= {"command_line_rows", "command_line_files", "memory", "curves", "trackers", "compare", "human"}
    upper |= {"run_results"}
    if top not in upper | {"__init__", "__main__"}:
        assert not {m.partition(".")[0] for m in imports(path, inside_functions=False)} & upper
    if top in {"layers", "losses", "models", "datasets", "metrics", "processor", "checkpoint", "pretrained", "testing"}:
        assert not {m.partition(".")[0] for m in imports(path, inside_functions=True)} & upper


def test_importing_the_package_loads_nothing_that_is_not_needed_yet():
    script = "import sys, minivlm; print(*sys.modules)"
    loaded = set(run(script).split())
    assert "minivlm" in loaded
    assert not loaded & {*HEAVY, "torch"}


def test_models_layers_and_assertions_need_torch_alone():
    script = (
        "import sys, torch\n"  # which may load some of them itself
        "before = set(sys.modules)\n"
        "import minivlm, minivlm.layers, minivlm.testing\n"
        "minivlm.CLIP, minivlm.CLIPLoss\n"
        "print(*set(sys.modules) - before)"
    )
    loaded = set(run(script).split())
    assert {"minivlm.models.clip", "minivlm.losses", "minivlm.layers.vit"} <= loaded
    assert not loaded & set(HEAVY)


def test_costs_little_more_than_torch():
    """The best of three: the machine may be busy, but it cannot be too fast."""
    script = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import minivlm, minivlm.layers\n"
        "minivlm.CLIP, minivlm.CLIPLoss, minivlm.UserError\n"
        "print(time.perf_counter() - start)"
    )
    seconds = []
    for _ in range(3):
        seconds.append(float(run(script)))
        if seconds[-1] < 0.3:
            return
    pytest.fail(f"importing minivlm takes {min(seconds):.2f} s beyond torch")


def test_every_public_name_exists():
    import minivlm

    assert set(minivlm.__all__) <= set(dir(minivlm))
    for public in minivlm.__all__:
        assert getattr(minivlm, public).__name__ == public
    with pytest.raises(AttributeError, match="'minivlm' has no attribute 'CLIPP'"):
        minivlm.CLIPP  # noqa: B018


def test_every_brick_is_exported():
    import minivlm.layers

    for public in minivlm.layers.__all__:
        assert hasattr(minivlm.layers, public)
