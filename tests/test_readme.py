"""The README's Python runs as printed, and its tables are those of the committed rows."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(SNIPPETS)), ids=["shipped_model", "own_model", "many_devices"])
def test_snippet_runs_as_printed(number, tmp_path):
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number], encoding="utf-8")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert result.returncode == 0, result.stderr
    expected = ("layers_needed", "of 6 layers", "'tensor'")[number]
    assert expected in result.stdout


def test_tables_are_those_of_the_committed_rows():
    result = subprocess.run([sys.executable, ROOT / "bench" / "report.py", "--check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
