"""`sara plan` as a command: its tables, what it refuses, what it imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from alignment.cli import main as sara
from tests.test_plan import B70

pytestmark = pytest.mark.usefixtures("bare_checkout")


def test_the_tables_are_readable(capsys: pytest.CaptureFixture[str]) -> None:
    assert sara(["plan", B70, "--gpus", "32", "--gpu-memory", "80"]) == 0
    printed = capsys.readouterr().out
    whole = f"{68.98e9 * 2 / 2**30:.1f}"  # a copy of the policy in bfloat16, gathered to sample from it
    for text in ("32 GPUs on 4 nodes, ZeRO-3", "reference", whole, "Does not fit", "Fits with answers", "40% of 312"):
        assert text in printed
    assert sara(["plan", "recipes/llama2-7b/ppo.yaml", "--gpu-memory", "80", "--seed", "7"]) == 0
    assert "Fits: 70.8 GB of 80.0 at the peak." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ([B70], "--gpu-memory"),
        ([B70, "--gpu-memory", "0"], "must be above 0"),
        ([B70, "--gpu-memory", "80", "--gpus", "24"], "must divide into 24 processes"),
        ([B70, "--gpu-memory", "80", "--mfu", "40"], "at most 1"),
        ([B70, "--gpu-memory", "80", "--ppo.kl", "1"], "ppo.kl"),
        (
            [B70, "--gpu-memory", "80", "--launch", "launch/ddp.yaml"],
            "launch/ddp.yaml: model_init.dtype: a policy that is",
        ),
        ([B70, "--gpu-memory", "80", "--launch", "launch/nothing.yaml"], "launch/nothing.yaml: no such file"),
        ([B70, "--gpu-memory", "80", "--config-json", "nothing"], "nothing: no such file"),
        ([B70, "--gpu-memory", "80", "--model", "my/model"], "--config-json my/model=CONFIG.json"),
        (["recipes/llama2-7b/pipeline.yaml", "--gpu-memory", "80"], "stage must be one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sara(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert wrong in printed.err


def test_the_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom alignment.cli import main\n"
        "try: main(['plan', '--help'])\nexcept SystemExit: pass\n"
        "print(*({'torch', 'transformers', 'rich'} & set(sys.modules)), 'end')\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.splitlines()[-1] == "end", result.stdout + result.stderr
