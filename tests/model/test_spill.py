"""Numbers kept in mapped files are the same numbers, take no memory while they rest, and go with their last user."""

import gc
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import bitween
from bitween.gradual import GradualQuantizer
from bitween.model.memory import resident_bytes
from bitween.model.spill import Spill, end_rest
from bitween.scheme import Scheme

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="everything stays in memory there")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_a_kept_tensor_holds_the_same_numbers_before_and_after_it_rested(dtype):
    spill = Spill(least=1)
    values = (1000 * torch.randn(37, 53)).to(dtype)
    kept = spill.keep(values.T)
    assert kept.data_ptr() != values.data_ptr()
    assert kept.shape == (53, 37)
    assert kept.dtype == dtype
    assert torch.equal(kept, values.T)
    spill.let_go()
    assert torch.equal(kept, values.T)
    kept[3] = 7
    spill.let_go()
    assert bool((kept[3] == 7).all())
    assert torch.equal(kept[4:], values.T[4:])


def test_small_tensors_and_all_of_them_without_a_limit_stay_where_they_are():
    values = torch.randn(10)
    assert Spill(least=41).keep(values).data_ptr() == values.data_ptr()
    assert Spill(least=40).keep(values).data_ptr() != values.data_ptr()
    assert Spill(least=None).keep(torch.empty(1 << 20)).numel() == 1 << 20
    assert Spill(least=None).nbytes == 0


def test_files_go_with_the_last_tensor_on_them(tmp_path):
    spill = Spill(tmp_path, least=1)
    kept = spill.keep(torch.randn(1000))
    view = torch.nn.Parameter(kept[10:20], requires_grad=False)
    assert spill.nbytes == 4000
    assert not list(tmp_path.iterdir())
    del kept
    gc.collect()
    assert spill.nbytes == 4000
    assert bool(torch.isfinite(view).all())
    del view
    gc.collect()
    assert spill.nbytes == 0


@pytest.mark.skipif(resident_bytes() is None, reason="the system does not tell")
def test_what_rests_takes_no_memory():
    spill = Spill()
    kept = spill.keep(torch.ones(16 << 20))
    kept.sum()
    used = resident_bytes()
    spill.let_go()
    assert used - resident_bytes() > 60 << 20
    assert kept.sum().item() == 16 << 20


def test_packed_matrices_are_kept_and_recalled():
    spill = Spill(least=1)
    tensor = bitween.quantize(torch.randn(32, 64), Scheme(4, 32))
    kept = spill.keep_packed(tensor)
    assert np.array_equal(kept.codes, tensor.codes)
    assert np.array_equal(kept.dequantize(), tensor.dequantize())
    assert spill.nbytes == tensor.codes.nbytes
    recalled = spill.recall(kept)
    del kept
    gc.collect()
    assert spill.nbytes == 0
    assert np.array_equal(recalled.codes, tensor.codes)
    assert spill.recall(tensor) is tensor


def test_a_tensor_that_may_rest_is_copied_for_those_who_keep_it():
    spill = Spill(least=1)
    kept, own = spill.keep(torch.arange(100.0)), torch.arange(5.0)
    copy = spill.in_memory(kept[40:])
    assert copy.data_ptr() != kept[40:].data_ptr()
    assert torch.equal(copy, torch.arange(40.0, 100.0))
    assert spill.in_memory(own) is own


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        Spill(tmp_path / "nowhere", least=1).keep(torch.ones(10))


def test_a_full_disk_is_an_error_that_tells_what_was_wanted():
    program = """
        import resource
        import torch
        from bitween.model.spill import Spill
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        kept = Spill().keep(torch.ones(1 << 18))
        try:
            Spill().keep(torch.ones(1 << 20))
        except OSError as error:
            print(error)
        assert kept.sum() == 1 << 18
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert "4,194,304 bytes" in done.stdout
    assert "TMPDIR" in done.stdout


def test_modules_let_go_after_they_ran_until_told_otherwise():
    spill = Spill(least=1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    spill.rest_after(model)
    spill.rest_after(model)
    assert [len(module._forward_hooks) for module in model] == [1, 1]
    model(torch.ones(1, 4))
    end_rest(model)
    assert [len(module._forward_hooks) for module in model] == [0, 0]


def test_a_run_gives_the_same_bytes_whether_its_numbers_rest_in_files_or_not(tiny_model, tiny_tokenizer):
    def run(spill: Spill) -> dict[str, torch.Tensor]:
        quantizer = GradualQuantizer(
            tiny_model,
            tiny_tokenizer,
            0.6,
            0.5,
            calibration_samples=6,
            evaluation_samples=6,
            sequence_length=64,
            stages=2,
            distillation_steps=4,
            importance=False,
        )
        quantizer._spill = spill
        model = quantizer.quantize()
        assert not any(module._forward_hooks for module in model.modules())
        assert all(spill.in_memory(tensor) is tensor for tensor in model.state_dict().values())
        return model.state_dict()

    files, memory = run(Spill(least=1)), run(Spill(least=None))
    assert files.keys() == memory.keys()
    assert all(torch.equal(files[name], memory[name]) for name in files)
    assert not any(module._forward_hooks for module in tiny_model.modules())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_tensor_that_is_forgotten_leaves_memory_and_comes_back(tmp_path):
    values = torch.randn(1 << 20)
    safetensors.torch.save_file({"x": values}, tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        tensor = file.get_tensor("x")
        assert torch.equal(tensor, values)
        before = _resident_file_bytes()
        Spill().forget(tensor)
        assert before - _resident_file_bytes() > 0.9 * tensor.nbytes
        assert torch.equal(tensor, values)
        Spill().forget(values)  # in no file: nothing happens
        assert torch.equal(tensor, values)


def _resident_file_bytes():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssFile:")[1].split()[0])
