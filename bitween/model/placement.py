"""Where the numbers of a model's weights lie: what can't be read here, whole, is refused before any work."""

from __future__ import annotations

from torch import nn

__all__ = ["check_placement", "check_whole"]


def check_whole(model: nn.Module) -> None:
    """Raise ValueError where a weight is split over processes, as FSDP and tensor parallel models split them."""
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "full_tensor") or hasattr(parameter, "_is_flat_param"):  # a DTensor; FSDP's first version
            raise ValueError(
                f"{name}: expected whole weights; got a part of one that lies on several processes. Gather the model "
                "first (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) and "
                "load that into a model of one process"
            )


def check_placement(model: nn.Module) -> None:
    """Raise ValueError unless all weights hold numbers, each whole, and are on one device."""
    check_whole(model)
    devices: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: expected loaded weights; got a tensor on the meta device, which holds no values")
        devices.setdefault(str(parameter.device), name)
    if len(devices) > 1:
        where = ", ".join(f"{device} ({name}, ...)" for device, name in devices.items())
        raise ValueError(f"model: expected all weights on one device; got {where}")
