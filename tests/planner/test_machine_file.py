from __future__ import annotations

import json
from pathlib import Path

import pytest

from colrow.planner import Layout, load_machine, predict
from colrow.planner.catalog import shape_of_sizes
from colrow.planner.machine_file import machine_from_mapping

TOML = """
name = "two cores"
devices_per_node = 2

[device]
memory_gigabytes = 4
memory_gigabytes_per_second = 10
peak_teraflops = { fp32 = 0.1 }
matmul = [[1e6, 1e-4], [1e9, 2e-2]]

[[link]]
op = "all_reduce"
ranks = 2
message_bytes = [1000, 1000000]
seconds = [1e-4, 1e-3]
"""


def test_toml_and_json_describe_the_same(tmp_path: Path) -> None:
    toml = tmp_path / "machine.toml"
    toml.write_text(TOML)
    machine = load_machine(toml)
    assert machine.name == "two cores" and machine.devices_per_node == 2
    assert machine.link.collective_seconds("all_reduce", 1000000, 2) == pytest.approx(1e-3)
    data = {
        "name": "two cores",
        "devices_per_node": 2,
        "device": {
            "memory_gigabytes": 4,
            "memory_gigabytes_per_second": 10,
            "peak_teraflops": {"fp32": 0.1},
            "matmul": [[1e6, 1e-4], [1e9, 2e-2]],
        },
        "link": [
            {
                "op": "all_reduce",
                "ranks": 2,
                "message_bytes": [1000, 1000000],
                "seconds": [1e-4, 1e-3],
            }
        ],
    }
    file = tmp_path / "machine.json"
    file.write_text(json.dumps(data))
    assert load_machine(file) == machine
    shape = shape_of_sizes("s", "llama", hidden=64, layers=2, heads=4, ffn=128, vocab=100)
    layout = Layout(tp=2, sequence=64, precision="fp32")
    assert predict(shape, layout, machine).time.tp_exposed > 5 * 1e-4


def test_builtin_hardware_can_be_amended(tmp_path: Path) -> None:
    file = tmp_path / "slow.toml"
    file.write_text(
        'base = "a100-80gb"\n[[network]]\ngigabytes_per_second = 1.0\nlatency_microseconds = 50\n'
    )
    machine = load_machine(file)
    assert machine.device.memory_bytes == 80e9 and machine.network.bandwidth == 1e9


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("memory_gigabytes = 4", "", "lacks memory_gigabytes"),
        ("memory_gigabytes = 4", "memory_gigabytes = -4", "must be positive"),
        ("memory_gigabytes = 4", 'memory_gigabytes = "4"', "must be a number"),
        ("memory_gigabytes = 4", "memory_gb = 4", "unknown key 'memory_gb'"),
        ("ranks = 2", "ranks = 1", "at least 2 ranks"),
        ('"all_reduce"', '"reduce"', "must be all_reduce"),
        ("[1000, 1000000]", "[1000]", "do not match"),
        ("[[link]]", "[[link", "is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(TOML.replace(old, new))
    with pytest.raises(ValueError, match=message) as error:
        load_machine(file)
    assert str(file) in str(error.value)


def test_a_gpu_without_known_multiprocessors_keeps_its_reserve() -> None:
    """24 GB do not hold 23.3 GB of a model and a CUDA context beside it; a CPU has no context."""
    device = {"memory_gigabytes": 24, "memory_gigabytes_per_second": 900}
    device |= {"peak_teraflops": {"bf16": 100, "fp32": 50}}
    layout = Layout(sequence=1024)
    gpu, cpu = (
        predict("gpt2", layout, machine_from_mapping({"device": d}, default_name="m"))
        for d in (device, device | {"cpu": True})
    )
    assert gpu.memory.fullest.reserve > 1e9 and cpu.memory.fullest.reserve == 0
    with pytest.raises(ValueError, match="cpu=1: must be true or false"):
        machine_from_mapping({"device": device | {"cpu": 1}}, default_name="m")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999", "true", '"8"'])
def test_numbers_that_are_none(value: str, tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    for key in ("devices_per_node", "device.memory_gigabytes"):
        file.write_text(f'base = "a100-80gb"\n{key} = {value}\n')
        with pytest.raises(ValueError, match=rf"{key.split('.')[-1]}=.*: must be"):
            load_machine(file)
