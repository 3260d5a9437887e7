"""torchvision is imported whether or not its compiled half fits torch. Each case needs a fresh interpreter."""

import subprocess
import sys

import pytest


def fresh(code, *, path=None):
    """Run code in a new Python that finds `path` first; its standard output, or its last line of error."""
    code = (f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else "") + code
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


@pytest.fixture
def fake(tmp_path):
    """Write a package called torchvision whose __init__ does what is given."""

    def write(init):
        package = tmp_path / "torchvision" / "transforms" / "v2"
        package.mkdir(parents=True)
        (tmp_path / "torchvision" / "__init__.py").write_text("import torch\n" + init)
        (tmp_path / "torchvision" / "transforms" / "__init__.py").touch()
        (package / "__init__.py").touch()
        (package / "functional.py").write_text("here = 'yes'")
        return tmp_path

    return write


DESCRIBE = """
for name in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{name}")(lambda dets, scores, iou_threshold: scores)
"""


def test_the_installed_torchvision_resizes():
    import torch

    from minivlm._torchvision import functional

    sevens = torch.full((3, 8, 8), 7, dtype=torch.uint8)
    assert torch.equal(functional.resize(sevens, [2, 2]), sevens[:, :2, :2])


def test_a_torchvision_without_its_compiled_half_is_imported(fake):
    code = """
try:
    import torchvision
except RuntimeError as error:
    print(error)  # the fault itself
from minivlm._torchvision import functional
print(functional.here)
"""
    assert fresh(code, path=fake(DESCRIBE)) == "operator torchvision::nms does not exist\nyes"


def test_nothing_is_declared_where_the_operators_exist_and_nothing_is_imported_early(fake):
    """A second declaration of an operator is an error in torch, so a matching pair must be left alone."""
    path = fake("""
for name in ("nms", "qnms"):
    torch.library.define(f"torchvision::{name}", "(Tensor boxes, float t) -> Tensor")
""")
    code = """
import sys, torch, minivlm, minivlm.datasets.transforms, minivlm.datasets.folder
print("torchvision" in sys.modules)
from minivlm._torchvision import functional
print(functional.here, torch.ops.torchvision.nms.default._schema)
"""
    assert fresh(code, path=path) == "False\nyes torchvision::nms(Tensor boxes, float t) -> Tensor"


def test_any_other_fault_is_not_hidden(fake):
    code = "from minivlm._torchvision import functional"
    assert fresh(code, path=fake("raise RuntimeError('no such disk')")) == "RuntimeError: no such disk"
