"""One optimizer step as data."""

from __future__ import annotations

from dataclasses import dataclass

#: The one model of mixed RLVR.
MIXED = "mixed"
#: The model that static distillation makes.
STUDENT = "student"


@dataclass(frozen=True)
class Assignment:
    """``student`` rolls out ``num_prompts`` prompts of branch ``source``.

    ``teacher`` None: GRPO with the source's reward. Otherwise the teacher scores the student's tokens (OPD-ADV) with
    the student's beta times ``beta_scale``. ``weight`` scales the term's loss, which is normalised by its own number of
    responses; assignments of one term (mixed RLVR's) are one loss with the sum of their weights, over all of their
    responses.
    """

    student: str
    source: str
    num_prompts: int
    teacher: str | None = None
    weight: float = 1.0
    beta_scale: float = 1.0

    @property
    def term(self) -> str:
        return "grpo" if self.teacher is None else f"opd:{self.teacher}"


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step of every student; ``step`` and ``cycle`` count from 1, ``phase`` is ``rl`` or ``opd``.

    ``copies``: before the step, each (student, branch) makes the student a copy of that branch. ``finished``: branches
    that are not trained any more from this step on.
    """

    step: int
    cycle: int
    phase: str
    assignments: tuple[Assignment, ...]
    copies: tuple[tuple[str, str], ...] = ()
    finished: tuple[str, ...] = ()

    def of(self, student: str) -> tuple[Assignment, ...]:
        return tuple(a for a in self.assignments if a.student == student)

    @property
    def students(self) -> tuple[str, ...]:
        """Who is trained, in the order of the assignments."""
        return tuple(dict.fromkeys(a.student for a in self.assignments))

    @property
    def models(self) -> tuple[str, ...]:
        """Who is trained or teaches."""
        return tuple(dict.fromkeys([*self.students, *(a.teacher for a in self.assignments if a.teacher)]))
