"""What importing costs, and what it offers."""

from __future__ import annotations

import subprocess
import sys

import colrow


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_importing_and_helping_need_no_torch() -> None:
    code = "import sys, colrow; assert 'torch' not in sys.modules; print(colrow.__version__)"
    assert run(code) == colrow.__version__
    for arguments in (
        ["--help"],
        ["generate", "--help"],
        ["verify", "--help"],
        ["comms", "--help"],
    ):
        code = (
            "import sys\nfrom colrow.cli import main\n"
            f"assert main({arguments!r}) == 0\nassert 'torch' not in sys.modules"
        )
        assert "usage: colrow" in run(code)


def test_layers_do_not_import_what_takes_as_long_as_torch_itself() -> None:
    code = "import sys, colrow\ncolrow.ColumnParallelLinear, colrow.Decoder, colrow.init_mesh\n"
    code += "print([m for m in ('torch._dynamo', 'torch.distributed.tensor') if m in sys.modules])"
    assert run(code) == "[]"


def test_every_exported_name_is_there() -> None:
    for name in colrow.__all__:
        value = getattr(colrow, name)
        assert name == "__version__" or value.__name__ == name


def test_every_public_name_is_exported_once() -> None:
    listed = [name for names in colrow._EXPORTS.values() for name in names]
    assert sorted([*listed, "__version__"]) == sorted(colrow.__all__)
    assert len(set(listed)) == len(listed)
