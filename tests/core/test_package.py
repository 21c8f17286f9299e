"""What is installed: one name with everything in it, and a user's folder of that name stays his own."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import mlx_kvret, sys
model, tokenizer = mlx_kvret.load("demo", backend="torch")
print(mlx_kvret.generate(model, tokenizer, "remember Anna amber recall Anna", budget=16, max_tokens=1))
print(mlx_kvret.__file__)
import converters
print(converters.MINE)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_claims_one_name_and_holds_everything(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mlx_kvret"}
    for package in ("mlx_kvret", "cuda_backend", "converters"):
        inside = "" if package == "mlx_kvret" else "mlx_kvret/"
        here = [path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")]
        assert {f"{inside}{path.as_posix()}" for path in here} <= set(names)
    for needed in (
        "py.typed",
        "demo/",
        "gates_shipped/smollm2/kvret.json",
        "mlx_backend/kernels/common.metal",
    ):
        assert any(name.startswith(f"mlx_kvret/{needed}") for name in names)


def test_it_works_beside_a_users_own_folder_of_that_name(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    for name in ("converters", "cuda_backend"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("MINE = 'mine'\n")
    (tmp_path / "script.py").write_text(USE)
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer, where, mine = done.stdout.split()
    assert (answer, mine) == ("amber", "mine")
    assert where.startswith(str(tmp_path))


def test_a_checkouts_folders_are_the_packages_own():
    code = (
        "import cuda_backend.selection, converters.forms, mlx_kvret.cuda_backend.selection as ours\n"
        "from mlx_kvret.converters import forms\n"
        "assert cuda_backend.selection is ours and converters.forms is forms\n"
        "assert ours.__spec__.name == ours.__name__ == 'mlx_kvret.cuda_backend.selection'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
