"""That the parts of the project that repeat each other agree: README, requirements, the script and its header."""

import ast
import re
import subprocess
import sys

import pytest

import train_gpt_mlx as tg
from helpers import REPO, check_one_line_error

README = (REPO / "README.md").read_text(encoding="utf-8")
SOURCE = (REPO / "train_gpt_mlx.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
COMMANDS = re.findall(r"```bash\n(.*?)```", README, flags=re.S)


def test_the_script_is_below_1500_lines_and_its_functions_fit_on_a_screen():
    assert SOURCE.count("\n") < 1500
    functions = [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in functions if node.end_lineno - node.lineno >= 50] == []


def test_the_script_imports_only_what_its_requirements_bring():
    imports = [node for node in ast.walk(TREE) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"mlx", "numpy", "sentencepiece"}


def test_every_public_piece_of_the_script_says_what_it_is():
    classes = [node for node in TREE.body if isinstance(node, ast.ClassDef)]
    methods = [node for owner in classes for node in owner.body if isinstance(node, ast.FunctionDef)]
    public = [node for node in [*TREE.body, *methods] if getattr(node, "name", "_")[0] != "_"]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


def test_the_scripts_header_and_the_requirements_agree():
    header = re.search(r"# /// script\n(.*?)# ///\n", SOURCE, flags=re.S)[1]
    training = (REPO / "requirements.txt").read_text(encoding="utf-8").split("\n\n")[0]
    required = [line.replace('"', "'") for line in training.splitlines() if not line.startswith("#")]
    assert re.findall(r'#     "(.*)",', header) == required


def test_the_readme_shows_defaults_of_settings_as_they_are():
    shown = re.findall(r"^\| `(\w+)=(\S+)` \|", README, flags=re.M)
    assert len(shown) == 10
    assert [(name, str(getattr(tg.Hyperparameters, name.lower()))) for name, _ in shown] == shown


def test_the_readme_names_settings_files_and_pieces_that_exist():
    known = {name.upper() for owner in (tg.Hyperparameters, tg.ModuleSettings) for name in tg.settings_of(owner)}
    assert set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", "".join(COMMANDS))) <= known
    files = re.findall(r"[\w./]+\.(?:py|txt)\b", "".join(COMMANDS)) + re.findall(r"\]\(([\w./]+)\)", README)
    assert [path for path in files if not (REPO / path).exists()] == []
    pieces = "".join(re.findall(r"^\| \d+\. [^|]*\| ([^|]*)\|", README, flags=re.M))
    assert [name for name in re.findall(r"`(\w+)`", pieces) if name not in {*dir(tg), *dir(tg.Hyperparameters)}] == []


def test_the_readmes_first_two_commands_are_complete():
    install = "python3 -m venv .venv && .venv/bin/pip install -r "
    assert re.fullmatch(f"{install}.* data/prepare.py .*/python train_gpt_mlx.py\n", COMMANDS[0], flags=re.S)
    assert re.fullmatch(f"{install}.* -m pytest tests\n", COMMANDS[1])


@pytest.mark.slow
def test_a_fork_that_imports_the_script_runs_as_far_as_the_data(tmp_path):
    code = f"""import sys; sys.path.insert(0, {str(REPO)!r})
import train_gpt_mlx as base
import mlx.core as mx
base.MLP.__call__ = lambda self, x: self.proj(mx.maximum(self.fc(x), 0))
sys.exit(base.command_line([]))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    check_one_line_error(done.stderr, "./data/", "no such file")


def test_the_top_level_holds_nothing_else():
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    top = {path.split("/")[0] for path in listed.stdout.split() if path[0] != "."}
    assert top == {"train_gpt_mlx.py", "README.md", "requirements.txt", "tests", "data", "logs"}
