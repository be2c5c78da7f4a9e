"""Names and tensors that transformers changes on the way in: its own converters, in every form they have had."""

import copy

import torch

from bitween.store.names import convert


class Converter:
    """Stacks what it is given, as experts are; `first` answers as the first versions of transformers 5 do."""

    def __init__(self, first):
        self.first, self.tensors = first, []

    def add_tensor(self, own, name, pattern, tensor):
        self.tensors.append(tensor)

    def convert(self, own, model, config):
        made = {own: [torch.stack(self.tensors)]}
        return (made, {}) if self.first else made


class Model:
    config = None


def test_what_a_converter_returns_in_every_version():
    parts = [(f"experts.{e}.w", "experts.*.w", torch.full((2, 3), float(e))) for e in (10, 9, 0)]
    for first in (False, True):
        step = Converter(first)
        made = convert("experts.w", step, copy.copy(parts), Model())
        assert list(made) == ["experts.w"]
        assert made["experts.w"][:, 0, 0].tolist() == [0, 9, 10]  # by number, not by letters
        assert not step.tensors  # the library's own object is left alone
