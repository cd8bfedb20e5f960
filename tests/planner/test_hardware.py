"""The table of devices: what is in it, what a user adds, what is wrong with a row."""

import pytest
import torch

from lightning_bigmodels.errors import InputError
from lightning_bigmodels.planner.hardware import _this_machine, find_hardware, known_hardware

COLUMNS = "name,memory_gib,memory_gb_s,fp32_tflops,tf32_tflops,bf16_tflops,fp16_tflops,fp8_tflops,"
COLUMNS += "product_efficiency,attention_efficiency,link_gb_s,network_gb_s,source\n"
V100 = "V100,15.77,900,15.7,,,125,,,,150,12.5,its data sheet\n"


def test_each_device_has_a_source_and_sound_numbers():
    devices = known_hardware()
    assert len(devices) == 13
    for hardware in devices.values():
        assert len(hardware.source) > 40
        assert 20 * 2**30 < hardware.memory < 200 * 2**30
        peaks = hardware.peak_flops
        assert peaks[torch.float32] <= hardware.tf32_flops < peaks[torch.bfloat16] == peaks[torch.float16]
        # operations for each byte: below, reading a matrix takes longer than multiplying it
        assert 75 < peaks[torch.bfloat16] / hardware.memory_bandwidth < 450
        assert 0.25 < hardware.product_efficiency < 0.9
        assert 0.25 < hardware.attention_efficiency < 0.9
        assert hardware.network_bandwidth < hardware.link_bandwidth < hardware.memory_bandwidth


def test_formats_that_a_device_lacks_are_computed_in_wider_ones():
    a100, h100 = find_hardware("a100"), find_hardware(" H100 ")
    assert a100.flops_of(torch.float8_e4m3fn) == a100.flops_of(torch.bfloat16) == 312e12
    assert h100.flops_of(torch.float8_e4m3fn) == pytest.approx(2 * h100.flops_of(torch.bfloat16), rel=0.001)
    assert h100.flops_of(None) == h100.flops_of(torch.float64) == h100.flops_of(torch.float32) == 67e12


def test_this_machine_is_measured():
    random = torch.get_rng_state()
    cpu = _this_machine.__wrapped__()
    assert 1e9 < cpu.peak_flops[torch.float32] < 1e14
    assert 1e8 < cpu.memory_bandwidth < 1e13
    assert find_hardware("cpu") is find_hardware("cpu")
    assert cpu.memory > 2**28
    rates = cpu.rates
    assert rates is not None
    assert 1e-7 < rates.start < 1e-3
    parts = "mm", "addmm", "bmm", "convolution", "convolution_backward"
    for name in (f"aten::{part}" for part in parts):
        for dtype in (torch.float32, torch.bfloat16):
            places, heights = zip(*rates.arithmetic[name, dtype], strict=True)
            assert list(places) == sorted(set(places))
            assert all(23 < height < 50 for height in heights)
    for name in ("_softmax", "native_batch_norm", "native_layer_norm", "gelu", "silu_backward", "sqrt"):
        assert 1e7 < rates.traffic[f"aten::{name}", torch.float32] < 1e13
    assert torch.equal(random, torch.get_rng_state())


def test_a_user_adds_and_changes_rows(tmp_path):
    table = tmp_path / "cards.csv"
    table.write_text(COLUMNS + V100 + "h100,94,3900,67,494.7,989.4,989.4,1978.9,0.8,,450,50,the 94 GB card\n")
    devices = known_hardware(str(table))
    assert len(devices) == 14
    assert devices["v100"].flops_of(torch.bfloat16) == devices["v100"].tf32_flops == 15.7e12
    assert devices["v100"].product_efficiency == 0.55
    assert devices["h100"].memory == 94 * 2**30
    assert find_hardware("h100").memory < 80 * 2**30


def test_what_only_measurements_know_may_be_left_out(tmp_path):
    table = tmp_path / "cards.csv"
    table.write_text(COLUMNS.replace("product_efficiency,attention_efficiency,", "") + V100.replace(",,,,", ",,"))
    v100 = find_hardware("v100", str(table))
    assert (v100.product_efficiency, v100.attention_efficiency) == (0.55, 0.4)
    assert (v100.link_bandwidth, v100.source) == (150e9, "its data sheet")
    assert v100.context == find_hardware("h100").context == int(0.9 * 2**30)
    table.write_text(COLUMNS.replace("source", "context_gib,source") + V100.replace("its", "1.25,its"))
    assert find_hardware("v100", str(table)).context == 1.25 * 2**30


def test_what_is_wrong_is_said(tmp_path):
    message = r"no device 'h1000' in the table; one of your own \(--gpu_table\) can add it; did you mean 'h100'\?$"
    with pytest.raises(InputError, match=message):
        find_hardware("h1000")
    table = tmp_path / "cards.csv"
    wrong = {
        "name,source\nx,y\n": r"cards.csv:1: no column memory_gib, .* in the hardware table; it needs name,memory_gib",
        COLUMNS
        + V100
        + V100.replace("900", "fast"): r"cards.csv:3: memory_gb_s is 'fast'; it must be a number above 0",
        COLUMNS + V100.replace("900", ""): r"cards.csv:2: memory_gb_s of v100 is empty; only efficiencies, context",
        COLUMNS + V100.replace("15.77", "-1"): r"memory_gib is '-1'; it must be a number above 0",
        COLUMNS + V100.replace("V100", "cpu"): r"cards.csv:2: the name is 'cpu'; give the device one, other than cpu",
    }
    for text, words in wrong.items():
        table.write_text(text)
        with pytest.raises(InputError, match=words):
            known_hardware(str(table))
    with pytest.raises(InputError, match=r"cannot be read .*; name a CSV file with the columns name,memory_gib"):
        known_hardware(str(tmp_path / "none.csv"))
