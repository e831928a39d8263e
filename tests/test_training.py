"""Ten training steps of ResNet-18 stay as close to the exact ones as eager PyTorch's own do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import fusedres
from accuracy import assert_as_accurate_as_eager

STEPS = 10


def batches() -> list[tuple[Tensor, Tensor]]:
    """Noisy images of four classes, each with a bright corner of its own."""
    found = []
    for _ in range(STEPS):
        labels = torch.arange(8) % 4
        images = torch.randn(8, 3, 32, 32)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, 16 * (label // 2) :, 16 * (label % 2) :] += 1.5
        found.append((images, labels))
    return found


def train(model: nn.Module, data, layout=torch.contiguous_format) -> dict[str, Tensor]:
    """The losses, the parameters and the running statistics after the steps, each as one vector."""
    model = copy.deepcopy(model).train().to(memory_format=layout)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    losses = []
    for images, labels in data:
        images = images.to(dtype).contiguous(memory_format=layout)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    assert all(b == STEPS for n, b in model.named_buffers() if n.endswith("num_batches_tracked"))
    return dict(
        losses=torch.stack(losses),
        parameters=torch.cat([p.detach().flatten() for p in model.parameters()]),
        statistics=torch.cat([b.flatten() for b in buffers]),
    )


@pytest.mark.slow
def test_ten_steps_follow_eagers():
    torch.manual_seed(0)
    plain = torchvision.models.resnet18(num_classes=4)
    data = batches()
    truth = train(copy.deepcopy(plain).double(), data)
    # Executions that are all correct drift apart, by roundings that flip ReLUs: eager's spread.
    eager = [train(plain, data), train(plain, data, torch.channels_last)]
    torch.set_num_threads(1)
    eager.append(train(plain, data))
    torch.set_num_threads(2)
    fused = fusedres.models.resnet18(num_classes=4)
    fused.load_state_dict(plain.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        out = train(fused, data, layout)
        for name, value in out.items():
            assert_as_accurate_as_eager(
                value, truth[name], [e[name] for e in eager], gradient=True, name=name
            )
    assert truth["losses"][-1] < truth["losses"][0]


@pytest.mark.slow
def test_ten_steps_in_float64_are_eagers():
    """Without roundings that flip ReLUs the two stay together to the last digits."""
    torch.manual_seed(0)
    options = dict(layers=[1, 1, 1, 1], num_classes=4)
    plain = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, **options).double()
    fused = torchvision.models.ResNet(fusedres.BasicBlock, **options).double()
    fused.load_state_dict(plain.state_dict())
    data = batches()
    truth, other = train(plain, data), train(plain, data, torch.channels_last)
    out = train(fused, data)
    for name, value in out.items():
        assert_as_accurate_as_eager(value, truth[name], other[name], gradient=True, name=name)


def test_a_step_is_the_same_from_run_to_run():
    torch.manual_seed(0)
    model, data = fusedres.models.se_resnet18(num_classes=4), batches()[:2]
    data = data * (STEPS // 2)
    first, second = (train(model, data, torch.channels_last) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
