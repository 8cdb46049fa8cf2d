"""Threads: what several do at once is what one does, and the ranking belongs to the thread."""

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from module_state import DEVICES, assert_same_state, kept_channels
from torch import nn

import lnprune

pytestmark = pytest.mark.parametrize("device", DEVICES)


def layers(device, count, shape):
    generator = torch.Generator().manual_seed(7)
    made = []
    for _ in range(count):
        layer = nn.Linear(*shape)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
            layer.bias.zero_()
        made.append(layer.to(device))
    return made


def prune_twice(layer):
    lnprune.ln_structured(layer, "weight", 0.3, 2, 0)
    lnprune.ln_structured(layer, "weight", 0.3, 1, 1)


@pytest.mark.parametrize("shape", [(12, 9), (520, 512)], ids=str)
def test_layers_in_threads(device, shape):
    one_by_one, at_once = layers(device, 12, shape), layers(device, 12, shape)
    for layer in one_by_one:
        prune_twice(layer)
    barrier = threading.Barrier(4)

    def work(index):
        barrier.wait()
        for layer in at_once[index::4]:
            prune_twice(layer)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    for actual, expected in zip(at_once, one_by_one, strict=True):
        assert_same_state(actual, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_number_of_threads_changes_nothing(device, threads):
    (expected,) = layers(device, 1, (520, 512))
    prune_twice(expected)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        (actual,) = layers(device, 1, (520, 512))
        prune_twice(actual)
    finally:
        torch.set_num_threads(before)
    assert_same_state(actual, expected)


def half_precision_ties(device):
    """A module whose rounded norms tie, so that the two rankings choose differently."""
    module = nn.Module()
    weight = torch.full((64, 33), 1.0)
    weight[::2, 0] = 1 + 2.0**-6
    module.weight = nn.Parameter(weight.to(device=device, dtype=torch.bfloat16))
    return module


def choice(device):
    module = lnprune.ln_structured(half_precision_ties(device), "weight", 0.5, 2, 0)
    return kept_channels(module.weight_mask, 0).tolist()


def test_the_ranking_belongs_to_its_thread(device):
    exact = choice(device)
    assert exact == [True, False] * 32
    with lnprune.reference_ranking():
        as_torch = choice(device)
        assert as_torch != exact
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(choice, device).result() == exact
            context = contextvars.copy_context()
            assert pool.submit(context.run, choice, device).result() == as_torch
    assert choice(device) == exact


def test_two_rankings_at_once(device):
    barrier = threading.Barrier(2)

    def torchs():
        with lnprune.reference_ranking():
            barrier.wait()
            chosen = choice(device)
            barrier.wait()
        return chosen

    def ours():
        barrier.wait()
        chosen = choice(device)
        barrier.wait()
        return chosen

    exact = choice(device)
    with lnprune.reference_ranking():
        as_torch = choice(device)
    with ThreadPoolExecutor(2) as pool:
        futures = pool.submit(torchs), pool.submit(ours)
        assert [future.result() for future in futures] == [as_torch, exact]


def test_the_ranking_belongs_to_its_task(device):
    async def torchs():
        with lnprune.reference_ranking():
            await asyncio.sleep(0)
            return choice(device)

    async def ours():
        await asyncio.sleep(0)
        return choice(device)

    async def both():
        return await asyncio.gather(torchs(), ours())

    as_torch, exact = asyncio.run(both())
    assert exact == choice(device)
    assert as_torch != exact


def test_the_ranking_nests_and_ends_with_errors(device):
    exact = choice(device)
    with lnprune.reference_ranking():
        with lnprune.reference_ranking():
            as_torch = choice(device)
        assert choice(device) == as_torch
    with pytest.raises(KeyError), lnprune.reference_ranking():
        raise KeyError
    assert choice(device) == exact
