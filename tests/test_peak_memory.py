"""What the measure of memory counts, on a CPU for real and on a GPU by its allocator's own words."""

import pytest
import torch

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.peak_memory import CPUMemory, CUDAMemory, available_host_memory, memory_of

CPU = torch.device("cpu")


def test_cpu_memory_counts_both_halves_of_a_step():
    kept = []
    memory = CPUMemory(CPU, held=1000)
    try:
        kept.append(torch.zeros(25 * 256))
        assert memory.begin() == 1000 + 25 * 1024
        torch.zeros(100 * 256)
        kept.append(torch.zeros(10 * 256))
        memory.mark()
        torch.zeros(50 * 256)
        assert memory.peaks() == (1000 + 125 * 1024, 1000 + 85 * 1024)
        kept.clear()
        assert memory.begin() == 1000
        assert memory.peaks() == (1000, 1000), "no second half"
    finally:
        memory.end()


def test_cuda_memory_is_what_the_allocator_took_and_a_twentieth_is_left(monkeypatch):
    taken = {"now": 10, "peak": 10}
    fake = {
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: taken.update(peak=taken["now"]),
        "memory_reserved": lambda device: taken["now"],
        "max_memory_reserved": lambda device: taken["peak"],
        "mem_get_info": lambda device: (500, 1000),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    memory = memory_of(torch.device("cuda", 0))
    assert isinstance(memory, CUDAMemory)
    assert memory.begin() == 10
    taken["peak"] = 90
    memory.mark()
    taken["peak"] = 70
    assert memory.peaks() == (90, 70)
    assert (memory.room(8), memory.margin(memory.room(8))) == (510, 50)
    memory.end()


def test_available_memory_heeds_the_control_groups(tmp_path):
    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    with pytest.raises(InputError, match="state it with --memory GIB"):
        available_host_memory(tmp_path)
    write("proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    assert available_host_memory(tmp_path) == 4000 * 1024
    write("proc/self/cgroup", "4:cpu,memory:/job/step\n1:name=systemd:/\n0::/unit\n")
    assert available_host_memory(tmp_path) == 4000 * 1024
    version_1 = "sys/fs/cgroup/memory/job/memory"
    write(f"{version_1}.limit_in_bytes", "3000000\n")
    write(f"{version_1}.usage_in_bytes", "1000000\n")
    write(f"{version_1}.stat", "cache 7\ntotal_inactive_file 500\n")
    assert available_host_memory(tmp_path) == 2_000_500
    version_2 = "sys/fs/cgroup/unit/memory"
    write(f"{version_2}.max", "max\n")
    assert available_host_memory(tmp_path) == 2_000_500
    write(f"{version_2}.max", "1500000\n")
    write(f"{version_2}.current", "1400000\n")
    write(f"{version_2}.stat", "anon 1\ninactive_file 300\n")
    assert available_host_memory(tmp_path) == 100_300
    assert available_host_memory() > 0, "this machine's own"
