"""Processes: start, exit, signals, and the end of all with their parent."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import uuid
from pathlib import Path

import pytest

from demo.interrupts import Interrupted, interrupts
from demo.processes import ROOT, Processes, StartOrExitError, assign_free_port, procfile, responds
from tests.support.simulator import eventually

pytestmark = pytest.mark.slow


def processes_with(mark: str) -> list[str]:
    """Return the command lines of all processes with this text in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # it has exited, or belongs to another user
            continue
    return [command for command in found if command]


def assert_no_process_is_left(mark: str) -> None:
    """Wait for it: the kernel ends the other processes of a killed group a moment after the first one."""
    eventually(lambda: not processes_with(mark))


def test_procfile_returns_commands_by_role(tmp_path: Path) -> None:
    """A line is `role: command`; other lines are skipped."""
    (tmp_path / "Procfile").write_text("# a remark\nweb: python -m webhook\n\nbeat:  celery beat --x=${Y:-1}\n")
    assert procfile(tmp_path / "Procfile") == {"web": "python -m webhook", "beat": "celery beat --x=${Y:-1}"}
    assert list(procfile()) == ["release", "web", "worker", "refresh", "beat", "dashboard", "flower"]


def test_free_port_is_never_a_bound_one() -> None:
    """The preferred port is returned if it is free."""
    preferred = assign_free_port()
    assert assign_free_port(preferred) == preferred
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", preferred))
        listener.listen()
        assert assign_free_port(preferred) != preferred


def test_assigned_port_is_not_given_to_another_process_before_it_is_bound() -> None:
    """Also while its server is stopped. The port is free again when the process has ended."""
    code = "from demo.processes import assign_free_port; print(assign_free_port({}))"
    mine = assign_free_port()
    other = subprocess.run([sys.executable, "-c", code.format(mine)], cwd=ROOT, capture_output=True, check=True).stdout
    assert int(other) != mine
    assert assign_free_port(int(other)) == int(other)


def test_error_names_process_that_does_not_start_and_its_log(tmp_path: Path) -> None:
    """The message has the exit status, too."""
    with Processes(tmp_path, {}) as processes:
        processes.start("role", "sh -c 'echo trouble; exit 7'")
        with pytest.raises(StartOrExitError, match=r"role exited with status 7, see .*role\.log"):
            processes.wait_for("role", lambda: False)
        assert processes.log_of("role").read_text() == "trouble\n"
        with pytest.raises(StartOrExitError, match="migration failed"):
            processes.run("migration", "false")


def test_hung_process_is_aborted_and_its_stacks_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ignores SIGTERM does not make its test wait for ever."""
    monkeypatch.setattr("demo.processes.HANG_TIMEOUT_S", 0.3)
    code = "import signal; signal.signal(15, signal.SIG_IGN); print(1, flush=True); signal.sigwait([10])"
    with Processes(tmp_path, {}) as processes:
        process = processes.start("role", f"{sys.executable} -c '{code}'")
        processes.wait_for("role", lambda: processes.log_of("role").read_text() == "1\n")
        with pytest.raises(StartOrExitError, match=r"(?s)role did not exit within 0\.3 s of SIGTERM.*File .*line 1 in"):
            processes.stop_running_process("role", signal.SIGTERM)
        assert process.returncode == -signal.SIGABRT
        processes.check_all_running()


def test_process_is_stopped_with_all_others_if_the_wait_for_its_end_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as by the timeout of a test."""
    with Processes(tmp_path, {}) as processes:
        process = processes.start("role", "sleep 60")
        monkeypatch.setattr(process, "wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            processes.stop_running_process("role", signal.SIGCONT)
        monkeypatch.undo()
    assert process.returncode == -signal.SIGTERM


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_check_finds_process_that_exited(tmp_path: Path) -> None:
    """The error has its name and the end of its log."""
    with Processes(tmp_path, {}) as processes:
        processes.start("steady", "sleep 60")
        processes.check_all_running()
        processes.start("frail", "sh -c 'echo alas; exit 3'").wait()
        with pytest.raises(StartOrExitError, match=r"frail exited with status 3, see .*frail\.log:\nalas"):
            processes.check_all_running()


def test_stop_process_raises_if_process_has_exited(tmp_path: Path) -> None:
    """A process that was stopped on purpose is no error."""
    with Processes(tmp_path, {}) as processes:
        processes.start("steady", "sleep 60")
        processes.start("frail", "false").wait()
        with pytest.raises(StartOrExitError, match="frail exited with status 1"):
            processes.stop_running_process("frail", signal.SIGKILL)
        processes.stop_running_process("steady", signal.SIGKILL)
        processes.check_all_running()


def test_check_finds_valkey_that_exited_but_not_stopped_one(tmp_path: Path) -> None:
    """Tests stop it on purpose, so a stopped server is no error."""
    with Processes(tmp_path, {}) as processes:
        server = processes.valkey(assign_free_port())
        server.stop()
        processes.check_all_running()
        server.start()
        server._process.kill()
        server._process.wait()
        with pytest.raises(StartOrExitError, match="valkey exited"):
            processes.check_all_running()


def test_processes_do_not_inherit_settings_of_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demo must not call the real provider because the terminal is set up for it."""
    monkeypatch.setenv("PAYREADY_QUILTT_API_KEY", "real")
    with Processes(tmp_path, {"PAYREADY_WEBHOOK_PORT": "1"}) as processes:
        processes.run("show", "env")
        environ = processes.log_of("show").read_text()
    assert "PAYREADY_WEBHOOK_PORT=1" in environ
    assert "PAYREADY_QUILTT_API_KEY" not in environ


def test_process_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process group ends with it."""
    monkeypatch.setattr("demo.processes.STOP_TIMEOUT_S", 0.3)
    mark = f"mark{uuid.uuid4().hex}"
    with Processes(tmp_path, {"MARK": mark}) as processes:
        processes.start("stubborn", "sh -c 'trap \"\" TERM; sleep 61 & wait; sleep 62'")
        while len(processes_with(mark)) < 2:
            time.sleep(0.01)
    assert_no_process_is_left(mark)


def test_signals_are_noted_and_raised_where_one_asks() -> None:
    """Not between the start of a process and the note of it."""
    with interrupts() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        with pytest.raises(Interrupted) as raised:
            signals.check()
        with pytest.raises(Interrupted):
            signals.sleep(5)
    assert raised.value.status == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


STARTER = """
import sys, time
from pathlib import Path
from demo.interrupts import Interrupted, interrupts
from demo.processes import Processes, assign_free_port

with interrupts() as signals:
    try:
        with Processes(Path(sys.argv[1]), {}, signals.check) as processes:
            processes.valkey(assign_free_port())
            for number in range(20):
                processes.start(f"sleeper-{number}", "sleep 60")
                processes.run(f"step-{number}", "sleep 0.05")
            processes.wait_for("nothing", lambda: False)
    except Interrupted as interrupted:
        sys.exit(interrupted.status)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("after_s", [0.2, 0.35, 0.8])
def test_signal_leaves_no_process_at_any_moment(tmp_path: Path, number: signal.Signals, after_s: float) -> None:
    """The signal goes to the whole process group, as from a terminal, also while processes start."""
    mark = f"mark{uuid.uuid4().hex}"
    command = [sys.executable, "-c", textwrap.dedent(STARTER), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "MARK": mark}, start_new_session=True) as starter:
        while len(processes_with(mark)) < 2:  # the first is up, the others follow
            time.sleep(0.01)
        time.sleep(after_s)
        os.killpg(starter.pid, number)
        assert starter.wait(10) == 128 + number
    assert_no_process_is_left(mark)


@pytest.mark.parametrize("command", ["demo", "up"])
def test_interrupted_command_leaves_no_process(command: str) -> None:
    """The signal is sent as soon as the first processes run."""
    mark = f"mark{uuid.uuid4().hex}"
    payready = [sys.executable, "-m", "cli.main", command]
    with subprocess.Popen(payready, cwd=ROOT, env={**os.environ, "MARK": mark}, start_new_session=True) as running:
        while len(processes_with(mark)) < 4:
            time.sleep(0.02)
            assert running.poll() is None
        os.killpg(running.pid, signal.SIGINT)
        assert running.wait(20) == 128 + signal.SIGINT
    assert_no_process_is_left(mark)


def test_up_prints_addresses_as_json_and_leaves_no_process(tmp_path: Path) -> None:
    """Standard output is one JSON object. SIGTERM ends the command."""
    mark, output = f"mark{uuid.uuid4().hex}", tmp_path / "output"
    payready = [sys.executable, "-m", "cli.main", "up", "--json"]
    environ = {**os.environ, "MARK": mark}
    with output.open("wb") as out, subprocess.Popen(payready, cwd=ROOT, env=environ, stdout=out) as running:
        while not output.read_text().endswith("}\n"):
            time.sleep(0.05)
            assert running.poll() is None
        addresses = json.loads(output.read_text())
        assert responds(addresses["webhook_endpoint"].replace("/webhooks/quiltt", "/readyz"))
        assert responds(addresses["metrics_of_beat"])
        assert responds(f"{addresses['dashboard']}/login")
        running.terminate()
        assert running.wait(20) == 0
    assert_no_process_is_left(mark)
