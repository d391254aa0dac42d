"""Graders that do what a grader can do to its process; the answer of a case says what."""

from __future__ import annotations

import os
import signal
import sys
import time

from structcot.grading.case import Case, Grade


def obey(case: Case) -> Grade:
    """Do what the answer names, else call it right."""
    word = case.pred or ""
    if word == "sleep":
        time.sleep(60)
    if word == "spin":
        while True:
            pass
    if word == "power":
        len(str(7 ** (10**8)))
    if word == "memory":
        len(bytearray(6 * 1024**3))
    if word == "raise":
        raise KeyError("no such key")
    if word == "recurse":
        obey(case)
    if word == "exit":
        os._exit(3)
    if word == "leave":
        sys.exit("I leave")
    if word == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "print":
        print("noise" * 1000)
    if word == "none":
        return None  # pyright: ignore[reportReturnType]
    if word == "modules":
        return Grade(extracted=" ".join(sorted(sys.modules)), verdict="correct", reason="the modules of the worker")
    if word == "pid":
        return Grade(extracted=str(os.getpid()), verdict="correct", reason="the process")
    return Grade(extracted=word, verdict="correct", reason="obeyed")
