"""Says at the end of a run which reference files nothing is compared with yet; a skipped test's reason is not shown."""


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.stats.get("skipped", []):
        if "test_files_without_a_family" in report.nodeid:
            terminalreporter.write_line(report.longrepr[2])
