"""How the tests are started, and what ``pytest -m gpu`` says at its end: have tests of real devices run?"""

import signal


def pytest_configure():
    """Have the tests' processes hear signals also if this one was started to ignore them.

    A shell without job control has processes in the background ignore SIGINT, and nohup has them ignore
    SIGHUP; what they start inherits that. It does not inherit a handler.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda number, frame: None)


def pytest_sessionfinish(session):
    """Let a run that was asked for devices, and has seen none, end without success."""
    if (
        _asks_for_devices(session.config)
        and session.exitstatus == 0
        and not _counts(session.config)["passed"]
    ):
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter, config):
    if _asks_for_devices(config):
        reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
        terminalreporter.section("verdict")
        terminalreporter.write_line(verdict(_counts(config), reasons))


def _asks_for_devices(config):
    return config.option.markexpr == "gpu" and not config.option.collectonly


def _counts(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return {name: len(reporter.stats.get(name, [])) for name in ("passed", "failed", "error", "skipped")}


def verdict(counts, reasons):
    """Return in one line what tests of devices have shown; reasons: why some were skipped."""
    wrong = counts["failed"] + counts["error"]
    if wrong:
        return f"GPU: FAILED, {wrong} of {wrong + counts['passed']} tests"
    why = "; ".join(dict.fromkeys(reason.removeprefix("Skipped: ") for reason in reasons))
    if not counts["passed"]:
        return f"GPU: NOT RUN ({why or 'no tests were selected'})"
    skipped = f", {counts['skipped']} skipped ({why})" if counts["skipped"] else ""
    return f"GPU: PASSED, {counts['passed']} tests{skipped}"
