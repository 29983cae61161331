"""The tool that follows the documentation to the letter: which blocks it takes, and what it notices."""

import runpy
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
newcomer = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "newcomer.py")))

PAGE = """
<!-- newcomer -->
```bash
name=there
```

```bash
exit 1
```

<!-- newcomer: said.py -->
```python
import sys
```

<!-- newcomer: said.py -->
```python
print("drift  0.0524 of", sys.argv)
```

<!-- newcomer -->
```console
drift 0.1 of ['said.py']
```

<!-- newcomer -->
```bash
echo $name 12 times
```

<!-- newcomer -->
```console
there 3 times
```
"""


def test_marked_blocks_are_one_shell(tmp_path):
    steps = newcomer.steps_of(PAGE)
    done = subprocess.run(
        ["bash", "-c", newcomer.script_of(steps)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["drift  0.0524 of ['said.py']", "there 12 times"]
    assert newcomer.missing_from(done.stdout, steps) == []


@pytest.mark.parametrize(
    ("output", "missing"),
    [
        ("there 3 times\n", ["drift 0.1 of ['said.py']", "there 3 times"]),
        ("there 3 times\ndrift 1e-5 of ['said.py']\n", ["there 3 times"]),
        ("drift -1 of ['said.py']\nand then\nthere 4,096 times\n", []),
    ],
)
def test_what_a_page_says_is_printed_must_be_in_its_order(output, missing):
    assert newcomer.missing_from(output, newcomer.steps_of(PAGE)) == missing


@pytest.mark.parametrize("way", newcomer.WAYS.values(), ids=newcomer.WAYS)
def test_every_way_leads_from_install_to_the_verdict(way):
    steps = newcomer.steps_of((ROOT / "docs" / way.page).read_text("utf-8"))
    commands = [step.text for step in steps if step.language == "bash"]
    assert commands[0].startswith("pip install ")
    assert " drift " in commands[-1]
    assert any("CraftOptimizer(" in step.text or "craft-optim train" in step.text for step in steps)
