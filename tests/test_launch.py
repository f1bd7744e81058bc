"""The scripts that start machines: what they print, and what they do when machines fail, played by small scripts."""

import os
import re
import subprocess
import tomllib

import pytest
import toy
import yaml

LAUNCH = toy.ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch", toy.ROOT / ".ci" / "run"])
COMMAND = ["python", "-m", "ig_jax.train", "--config=configs/sit_imagenet256.py:XL", "--workdir=gs://bucket/run"]


def shellcheck(*arguments, **options):
    return subprocess.run([toy.ROOT / ".venv/bin/shellcheck", *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    found = shellcheck(script)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_has_nothing_to_say_of_skypilot(part):
    found = shellcheck("--shell=bash", "-", input=skypilot()[part])
    assert found.returncode == 0, found.stdout


@pytest.fixture
def machine(tmp_path):
    """A folder of commands that shadow the real ones, and a call of a script that sees them: (code, output, log)."""

    class Machine:
        folder = tmp_path
        log = tmp_path / "log"

        def has(self, name: str, script: str) -> None:
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(f'#!/usr/bin/env bash\ncd {tmp_path}\necho "{name} $*" | head -1 >> log\n{script}\n')
            path.chmod(0o755)

        def call(self, *command, **variables):
            self.log.write_text("")
            environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "POLL": "0"} | variables
            ran = subprocess.run(
                ["bash", *map(str, command)], capture_output=True, text=True, env=environment, timeout=60
            )
            return ran.returncode, ran.stdout + ran.stderr, self.log.read_text()

    for name in ("gcloud", "kubectl", "docker", "xpk", "srun", "scontrol"):
        Machine().has(name, "exit 9")
    return Machine()


CREATES = {
    "v5e:4x4": ["queued-resources create run --node-id=run", "--accelerator-type=v5litepod-16", "--spot"],
    "v5e:4x4 --api=tpu-vm": ["tpus tpu-vm create run", "--version=v2-alpha-tpuv5-lite"],
    "v6e:4x8": [
        "workload-policy run",
        "--accelerator-topology=4x8",
        "--machine-type=ct6e-standard-4t",
        "--target-size-policy-mode=bulk",
        "--workload-policy=projects/PROJECT/regions/us-west4/resourcePolicies/run",
        "resize run --project=PROJECT --zone=us-west4-a --size=8",
        "gcloud compute ssh run-7",
    ],
    "v5p:2x2x4 --api=queued": ["--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5 "],
}


@pytest.mark.parametrize("options", CREATES)
def test_a_dry_run_on_tpus_prints_every_command_and_runs_none(machine, options):
    code, output, log = machine.call(
        LAUNCH / "tpu.sh", "run", "run", "--dry-run", *f"--type={options}".split(), "--", *COMMAND
    )
    assert code == 0 and log == "", output
    for part in [*CREATES[options], "git archive", "launch/setup.sh gcs", "systemd-run", COMMAND[3], "delete run"]:
        assert part in output, part


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly", "run"],
        ["run", "run"],
        ["create", "run", "--type=v4:2x2x2"],
        ["create", "run", "--type=v5e:4x4", "--api=mig"],
    ]
    + [["create", "Run"], ["create", "run", "--price=1"], ["create", "run", "--type=tpu7x:2x2x2", "--api=queued"]],
)
def test_a_mistake_in_the_flags_of_tpu_sh_is_one_line(machine, arguments):
    code, output, log = machine.call(LAUNCH / "tpu.sh", *arguments)
    assert code == 2 and log == "" and output.startswith("tpu.sh: error:") and output.count("\n") == 1


# Answers of gcloud come from files, a line for each question; the last line stays. The units run on four hosts.
GCLOUD = """
answer() { head -n1 $1; [ "$(wc -l < $1)" -eq 1 ] || sed -i 1d $1; }
case "$*" in
  *"queued-resources list"*) answer slice ;;
  *"ssh"*"ig_jax-is"*)
    said=$(answer unit)
    [ "$said" = silent ] || for host in 1 2 3 4; do echo "ig_jax-is $said"; done ;;
  *"storage ls"*) echo "gs://bucket/run/checkpoints/$(answer step)/" ;;
esac
"""


def tpu_run(machine, slices, units, steps=("1",)):
    """`tpu.sh run` on slices and units that answer so, one after another."""
    for name, answers in {"slice": slices, "unit": units, "step": steps}.items():
        (machine.folder / name).write_text("".join(f"{answer}\n" for answer in answers))
    machine.has("gcloud", GCLOUD)
    code, output, log = machine.call(LAUNCH / "tpu.sh", "run", "run", "--project=p", "--", *COMMAND)
    did = re.findall(r"queued-resources (create|delete)|command=(\[) ", log)
    return code, [first or "start" for first, _ in did], output


def test_a_preempted_run_starts_again_on_the_same_slice(machine):
    units = ["dead success 0", "running success 0", "failed exit-code 75", "dead success 0", "exited success 0"]
    code, did, _ = tpu_run(machine, ["ACTIVE"], units)
    assert code == 0 and did == ["start", "start"]


def test_a_lost_slice_is_deleted_and_made_again(machine):
    slices = ["", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "DELETING", "", "ACTIVE"]
    units = ["dead success 0", "silent", "dead success 0", "exited success 0"]
    code, did, _ = tpu_run(machine, slices, units)
    assert code == 0 and did == ["create", "start", "delete", "create", "start"]


def test_hosts_that_do_not_answer_are_no_reason_to_delete_them(machine):
    code, did, output = tpu_run(machine, ["ACTIVE"], ["running success 0", "silent", "silent", "exited success 0"])
    assert code == 0 and did == [] and output.count("not every host answers") == 2


@pytest.mark.parametrize("unit,expected", {"failed exit-code 2": 2, "failed exit-code 3": 3}.items())
def test_what_another_start_would_not_mend_ends_the_script(machine, unit, expected):
    code, did, _ = tpu_run(machine, ["ACTIVE"], ["dead success 0", unit])
    assert code == expected and did == ["start"]


def test_two_starts_without_a_step_end_the_script(machine):
    units = [
        "dead success 0",
        "failed signal 9",
        "dead success 0",
        "failed exit-code 75",
        "dead success 0",
        "failed signal 6",
    ]
    code, did, output = tpu_run(machine, ["ACTIVE"], units, steps=["20", "40", "40"])
    assert code == 4 and did == ["start"] * 3 and "ended at 40" in output


def slurm(machine, code: int, *, progress: bool, workdir: str = "run"):
    """One start of the batch script, whose tasks end with `code`, after a new step or not."""
    saves = "mkdir -p run/checkpoints/$(($(ls run/checkpoints 2>/dev/null | wc -l) + 1))" if progress else ""
    machine.has("srun", f"{saves}\nexit {code}")
    machine.has("scontrol", "")
    settings = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(machine.folder)}
    ended, output, log = machine.call(LAUNCH / "slurm.sbatch", "--config=c.py", f"--workdir={workdir}", **settings)
    return ended, "scontrol requeue 7" in log, output


@pytest.mark.parametrize("code,again", {75: True, 70: True, 137: True, 0: False, 2: False, 3: False, 1: False}.items())
def test_slurm_queues_again_what_goes_on(machine, code, again):
    ended, requeued, output = slurm(machine, code, progress=True)
    assert requeued == again, output
    assert again or ended == code


def test_slurm_stops_when_two_starts_resume_from_one_step(machine):
    assert slurm(machine, 75, progress=True)[1]
    assert slurm(machine, 75, progress=False)[1]
    assert slurm(machine, 75, progress=True)[1]  # which forgives the start before it
    assert slurm(machine, 75, progress=False)[1]
    ended, requeued, output = slurm(machine, 75, progress=False)
    assert ended == 4 and not requeued and "two starts" in output


def test_slurm_outlives_a_signal_to_its_shell(machine):
    machine.has("srun", "kill -TERM $PPID; sleep 0.3; exit 75")
    machine.has("scontrol", "")
    _, output, log = machine.call(LAUNCH / "slurm.sbatch", "--workdir=gs://bucket/run", SLURM_JOB_ID="7")
    assert "exit code 75" in output and "scontrol requeue" in log


def test_slurm_in_a_dry_run_prints_both_commands(machine):
    code, output, log = machine.call(LAUNCH / "slurm.sbatch", "--dry-run", "--config=c.py", "--workdir=run")
    assert code == 0 and log == ""
    assert re.findall(r"^\+ (\w+)", output, re.M) == ["srun", "scontrol"]


def test_the_jobset_restarts_on_what_goes_on_and_ends_on_what_does_not(machine):
    code, output, log = machine.call(
        LAUNCH / "gke.sh", "submit", "run", "--image=i", "--type=v5e:4x8", "--dry-run", "--", *COMMAND
    )
    assert code == 0 and log == "" and "+ kubectl apply" in output
    spec = yaml.safe_load(output[: output.index("+ kubectl")])["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [1, 2, 3]}
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    assert spec["failurePolicy"]["maxRestarts"] > 0 and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert job["parallelism"] == job["completions"] == 8 and container["resources"]["limits"]["google.com/tpu"] == 4
    assert container["command"] == COMMAND and pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"


def test_xpk_restarts_on_a_saved_stop_and_a_lost_peer(machine):
    arguments = ["run", "--image=i", "--cluster=c", "--dry-run", "--", *COMMAND]
    code, output, log = machine.call(LAUNCH / "gke.sh", "xpk", *arguments)
    assert code == 0 and log == ""
    assert "--restart-on-exit-codes=70\\,75" in output and "--tpu-type=v5litepod-16" in output


def skypilot() -> dict:
    return yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_goes_on_after_a_saved_stop_and_a_lost_peer_alone():
    task = skypilot()
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [70, 75] and recovery["max_restarts_on_errors"] == 0
    assert set(re.findall(r"\$([A-Z]+)\b", task["run"])) == set(task["envs"])


def test_the_image_copies_what_exists_and_takes_extras_that_exist():
    text = (LAUNCH / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (.*) \S+$", text, re.M):
        assert all((toy.ROOT / source).exists() for source in sources.split())
    extras = tomllib.loads((toy.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [*re.findall(r"EXTRAS=(\S+)", text), *re.findall(r"setup\.sh (.+)", skypilot()["setup"])]
    assert set(re.split(r"[ ,]", " ".join(named))) <= set(extras)


def test_setup_takes_a_python_of_uv_where_the_system_has_an_old_one(machine):
    """With all interpreters of the system too old; the copy of setup.sh installs into a folder of the test."""
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        machine.has(name, "exit 1")
    machine.has("uv", f'[ "$2" = install ] || echo {machine.folder}/uv_python')
    (machine.folder / "uv_python").write_text(
        "#!/usr/bin/env bash\nmkdir -p .venv/bin\n[ -e .venv/bin/python ] || cp $0 .venv/bin/python\n"
    )
    (machine.folder / "uv_python").chmod(0o755)
    (machine.folder / "launch").mkdir()
    (machine.folder / "launch" / "setup.sh").write_text((LAUNCH / "setup.sh").read_text())
    (machine.folder / "pyproject.toml").write_text("")
    code, output, log = machine.call(machine.folder / "launch" / "setup.sh")
    assert code == 0, output
    assert "uv python install --quiet 3.12" in log and (machine.folder / ".venv/bin/python").exists()
