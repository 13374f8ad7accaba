"""Several machines: which they are, what is run on them, and what is said of those that cannot take part."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.tiny import settings_without_chance, sum_rows, tiny_model, write_rows

from tuoling import environment
from tuoling.errors import TrainingError, UsageError
from tuoling.train import hosts as hosts_file
from tuoling.train import launch as launching_file
from tuoling.train.asked import Asked, launching
from tuoling.train.ending import first_error
from tuoling.train.hosts import Host, OtherMachines, read_hosts, remote_command, require_reachable, words_for
from tuoling.train.launch import Launch, await_machine_0


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def shell_script(folder: Path, text: str) -> str:
    """A remote shell of this test's own: `sh FILE HOST WORDS`."""
    path = folder / "shell.sh"
    path.write_text(text, encoding="utf-8")
    return f"sh {path}"


HERE = 'shift\nexec sh -c "$*"\n'
"""Every machine is this one; the words go to a shell there, as with ssh."""


def test_a_hostfile(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# ours\ngpu01 slots=4\n\ngpu02   slots=4  # the old one\n")
    assert read_hosts(path) == [Host("gpu01", 4, f"{path}:2"), Host("gpu02", 4, f"{path}:4")]
    assert [host.slots for host in read_hosts(hostfile(tmp_path, "a\nb\n"))] == [1, 1]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a slots=2\nb slots=0\n", 2, "not a machine: b slots=0"),
        ("a slots=2\nb two\n", 2, "not a machine: b two"),
        ("a\n-oProxyCommand=x\n", 2, "not a machine"),
        ("a\na\n", 2, "a is named twice"),
        ("a slots=2\nb\n", 2, "b has 1 slots and a has 2"),
        ("# nobody\n", None, "no machine is named"),
    ],
)
def test_a_hostfile_that_cannot_be(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    path = hostfile(tmp_path, text)
    with pytest.raises(UsageError, match=words) as told:
        read_hosts(path)
    assert told.value.where == (f"{path}:{line}" if line else str(path))


def test_no_hostfile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_hosts(tmp_path / "none.txt")


def test_the_command_line_of_another_machine() -> None:
    launch = Launch(nproc=4, nnodes=2, node_rank=1, master="gpu01")
    given = [
        "train",
        "a b.yaml",
        "--hostfile",
        "h.txt",
        "--remote-shell=rsh",
        "lora_rank=4",
        "--master",
        "x:1",
    ]
    own = ["--nproc", "4", "--nnodes", "2", "--node-rank", "1", "--master", "gpu01:29500"]
    assert words_for(launch, given) == ["train", "a b.yaml", "lora_rank=4", *own]
    command = remote_command("ssh -tt", "gpu02", ["a b"], folder=Path("/rows"), variables={"X": "1"})
    assert command == [
        *("ssh", "-tt", "gpu02", "env", "-C", "/rows", "X=1", sys.executable, "-m", "tuoling", "'a b'")
    ]


def test_what_other_machines_find_in_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    carried = environment.for_other_machines()
    assert carried["NCCL_SOCKET_IFNAME"] == "eth1" and "HF_TOKEN" not in carried


def test_machines_that_do_not_answer_are_all_named(tmp_path: Path) -> None:
    shell = shell_script(
        tmp_path, 'case $1 in good) echo "$(cat version)";; *) echo "no route to $1" >&2; exit 255;; esac\n'
    )
    hosts = [Host(name, 1, f"hosts.txt:{n}") for n, name in enumerate(("good", "lost", "gone"), 2)]
    script = Path(shell.split()[1])
    from importlib import metadata

    (tmp_path / "version").write_text(f"tuoling {metadata.version('tuoling')}")
    script.write_text(script.read_text().replace("cat version", f"cat {tmp_path / 'version'}"))
    with pytest.raises(TrainingError, match="2 of 3 other machines") as told:
        require_reachable(hosts, shell, folder=tmp_path)
    assert "hosts.txt:3: lost: no route to lost" in told.value.problem
    assert "hosts.txt:4: gone: no route to gone" in told.value.problem and "good" not in told.value.problem
    assert f"{shell} lost true" in str(told.value.remedy)
    (tmp_path / "version").write_text("tuoling 0.0.1")
    with pytest.raises(TrainingError, match=r"good: tuoling 0\.0\.1 there"):
        require_reachable(hosts[:1], shell, folder=tmp_path)


@pytest.mark.slow
def test_the_machine_that_failed_first_is_the_one_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts_file, "ENDS_AFTER_ERROR_S", 0.0)
    shell = shell_script(tmp_path, 'if [ $1 = b ]; then echo "disk full"; exit 3; fi; exec sleep 60\n')
    said: list[str] = []
    others = OtherMachines(
        [Host("a", 1, "h:2"), Host("b", 1, "h:3")], shell, folder=tmp_path, say=said.append
    )
    others.start(lambda number: ["train"])
    gate = threading.Event()
    while others.failed_at() is None:
        gate.wait(0.01)
    error = others.error()
    others.end(failed=True)
    assert error.problem == "b ended with exit code 3:\n  disk full" and error.where == "h:3"
    assert said == ["[b] disk full"]
    assert others._started[0][1].poll() is not None, "nothing is left running"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(remote_shell="rsh"), "goes with --hostfile"),
        (Asked(nproc=2, hostfile=Path("h.txt")), "--hostfile says how many"),
        (Asked(nnodes=2, hostfile=Path("h.txt")), "--hostfile says how many"),
    ],
)
def test_options_that_do_not_go_together(asked: Asked, words: str) -> None:
    with pytest.raises(UsageError, match=words), launching(asked, say=print):
        pass


def test_machine_0_has_an_address_nobody_knows() -> None:
    with pytest.raises(TrainingError, match=r"nobody knows the address of nowhere\.invalid"):
        await_machine_0("nowhere.invalid", 29500, timeout_s=60, say=print)


def test_machine_0_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching_file, "SAYS_AFTER_S", -1.0)
    monkeypatch.setattr(launching_file, "RETRY_S", 0.01)
    said: list[str] = []
    with socket.socket() as machine_0:
        machine_0.bind(("127.0.0.1", 0))
        port = machine_0.getsockname()[1]
        with pytest.raises(TrainingError, match="does not listen yet") as told:
            await_machine_0("127.0.0.1", port, timeout_s=0.05, say=said.append)
        assert len(said) == 1 and "waiting for machine 0" in said[0]
        assert told.value.where == f"--master 127.0.0.1:{port}"
        machine_0.listen()
        await_machine_0("127.0.0.1", port, timeout_s=0.05, say=said.append)


def test_the_interface_the_others_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert environment.interface_towards("127.0.0.1", 1) == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    assert environment.interface_towards("127.0.0.1", 1) is None


def test_where_the_processes_meet() -> None:
    assert Launch(nproc=2).meeting_point == ("127.0.0.1", 0)
    assert Launch(nnodes=2, master="a").meeting_point == ("a", 29500)
    assert Launch(nnodes=2, master="a:7").meeting_point == ("a", 7)


def test_a_machine_that_is_gone_is_not_an_error_of_this_one() -> None:
    from tuoling.config import RunConfig

    lost = {
        **{"rank": 0, "at": 1.0, "kind": "RuntimeError", "problem": "Connection closed by peer [10.0.0.2]:1"},
        **{"where": None, "remedy": None, "known": False, "lost": True, "waited": False, "traceback": ""},
    }
    found = first_error([lost], [], {}, RunConfig(output_dir="run"), machines=2)
    assert found.problem == "rank 0 lost the other machines: Connection closed by peer [10.0.0.2]:1"
    assert "tuoling resume RUN" in str(found.remedy) and found.where == "run"


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_of_a_hostfile_train_as_one(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    data = write_rows(tmp_path / "rows.jsonl", sum_rows(16))
    keys = {"max_steps": 4, "batch_size": 4, "per_device_train_batch_size": 2, "timeout_s": 120}
    curves = []
    for name in ("alone", "together"):
        settings = settings_without_chance(tmp_path / name, model, data, keys)
        config = tmp_path / f"{name}.json"
        config.write_text(json.dumps(settings))
        words = ["train", str(config)]
        if name == "together":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            hosts = hostfile(tmp_path, "first slots=1\nsecond slots=1\n")
            words += ["--hostfile", str(hosts), "--remote-shell", shell_script(tmp_path, HERE)]
            words += ["--master", f"127.0.0.1:{port}"]
        done = subprocess.run(
            [sys.executable, "-m", "tuoling", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TUOLING_LANG": "en"},
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()
        curves.append([json.loads(line)["loss"] for line in lines])
    assert "[second]" in done.stderr
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
