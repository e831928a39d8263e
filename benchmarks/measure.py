"""Timing in turns: all competitors in one process on the same inputs, a wrong result never timed.

Each round draws fresh inputs and times every competitor once on them. The order rotates and turns
around from round to round, so that nobody always follows the same neighbour, and a drift of the
machine meets all of them.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fusedres.report.accuracy import errors

from .clock import Clock, captured
from .inspection import Inspection

FEWEST_ROUNDS = 2  # one for each half


class WrongResult(RuntimeError):
    """A competitor's result is not as accurate as the rule wants; its time would mean nothing."""


@dataclass(frozen=True)
class Truth:
    """What every competitor must compute, and how far off PyTorch's own result is.

    Args:
        ref: each named result in float64.
        eager: the same from PyTorch in the tested dtype; or several, equally valid.
        gradients: names of results that are gradients.
        counts: for results that are sums: of how many elements.
    """

    ref: Mapping[str, Tensor]
    eager: Mapping[str, Tensor | Sequence[Tensor]]
    gradients: frozenset[str] = frozenset()
    counts: Mapping[str, int] = field(default_factory=dict)

    def fault(self, results: Mapping[str, Tensor]) -> str | None:
        """The first result that breaks the accuracy rule, in words, or None."""
        for name, ref in self.ref.items():
            if name not in results:
                return f"{name}: no such result"
            if results[name].shape != ref.shape:
                return f"{name}: shape {tuple(results[name].shape)}, not {tuple(ref.shape)}"
            found = errors(
                results[name], ref, self.eager[name], gradient=name in self.gradients,
                count=self.counts.get(name, 1),
            )  # fmt: skip
            if not found.ok:
                return (
                    f"{name}: largest error {found.max_error:.3g} ({found.max_bound:.3g} allowed),"
                    f" relative L2 error {found.l2_error:.3g} ({found.l2_bound:.3g} allowed)"
                )
        return None


@dataclass(frozen=True)
class Competitor:
    """One way to do the work.

    Args:
        call: does the work once; this is timed.
        results: does it once and returns what it computed, by name.
        prepare: runs before every call, untimed.
        note: what a reader must know about it.
        inspect: looks into one call, where that can be done.
    """

    name: str
    call: Callable[[], object]
    results: Callable[[], Mapping[str, Tensor]]
    prepare: Callable[[], object] = lambda: None
    note: str | None = None
    inspect: Callable[[], Inspection] | None = None


@dataclass(frozen=True)
class Times:
    """Seconds of one call: median, quartiles and minimum of ``rounds`` rounds."""

    rounds: int
    median: float
    q1: float
    q3: float
    least: float


def summarise(seconds: Sequence[float]) -> Times:
    if len(seconds) == 1:
        q1 = median = q3 = seconds[0]
    else:
        q1, median, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return Times(len(seconds), median, q1, q3, min(seconds))


@dataclass(frozen=True)
class Ratio:
    """How many times as long the peer takes: in all rounds, and in the first and second half."""

    value: float
    halves: tuple[float, float] | None

    @property
    def tie(self) -> bool:
        """Whether the halves differ by more than the gain (or loss) that the whole claims.

        Also where a half claims the contrary of the whole.
        """
        if self.halves is None:
            return True
        first, second = self.halves
        gain = self.value - 1
        contrary = any((half - 1) * gain < 0 for half in self.halves)
        return contrary or abs(first - second) > abs(gain)


def ratio(peer: Sequence[float], ours: Sequence[float]) -> Ratio:
    """The ratio of the medians; both sequences in the order of the rounds."""
    if len(peer) != len(ours):
        raise ValueError(f"peer: wanted {len(ours)} rounds (ours), got {len(peer)}")

    def of(part: slice) -> float:
        return statistics.median(peer[part]) / statistics.median(ours[part])

    middle = len(ours) // 2
    halves = (of(slice(None, middle)), of(slice(middle, None))) if middle else None
    return Ratio(of(slice(None)), halves)


def verdict(found: Ratio, at_least: float | None, aim: float | None) -> str:
    """``tie``, or which goal the ratio reaches; ``faster`` or ``slower`` where there are none."""
    if found.tie:
        return "tie"
    if at_least is None and aim is None:
        return "faster" if found.value > 1 else "slower"
    if aim is not None and found.value >= aim:
        return "aim reached"
    if at_least is None:
        return "aim missed"
    return "at least reached" if found.value >= at_least else "missed"


class Race:
    """Competitors taking turns; the first one is ours.

    Args:
        competitors: ours, then the peers.
        truth: what they must compute.
        clock: times a call on cold caches.
        refresh: draws new inputs for the given round, the same for every competitor.
        graphs: replay CUDA graphs, of every competitor or (where one cannot be captured) of none.

    Raises:
        WrongResult: our own result breaks the accuracy rule. A peer whose result does, or that
            raises, is left out, and the reason is in ``refused``.
    """

    def __init__(
        self,
        competitors: Sequence[Competitor],
        truth: Truth,
        clock: Clock,
        refresh: Callable[[int], object] = lambda round_: None,
        graphs: bool = False,
    ):
        ours, *peers = competitors
        fault = truth.fault(ours.results())
        if fault is not None:
            raise WrongResult(f"{ours.name} is not timed: {fault}")
        self.refused: dict[str, str] = {}
        self.competitors = {ours.name: ours}
        for peer in peers:
            reason = _fault_of_peer(peer, truth)
            if reason is None:
                self.competitors[peer.name] = peer
            else:
                self.refused[peer.name] = reason
        self.ours = ours.name
        self.seconds: dict[str, list[float]] = {name: [] for name in self.competitors}
        self._calls = {name: c.call for name, c in self.competitors.items()}
        self._clock, self._refresh = clock, refresh
        self.graphs = self._capture() if graphs else "not asked for"
        self._turns = _turns(list(self.competitors))
        self._next = next(self._turns)

    def _capture(self) -> str:
        """Whether CUDA graphs are replayed, in words."""
        try:
            for competitor in self.competitors.values():
                competitor.prepare()
            self._calls = captured(self._calls)
        except RuntimeError as error:
            return f"of nobody: {error}"
        return "of everybody"

    def warm_up(self) -> float:
        """Untimed calls of everybody; returns how long one round takes."""
        start = time.perf_counter()
        self._refresh(0)
        for name in self.competitors:
            self._time(name)
        return time.perf_counter() - start

    def run(self, rounds: int, on_round: Callable[[], object] = lambda: None) -> None:
        for _ in range(rounds):
            for _ in self.competitors:
                self._turn()
            on_round()

    def until_ours(self) -> None:
        """Every turn before ours, and all of ours that is not timed."""
        while self._next != self.ours:
            self._turn()
        self._draw()
        self.competitors[self.ours].prepare()
        self._clock.chill()

    def our_turn(self) -> None:
        """Our call alone, for a caller with a clock of its own."""
        self._next = next(self._turns)
        seconds = self._clock.seconds_at_once(self._calls[self.ours])
        self.seconds[self.ours].append(seconds)

    def finish_round(self) -> None:
        """The turns after our last one, so that everybody has had as many."""
        rounds = len(self.seconds[self.ours])
        while min(map(len, self.seconds.values())) < rounds:
            self._turn()

    def times(self) -> dict[str, Times]:
        return {name: summarise(seconds) for name, seconds in self.seconds.items()}

    def ratio(self, peer: str) -> Ratio:
        return ratio(self.seconds[peer], self.seconds[self.ours])

    def _turn(self) -> None:
        self._draw()
        name, self._next = self._next, next(self._turns)
        self.seconds[name].append(self._time(name))

    def _draw(self) -> None:
        """New inputs, where a round begins."""
        done = [len(seconds) for seconds in self.seconds.values()]
        if min(done) == max(done):
            self._refresh(done[0])

    def _time(self, name: str) -> float:
        self.competitors[name].prepare()
        return self._clock.seconds(self._calls[name])


def _fault_of_peer(peer: Competitor, truth: Truth) -> str | None:
    try:
        return truth.fault(peer.results())
    except Exception as error:  # the errors of compilers and runtimes have no common class
        message = str(error).strip() or "no message"
        return f"{type(error).__name__}: {message.splitlines()[0]}"


def _turns(names: list[str]) -> Iterator[str]:
    """Names in turn: ABC CBA BCA ACB CAB BAC, and again."""
    for i in itertools.count():
        start = i // 2 % len(names)
        order = names[start:] + names[:start]
        yield from reversed(order) if i % 2 else order


def rounds_within(seconds: float, per_round: float, most: int) -> int:
    """How many rounds fit into a time budget; no fewer than give two halves."""
    return max(FEWEST_ROUNDS, min(most, int(seconds / per_round)))
