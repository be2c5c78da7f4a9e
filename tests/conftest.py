"""Settings for all tests."""

try:
    import torch
except ModuleNotFoundError:  # the core's tests run without it
    pass
else:
    # The models here are tiny: a second thread brings nothing, and where other processes keep the
    # machine busy, waiting for it makes the tests many times slower.
    torch.set_num_threads(1)
