"""Verifiers: how right a response is. ``docs/verifiers.md`` has the table."""

from copd_engine.verifiers.extract import Answer, extract_answer, find_answer
from copd_engine.verifiers.pool import Failures, Limits, WorkerPool, shared_pool
from copd_engine.verifiers.registry import VERIFIERS, Verifier, begin_verify, check_example, get_verifier, verify_all

__all__ = [
    "VERIFIERS",
    "Answer",
    "Failures",
    "Limits",
    "Verifier",
    "WorkerPool",
    "begin_verify",
    "check_example",
    "extract_answer",
    "find_answer",
    "get_verifier",
    "shared_pool",
    "verify_all",
]
