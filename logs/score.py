#!/usr/bin/env python3
"""Score an .int8.ptz or .npz file that train_gpt_mlx.py wrote. No code in it is run, even a stranger's, and no file is
written. Settings come from the environment, or else from the run's log, RUN_ID.txt beside the model."""

import argparse
import importlib.util
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from pickletools import genops, markobject
from types import ModuleType
from typing import Any

import numpy as np  # but not MLX: the script loads OpenBLAS before it

from runs import read_log

SCRIPT = Path(__file__).absolute().parents[1] / "train_gpt_mlx.py"


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


def import_script(path: Path, log: Path) -> ModuleType:
    """Import the script with the settings in a run's log. Environment variables come first."""
    sys.dont_write_bytecode = True
    declared = re.findall(r"^    (\w+): \w+ = ", path.read_text(encoding="utf-8"), re.MULTILINE)
    overrides = read_log(log).overrides if log.is_file() else None
    for name, value in (overrides or {}).items():
        if name.lower() in declared:  # a stranger's log must not set PATH
            os.environ.setdefault(name, value)
    sys.path.insert(0, str(path.parent))  # for what a fork imports
    spec = importlib.util.spec_from_file_location("fork", path)
    script = sys.modules["fork"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


# Python's unpickler calls whatever a file names, and NumPy trusts the file with sizes and flags. So this follows only
# the operations that runs write, calls nothing that a file names, and makes the arrays itself.
VALUES = r"NONE|NEW(TRUE|FALSE)|EMPTY_(DICT|LIST|TUPLE)|(SHORT_)?BIN(INT[12]?|FLOAT|UNICODE|BYTES)|BYTEARRAY8"


def unpickle(data: bytes) -> dict:
    """The object in a pickle of strings, bytes, numbers, lists, dicts and NumPy arrays. Tuples become lists."""
    stack, marks, memo = [], [], []
    for count, (operation, argument, _) in enumerate(genops(data)):
        name, takes = operation.name, operation.stack_before
        require(count < 1_000_000, "it has more operations than any run writes")
        if re.fullmatch(VALUES, name):
            values = {"NEWTRUE": True, "NEWFALSE": False, "EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": []}
            stack.append(values.get(name, argument))
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "MEMOIZE":
            memo.append(stack[-1])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            start = marks.pop() - takes.index(markobject) if markobject in takes else len(stack) - len(takes)
            stack[start:] = [operate(name, stack[start:])]
    return stack[-1]


def operate(name: str, operands: list) -> dict | list | np.ndarray:
    """The result of an operation of a pickle. A dtype is a list: ["f4", False, True] and its state [3, "<", ...]."""
    if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "STACK_GLOBAL"):
        return operands  # not a tuple, for that can be a key: hashing deeply nested ones crashes Python
    require(name in ("SETITEM", "SETITEMS", "APPEND", "APPENDS", "BUILD", "REDUCE"), f"no run writes {name}")
    first, *others = operands
    if name.startswith("SETITEM"):
        first.update(zip(others[::2], others[1::2], strict=True))
        return first
    if name != "REDUCE":  # BUILD adds a dtype's state
        first.extend(others)
        return first
    function = "{:.100}.{:.100}".format(*first[:2])
    if function == "numpy.dtype":
        return others[0]
    require(re.fullmatch(r"numpy\._?core\.numeric\._frombuffer", function) is not None, f"it would run {function}")
    buffer, dtype, shape, order = others[0]
    code = f"{dtype[3][1]:.9}{dtype[0]:.9}"
    require(re.fullmatch("[<|]([iu][1248]|f[248])", code) is not None, f"it has an array of {code}, not of numbers")
    return np.frombuffer(buffer, code).reshape(shape, order=order)


def layout(parts: dict) -> Iterator[str]:
    """The names, types and shapes of the arrays and numbers in a dict of dicts. All floating types are alike."""
    for part, content in parts.items():
        for name, leaf in content.items() if isinstance(content, dict) else ():
            if not isinstance(leaf, (str, dict)):
                kind = f"{leaf.dtype} {leaf.shape}" if hasattr(leaf, "shape") else type(leaf).__name__
                yield f"{part} {name} " + re.sub(r"\S*float\d+", "float", kind)


def read_model(script: ModuleType, path: Path, params: dict) -> dict:
    """The flat state in a file, if it is laid out as the script would write these parameters. Raises any error."""
    mx, limit = script.mx, 2**24 + sum(8 * param.size + 1024 for param in params.values())  # bytes
    if ".npz" in path.suffixes:
        found, expected = {"weights": {}}, {"weights": params}
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
            require(sum(e.file_size for e in archive.zip.infolist()) <= limit, "larger than a model of these settings")
            for name, array in archive.items():  # MLX writes bfloat16, which NumPy lacks, as V2
                array = mx.array(array.view("u2")).view(mx.bfloat16) if array.dtype == "V2" else mx.array(array)
                found["weights"][name] = array
    else:
        decompressor = zlib.decompressobj()
        raw = decompressor.decompress(np.fromfile(path, np.uint8, limit), limit)
        require(decompressor.eof, "cut off, or larger than a model of these settings")
        found, expected = unpickle(raw), script.quantize_state_dict_int8(params)[0]
    require(found.get("__quant_format__") == expected.get("__quant_format__"), "it has another format tag")
    its, wanted = set(layout(found)), set(layout(expected))
    differ = [f"{'lacks' if array in wanted else 'has'} {array}" for array in sorted(its ^ wanted)]
    require(not differ, f"not a model of these settings: it {', '.join(differ[:4])}")
    return found["weights"] if ".npz" in path.suffixes else script.dequantize_state_dict_int8(found)


def load_model(path: Path, script_path: Path) -> tuple[ModuleType, Any, Any]:
    """(script, its settings, its model with the weights in a file). Raises any error."""
    ending = r"(_mlx_model)?(\.npz|\.int8\.ptz)?(\.\d+)?$"  # the last is the number of a file moved aside
    log = Path(re.sub(ending, r".txt\3", str(path.resolve(strict=True)), count=1))
    script = import_script(script_path, log)
    args = script.Hyperparameters()
    script.check_settings(args)
    model = script.build_model(args)
    try:
        state = read_model(script, path, dict(script.tree_flatten(model.state)))
    except ValueError as error:
        hint = "" if log.is_file() else f" ({log} does not exist: set the run's settings as environment variables)"
        raise ValueError(f"{error}{hint}") from None
    model.update(script.tree_unflatten(list(state.items())))
    return script, args, model


def score(path: Path, script_path: Path) -> None:
    """Print the score of the model in a file."""
    script, args, model = load_model(path, script_path)
    val_tokens, num_tokens, byte_tables = script.read_validation(args)
    compiled_loss = script.mx.compile(model.loss, inputs=model.state, outputs=model.state)
    started, num_scored = time.perf_counter(), len(val_tokens) - 1
    val_loss, val_bpb = script.eval_val(args, compiled_loss, val_tokens, *byte_tables)
    eval_ms = 1000 * (time.perf_counter() - started)
    require(val_loss < float("inf"), f"val_loss is {val_loss}")
    name = "final_npz" if ".npz" in path.suffixes else "final_int8_zlib_roundtrip"
    mark = f" val_tokens:{num_scored}/{num_tokens}" if num_scored < num_tokens else ""
    print(f"{name} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{eval_ms:.0f}ms{mark}")
    print(f"{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}{mark}")


def report(path: Path, error: Exception) -> int:
    """Print what is wrong with a file, in one line. Returns the exit status."""
    reason = (
        str(error) if isinstance(error, (ValueError, OSError, RuntimeError)) else f"{type(error).__name__}: {error}"
    )
    line = "; ".join(reason.splitlines()).encode("unicode_escape").decode()  # without control characters
    print(f"error: {path}: {line:.1000}", file=sys.stderr)
    return 2


def main(arguments: list[str]) -> int:
    """Exit status: 0 for a score, 2 for an error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, help="RUN_ID_mlx_model.int8.ptz or RUN_ID_mlx_model.npz")
    parser.add_argument("--script", type=Path, default=SCRIPT, help="the fork that wrote it; its code is run")
    options = parser.parse_args(arguments)
    try:
        score(options.artifact, options.script)
        return 0
    except Exception as error:  # a damaged file can cause any error
        return report(options.artifact, error)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:  # not in main(): Ctrl-C may first end MLX's compiler, a RuntimeError
        sys.exit(130)
