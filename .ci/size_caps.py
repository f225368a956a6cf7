"""Check that no file and no function is longer than its cap, and that the checkout is not larger than its own.

A longer file holds a second idea and a longer function does a second job: split them.
"""

import ast
import subprocess
import sys
from pathlib import Path

FILE_LINES = 400
FUNCTION_LINES = 60
CHECKOUT_MIB = 48
"""Size of all files that git knows: everybody who clones the repository downloads them."""
LOOP_LINES = 80
LOOPS = {("textual_inversion/engine.py", "run"), ("pipeline/driver.py", "drive")}
SOURCES = ("textual_inversion", "pipeline", "demo", "benchmarks")


def breaches(path: Path) -> list[str]:
    text = path.read_text()
    found = []
    if (lines := text.count("\n")) > FILE_LINES:
        found.append(f"{path}: {lines} lines, cap {FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            cap = LOOP_LINES if (path.as_posix(), node.name) in LOOPS else FUNCTION_LINES
            if length > cap:
                found.append(f"{path}:{node.lineno}: {node.name} is {length} lines, cap {cap}")
    return found


def large_checkout() -> list[str]:
    names = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True, text=True).stdout.split("\0")
    size_mib = sum(Path(name).lstat().st_size for name in names if name and Path(name).exists()) / 2**20
    return [f"the checkout: {size_mib:.2f} MiB, cap {CHECKOUT_MIB}"] if size_mib > CHECKOUT_MIB else []


def main() -> int:
    paths = sorted(p for source in SOURCES for p in Path(source).rglob("*.py") if ".work" not in p.parts)
    found = [line for path in paths for line in breaches(path)] + large_checkout()
    sys.stdout.write("".join(f"{line}\n" for line in found) or f"size caps hold in {len(paths)} files\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
