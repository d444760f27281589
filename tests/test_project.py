"""That the parts of the project that repeat each other agree: README, requirements, the script's own header."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

import train_gpt_mlx as tg
from helpers import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
SOURCE = (REPO / "train_gpt_mlx.py").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)


def requirements(text: str) -> set[str]:
    lines = (line.split("#")[0].strip().replace("'", '"') for line in text.splitlines())
    return {line for line in lines if line and not line.startswith("-r")}


def test_script_header_and_requirements_agree():
    header = re.search(r"# /// script\n(.*?)# ///\n", SOURCE, flags=re.S)[1]
    metadata = "\n".join(line.removeprefix("# ") for line in header.splitlines())
    assert re.search(r'^requires-python = ">=3\.10"$', metadata, flags=re.M)
    dependencies = ast.literal_eval(re.search(r"dependencies = (\[.*?\])$", metadata, flags=re.S | re.M)[1])
    training, tools = (REPO / "requirements.txt").read_text().split("\n\n")
    assert requirements("\n".join(dependencies)) == requirements(training)
    assert {re.match(r"\w+", line)[0] for line in requirements(tools)} == {"huggingface_hub", "tqdm"}


def test_script_imports_only_what_it_may():
    modules = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.split(".")[0])
    assert modules - sys.stdlib_module_names == {"mlx", "numpy", "sentencepiece"}
    assert SOURCE.count("\n") < 1500


def test_every_public_piece_of_the_script_says_what_it_is():
    for node in ast.parse(SOURCE).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert ast.get_docstring(node), node.name
            assert node.end_lineno - node.lineno < 100, f"{node.name} is longer than a screen"


def test_readme_shows_the_settings_as_help_prints_them():
    assert f"```\n{tg.help_text()}\n```" in README


def test_readme_commands_name_real_settings_and_files():
    known = {s.variable for owner in (tg.Hyperparameters, tg.ModuleSettings) for s in tg.settings_of(owner).values()}
    used = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", "".join(BLOCKS)))
    assert used <= known
    for path in re.findall(r"[\w./]+\.(?:py|txt)\b", "".join(BLOCKS)):
        assert (REPO / path).exists(), path
    for name in re.findall(r"^\| \d\. [^|]*\| ([^|]*)\|", README, flags=re.M):
        for code in re.findall(r"`(\w+)`", name):
            assert hasattr(tg, code) or hasattr(tg.Hyperparameters, code), code


def test_first_two_commands_are_complete():
    run, test = BLOCKS[:2]
    for block in (run, test):
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install -r ")
    assert "data/prepare.py" in run
    assert run.rstrip().endswith("train_gpt_mlx.py")
    assert test.rstrip().endswith("-m pytest tests")
    assert subprocess.run(["bash", "-n", "-c", run + test], check=False).returncode == 0


@pytest.mark.slow
def test_readme_example_of_a_fork_runs_as_far_as_the_data(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    code = f"import sys; sys.path.insert(0, {str(REPO)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: DATA_PATH=./data/datasets/fineweb10B_sp1024: no such folder")


def test_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.split()}
    assert {name for name in top if not name.startswith(".")} == {
        "train_gpt_mlx.py", "README.md", "requirements.txt", "tests", "data", "logs"}  # fmt: skip
