"""The repository as files: what is committed, and the pieces of its documents that other things rely on."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "speckd"
_NOT_OURS = {".git", ".venv", "build", "dist", "runs", "quickstart-results"}


def committed() -> list[Path]:
    """Every file that git knows or would add; where there is no git, every file outside of build folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found = [ROOT / name for name in done.stdout.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        found = [p for p in ROOT.rglob("*") if not _NOT_OURS & set(p.relative_to(ROOT).parts) and "cache" not in str(p)]
    return sorted(p for p in found if p.is_file())


def texts() -> list[tuple[Path, str]]:
    """(path from the root, content) of every committed file that is text."""
    found = []
    for path in committed():
        try:
            found.append((path.relative_to(ROOT), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def block(marker: str, page: str = "README.md") -> str:
    """The fenced code between `<!-- marker -->` and `<!-- end -->`."""
    found = re.findall(rf"<!-- {re.escape(marker)} -->\n```\w*\n(.*?)```\n<!-- end -->", (ROOT / page).read_text(), re.DOTALL)
    assert len(found) == 1, f"{page}: {len(found)} blocks are marked '{marker}'"
    return found[0]


def first_column(page: str, heading: str) -> list[str]:
    """The names in backticks in the first column of the table whose first heading cell is `heading`."""
    lines = (ROOT / page).read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        found += re.findall(r"`([^`]+)`", line.split("|")[1])
    return found
