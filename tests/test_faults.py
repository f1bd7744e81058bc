"""What a run survives: each fault with the tests that show it."""

import re
from pathlib import Path

from ig_jax.base import cli, errors

TESTS = Path(__file__).parent

# The fault or bad input, and the tests that bring it about; those marked "slow" run with IG_JAX_SLOW=1.
FAULTS = {
    "killed at random moments": "test_resume.py::killed_at_random_moments training/test_chaos.py::random_faults",
    "killed inside a save": "training/test_chaos.py::random_faults checkpoints/test_steps.py::an_uncommitted_step",
    "killed while an old step is deleted": "checkpoints/test_steps.py::only_the_newest_steps_are_kept",
    "SIGTERM, once and again": "test_resume.py::asked_to_stop test_bad_input.py::asked_to_stop",
    "a signal to one of two processes": "training/test_hosts.py::a_signal_to_one",
    "a signal before the first step": "training/test_hosts.py::before_the_first_step",
    "one of two processes killed": "training/test_hosts.py::a_killed_process",
    "an exception in one process": "training/test_hosts.py::an_exception_in_one",
    "one process hangs, holds Python's lock, or is frozen": "training/test_hosts.py::a_process_that_hangs "
    "training/test_hosts.py::a_frozen",
    "a process that never comes": "training/test_hosts.py::before_the_first_step parallel/test_processes.py::a_part_of",
    "one process skips a save": "training/test_hosts.py::a_process_that_hangs",
    "a full disk": "checkpoints/test_steps.py::a_save_that_cannot test_bad_input.py::a_full_disk "
    "data/test_shards.py::a_full_disk",
    "files of a step cut short, emptied, flipped, deleted": "checkpoints/test_steps.py::a_damaged_array_file "
    "checkpoints/test_steps.py::a_value_that_is_not checkpoints/test_steps.py::a_torn_meta",
    "junk among the steps": "checkpoints/test_steps.py::junk",
    "every step damaged": "checkpoints/test_steps.py::when_every_step",
    "another number of devices or processes": "checkpoints/test_steps.py::on_another_mesh "
    "training/test_hosts.py::one_process_goes_on training/test_step.py::eight_devices",
    "a config of another network or dtype": "checkpoints/test_steps.py::another_network "
    "checkpoints/test_steps.py::another_dtype test_resume.py::cannot_go_on",
    "other data, or another order": "data/test_pipeline.py::differing_fingerprint test_resume.py::other_data",
    "NaN once, and in a row": "training/test_guard.py::a_bad_step training/test_guard.py::too_many",
    "a leap of the loss": "training/test_guard.py::a_leap training/test_guard.py::a_new_level",
    "an exception after a save": "checkpoints/test_steps.py::an_exception_after_a_save",
    "two launches in one work directory": "test_resume.py::a_second_launch",
    "malformed configs and flags": "test_bad_input.py::a_bad_config test_bad_input.py::bad_train_flags",
    "hostile weight files": "weightfiles/test_files.py::hostile weightfiles/test_files.py::flipped",
    "damaged data": "data/test_shards.py::damage data/test_pipeline.py::a_failed_read",
    "secrets in the environment": "test_resume.py::says_what_it_does",
    "event files that cannot be written": "test_resume.py::tensorboard_on_a_full_disk",
    "a damaged cache of compilations": "training/test_chaos.py::random_faults",
}


def test_every_fault_has_its_test():
    for name in " ".join(FAULTS.values()).split():
        file, words = name.split("::")
        assert re.search(rf"^def test_\w*{words}", (TESTS / file).read_text(), re.M), name


def test_every_end_of_a_command_has_its_exit_code():
    ends = {
        errors.UserError("x"): 2,
        errors.Diverged("x"): 3,
        errors.Preempted("x"): 75,
        KeyboardInterrupt(): 75,
        RuntimeError("x"): 1,
    }
    assert {end: cli.verdict(end)[1] for end in ends} == ends
    assert errors.PEER_FAILED == 70  # from the watch over the other processes
