"""From "two runs differ" to step, phase, column and rows.

::

    what logs and checkpoints say         the last step known equal, the first known to differ
    both runs again, in lockstep          where that leaves more than one step open
    both restored to the last equal step  from the nearest proven checkpoint, or initialised
    each taken through the step           twice, to see that it is deterministic, phase by phase
    the first phase that differs          rows bisected by partial digests

A run that does not repeat what it recorded has no phase to be found: then rows come from the nearest
checkpoint after the difference.
"""

from __future__ import annotations

from collections.abc import Callable

from rustsim_hpc.divergence.causes import Cause, causes_of_change, causes_of_environment, causes_of_input
from rustsim_hpc.divergence.phase_trace import PhaseResult
from rustsim_hpc.divergence.replica import Beat, Bench
from rustsim_hpc.divergence.report import DivergenceReport, value_difference
from rustsim_hpc.divergence.row_search import column_sums
from rustsim_hpc.divergence.rows import RowsOf, find_rows, rows_from_checkpoints
from rustsim_hpc.divergence.side import RunSide, layout_of
from rustsim_hpc.errors import RunFolderError, RustsimError, TeamError
from rustsim_hpc.modeling.model import ColumnPhase
from rustsim_hpc.proof.replay import differing_columns
from rustsim_hpc.ranks.team import Team

Say = Callable[[str], None]
_MOST_AT_ONCE = 64


def investigate(
    left: RunSide, right: RunSide, team: Team, *, say: Say, beat: Beat, columns: tuple[str, ...] = ()
) -> DivergenceReport:
    """Compare two runs as far as both go, and find out where they first differ. Collective.

    say: called with what is being done, where it may take a while. beat: called for each step. columns:
    those that are known to differ at the first step where the sides' streams differ.

    Raises:
        RunFolderError: it is unknown whether they are equal.
    """
    return _Investigation(left, right, team, say, beat).run(columns)


class _Investigation:
    """One comparison of two sides; every method is collective."""

    def __init__(self, left: RunSide, right: RunSide, team: Team, say: Say, beat: Beat) -> None:
        self.sides = (left, right)
        self.team = team
        self.say = say
        self.bench = Bench(team, beat)
        self.report = DivergenceReport(left, right)
        self.first = max(left.origin, right.origin)
        self.far = min(left.reached, right.reached)
        # If a layout is not known there are only fingerprints, which differ for different layouts.
        self.same_layout = None in (left.layout, right.layout) or left.layout == right.layout
        self.keys: dict[str, int] = {}
        self.can_run = False
        self.proven: list[Cause] = []

    def run(self, columns: tuple[str, ...]) -> DivergenceReport:
        """Return the report of what can be found out."""
        left, right = self.sides
        report = self.report
        report.compared_to = self.far
        if left.agents != right.agents:
            report.step = self.first
        elif self.far < self.first:
            raise RunFolderError(
                f"{left.name} and {right.name} have no step in common: one begins at step {self.first}, the "
                f"other ends at step {self.far}"
            )
        else:
            try:
                self._compare(columns)
            finally:
                self.bench.close()
        if report.step is not None:
            report.causes = [
                *self.proven, *causes_of_input(left, right), *causes_of_environment(left, right)
            ]  # fmt: skip
        else:
            report.notes += [cause.text for cause in self.proven]
        report.notes += [note for side in self.sides for note in side.notes]
        return report

    def _compare(self, columns: tuple[str, ...]) -> None:
        equal, differs = self._from_what_is_known()
        report = self.report
        report.equal_at, report.step = equal, differs
        if differs is not None:
            report.columns = columns or self._known_columns(differs)
        elif equal == self.far:
            return
        try:
            self._prepare()
            self._find_step(equal, differs)
            if report.step is not None:
                self._look_into(report.step)
        except TeamError:
            raise
        except RustsimError as error:
            if report.step is None and not self._other_columns():
                raise RunFolderError(
                    f"it is unknown whether {self.sides[0].name} and {self.sides[1].name} are equal: "
                    f"logs and checkpoints do not say it, and they cannot be run again: {error}",
                    hint="record runs with --record",
                ) from error
            report.notes.append(f"not followed further: {error}")
        if report.step is None and self._other_columns():
            # The columns that both have never differ, but the layouts do from the first state on.
            report.step, report.columns, report.equal_at = self.first, self._other_columns(), None
        elif report.step is not None and not report.rows:
            rows_from_checkpoints(report, report.step, self.bench, self.team, can_run=self.can_run)

    def _other_columns(self) -> tuple[str, ...]:
        """Return the columns that the sides do not have in common."""
        left, right = (dict(side.layout or ()) for side in self.sides)
        if not left or not right:
            return ()
        return tuple(name for name in dict.fromkeys((*left, *right)) if left.get(name) != right.get(name))

    # -- the step ------------------------------------------------------------------------------------

    def _from_what_is_known(self) -> tuple[int | None, int | None]:
        """Return the last step known to be equal before the first known to differ, and the latter."""
        left, right = self.sides
        equal = None
        for step in sorted(left.known.keys() & right.known.keys()):
            if not self.first <= step <= self.far or not self.same_layout:
                continue
            verdict = left.known[step].differs(right.known[step])
            if verdict:
                return equal, step
            equal = step if verdict is False else equal
        return equal, None

    def _known_columns(self, step: int) -> tuple[str, ...]:
        known = [side.known[step].columns for side in self.sides]
        return differing_columns(*known)

    def _prepare(self) -> None:
        """Bind both models; find the columns that can be compared.

        Raises:
            RustsimError: one of the sides cannot be run again.
        """
        for side in self.sides:
            if side.spec is None or side.why_not:
                raise RunFolderError(f"{side.name} cannot be run again: {side.why_not}")
        self.bench.prepare(self.sides)
        layouts = []
        for side in self.sides:
            model = self.bench.prepared(side).model
            layouts.append(dict(layout_of(model.schema)))
            side.layout = side.layout or tuple(layouts[-1].items())
            side.params = side.params or model.params.plain()
            self.proven += causes_of_change(side, model.identity())
        self.keys = {
            name: index + 1
            for index, (name, dtype) in enumerate(layouts[0].items())
            if layouts[1].get(name) == dtype
        }
        self.same_layout = list(layouts[0].items()) == list(layouts[1].items())
        self.can_run = True

    def _find_step(self, equal: int | None, differs: int | None) -> None:
        """Run both in lockstep if more than one step is left in which they may diverge."""
        report = self.report
        stop = self.far if differs is None else differs
        start = self.first if equal is None else equal
        if equal is not None and differs == equal + 1:
            return
        if stop - start > 1:
            self.say(f"running both again from step {start:,} to find the first difference up to {stop:,}")
        found = self._lockstep(start, stop)
        if found is not None:
            report.step, report.columns = found
            report.equal_at = found[0] - 1 if found[0] > start else None
        elif differs is None:
            report.equal_at = self.far
            self._note_strays()
        elif report.equal_at is None:
            report.equal_at = start if start < differs else None

    def _lockstep(self, start: int, stop: int) -> tuple[int, tuple[str, ...]] | None:
        """Return the first step in [start, stop] after which the repetitions differ, and the columns."""
        odd = self._apart(*(self._sums(side, start) for side in self.sides))
        if odd:
            return start, odd
        at, many = start, 1
        while at < stop:
            to = min(stop, at + many) if self.bench.both else stop
            trails = [[self._sums(side, step) for step in range(at + 1, to + 1)] for side in self.sides]
            for step, one, other in zip(range(at + 1, to + 1), *trails, strict=True):
                odd = self._apart(one, other)
                if odd:
                    return step, odd
            at, many = to, min(2 * many, _MOST_AT_ONCE)
        return None

    def _sums(self, side: RunSide, step: int) -> dict[str, int]:
        replica = self.bench.at(side, step)
        if self.same_layout:
            return dict(replica.known().columns)
        return column_sums(replica.rows(), self.keys, self.team)

    def _apart(self, one: dict[str, int], other: dict[str, int]) -> tuple[str, ...]:
        return tuple(name for name, value in one.items() if other[name] != value)

    # -- into the step -------------------------------------------------------------------------------

    def _look_into(self, step: int) -> None:
        """Find phase, columns and rows of a step that leads to different states."""
        if step == self.first:
            self._first_state(step)
            return
        before = step - 1
        for side in self.sides:
            self.bench.at(side, before).check(self.bench.rows(side, before), before)
        self.report.equal_at = before
        traces = []
        for side in self.sides:
            trace = self._trace(side, before)
            if trace is None:
                return
            traces.append(trace)
        self._check_partitions(before)
        if self._note_strays():
            return
        if not self.report.columns and all(traces):
            self.report.columns = traces[0][-1].differing_columns(traces[1][-1])
        self._name_phase(before, *traces)

    def _first_state(self, step: int) -> None:
        self.report.equal_at = None
        self.report.phase = "initialise" if step == 0 else f"the state of step {step:,}"
        if step == 0 and not self.proven and not causes_of_input(*self.sides):
            text = "initialise is not deterministic: of the same seed and parameters it made two states"
            self.proven.append(Cause("not deterministic", text))
        find_rows(
            self.report,
            self.report.phase,
            lambda side: self.bench.rows(side, step),
            tuple(self.keys),
            self.team,
        )

    def _trace(self, side: RunSide, step: int) -> list[PhaseResult] | None:
        """Run a side's step twice; return None if a phase does not give the same result again."""
        replica = self.bench.at(side, step)
        keys = self.keys
        results, again = replica.trace.run(keys), replica.trace.run(keys)
        for index, (one, other) in enumerate(zip(results, again, strict=True)):
            if not one.same(other):
                self._name(index, one.name, len(results))
                odd = one.differing_columns(other) or one.differing_values(other)
                self.proven.insert(0, Cause(
                    "not deterministic",
                    f"phase {one.name} is not deterministic: run twice on the same state of step {step:,} of "
                    f"{side.name}, it gave other values of {', '.join(odd)}",
                ))  # fmt: skip
                return None
        self._hold_against_known(side, step, results)
        return results

    def _hold_against_known(self, side: RunSide, step: int, results: list[PhaseResult]) -> None:
        """Compare the result of the repeated step with what is known of the side."""
        if not results:
            return
        replica = self.bench.at(side, step)
        if self.same_layout:
            side.compare(step + 1, replica.known_next(results[-1].columns))
        replica.check(self.bench.rows(side, step, len(results)), step + 1)

    def _note_strays(self) -> bool:
        """Note which sides do not reproduce what they recorded; return whether there are any."""
        strayed = [side for side in self.sides if side.strayed is not None]
        for side in strayed:
            assert side.strayed is not None  # noqa: S101
            step, columns = side.strayed
            where = f" in {', '.join(columns)}" if columns else ""
            self.proven.append(Cause(
                "not reproduced",
                f"{side.name} does not repeat its own record: run again here it is another state after step "
                f"{step:,}{where}; so a transient fault (memory, CPU), another environment, or a phase "
                "that depends on something else than the state",
            ))  # fmt: skip
        return bool(strayed)

    def _check_partitions(self, step: int) -> None:
        """If the partitions may matter, run a side's step with other numbers of them."""
        cuts = {side.record.get("partitions") for side in self.sides}
        if len(cuts) == 1 and not any(side.strayed for side in self.sides):
            return
        for side in self.sides:
            prepared = self.bench.prepared(side)
            if not any(isinstance(phase, ColumnPhase) for phase in prepared.model.phases):
                continue
            trace = self.bench.at(side, step).trace
            whole = trace.run(self.keys, 1)
            for pieces in (2, 3):
                cut = trace.run(self.keys, pieces)
                pairs = zip(whole, cut, strict=True)
                odd = next(((one, other) for one, other in pairs if not one.same(other)), None)
                if odd is not None:
                    names = odd[0].differing_columns(odd[1]) or odd[0].differing_values(odd[1])
                    self.proven.insert(0, Cause(
                        "reads other partitions",
                        f"phase {odd[0].name} depends on how the rows are cut into partitions (here 1 and "
                        f"{pieces} a rank): it gives other values of {', '.join(names)}",
                    ))  # fmt: skip
                    return

    def _name_phase(self, step: int, left: list[PhaseResult], right: list[PhaseResult]) -> None:
        """Find the first phase whose result differs, and the rows after the first that changes columns."""
        named = False
        for index, (one, other) in enumerate(zip(left, right, strict=False)):
            if one.name != other.name:
                self.report.notes.append(
                    f"the models' phases part at number {index + 1}: {one.name} against {other.name}"
                )
                break
            columns, values = one.differing_columns(other), one.differing_values(other)
            if not named and (columns or values):
                named = True
                self._name(index, one.name, len(left))
                self.report.values = tuple(
                    value_difference(name, one.values.get(name), other.values.get(name)) for name in values
                )
            if columns:
                find_rows(self.report, f"phase {one.name}", self._after(step, index + 1), columns, self.team)
                return
        counts = {id(side): len(trace) for side, trace in zip(self.sides, (left, right), strict=True)}
        find_rows(
            self.report,
            f"the state of step {step + 1:,}",
            lambda side: self.bench.rows(side, step, counts[id(side)]),
            tuple(self.keys),
            self.team,
        )

    def _after(self, step: int, phases: int) -> RowsOf:
        return lambda side: self.bench.rows(side, step, phases)

    def _name(self, index: int, name: str, count: int) -> None:
        self.report.phase, self.report.phase_index, self.report.phase_count = name, index, count
