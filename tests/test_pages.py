"""Huge pages for weights: what was asked for is there, and no value changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from inductor_ext.kernels import pages
from inductor_ext.kernels.pages import SIZE, in_huge_pages


def huge_bytes(address: int) -> int:
    """Of the mapping around this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            begin, end = (int(word, 16) for word in words[0].split("-"))
            inside = begin <= address < end
        elif inside and words[0] == "AnonHugePages:":
            return int(words[1]) << 10
    return 0


@pytest.mark.skipif(pages._madvise() is None, reason="this system gives no huge pages")
def test_large_weights_lie_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[int] = []
    advise = pages._madvise()
    assert advise is not None
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *given: answers.append(advise(*given)))
    t = torch.randint(0, 100, (8 * SIZE,), dtype=torch.uint8)
    before, middle = t.clone(), t.data_ptr() + 4 * SIZE
    in_huge_pages(t)
    assert torch.equal(t, before)
    assert len(answers) == 2
    if any(answers):
        pytest.skip("this system refuses: an older Linux, or no memory in one piece")
    assert huge_bytes(middle) > 0


def test_what_is_smaller_than_a_page_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: asked.append(args))
    whole = torch.zeros(4 * SIZE, dtype=torch.uint8)
    first = -whole.data_ptr() % SIZE  # where a page begins
    in_huge_pages(whole[:0])
    in_huge_pages(whole[first + 1 : first + SIZE])
    assert asked == []
    in_huge_pages(whole[first : first + SIZE + 1])
    assert {(begin, length) for begin, length, _ in asked} == {(whole.data_ptr() + first, SIZE)}
