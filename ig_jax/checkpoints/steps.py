"""Checkpoints of a run, step by step: named items of arrays written by Orbax, with a digest of every array.

workdir/checkpoints/<step>/ holds the items `params`, `optimizer`, one `ema_<decay>` for each EMA and `meta` (JSON:
step, config, data position, and shape, dtype and digest of every array). The directory is enough to sample from it.
Orbax commits a step atomically but restores a flipped bit silently, so every restore compares digests. A damaged step
is reported and the one before it restored; a run that continues from there moves the damaged one to
workdir/checkpoints/damaged/.
"""

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from ig_jax.base.buckets import is_remote
from ig_jax.base.errors import UserError, check, warn_if_failing
from ig_jax.base.files import local_path, remove_folder, run_path
from ig_jax.checkpoints.digests import collect_abandoned, describe, first_line, leaf_names, one_error, one_report
from ig_jax.parallel import processes

Items = Mapping[str, Any]  # trees of arrays (or of their shapes, dtypes and shardings) by name

FORMAT = 1  # of `meta`
_WRITTEN_AT_ONCE = 128_000_000  # bytes, of all arrays that `write_step` has in flight
_COMMITTED = "commit_success.txt"  # Orbax writes it last, in either way of committing
_DAMAGED = "damaged"  # the directory of damaged steps
_TRASH = "trash"  # Orbax deletes file by file; renaming first keeps a half-deleted step out of the list
# How TensorStore and XLA begin errors that are not the files' fault: the same step may be readable tomorrow.
_PASSING = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def find(directory: str | os.PathLike) -> tuple[Path, Path | None]:
    """(checkpoint directory, folder of one step or None for the newest) from a workdir, its checkpoints/, or one step.

    Raises: UserError when there is no such directory.
    """
    path = run_path(directory, "checkpoint")
    check(path.is_dir(), "checkpoint", str(directory), "an existing directory", "give the --workdir of a run")
    if (path / "checkpoints").is_dir():
        return path / "checkpoints", None
    return (path.parent, path) if (path / "meta").is_dir() else (path, None)


def open_newest(
    checkpoint: str | os.PathLike, wanted: Callable[[dict], Items], *, as_readers: bool = False
) -> tuple[dict[str, Any], dict]:
    """(items, meta) of the newest whole step under `checkpoint`, which `find` understands; see `restore_newest`.

    Raises: UserError for a missing, empty or damaged checkpoint.
    """
    directory, only = find(checkpoint)
    with Checkpoints(directory, read_only=True, only=only) as reader:
        found = reader.restore_newest(wanted, as_readers=as_readers)
    if found is None:
        raise nothing_saved(checkpoint)
    return found


def nothing_saved(checkpoint: str | os.PathLike) -> UserError:
    """The error of a directory without a step, for the caller to raise."""
    expected, fix = "a directory that holds a saved step", "give the --workdir of a run"
    return UserError(name="checkpoint", value=str(checkpoint), expected=expected, fix=fix)


def stored_meta(checkpoint: str | os.PathLike) -> dict:
    """The meta of the newest whole step under `checkpoint`, its config among them; no array is read.

    Raises: UserError for a missing, empty or damaged checkpoint.
    """
    return open_newest(checkpoint, lambda meta: {})[1]


def stored_arrays(meta: dict, items: Iterable[str]) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """All arrays of these items of a step, as `open_newest` is asked for them, each on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return {
        item: {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
            for name, (shape, dtype, _) in meta["arrays"][item].items()
        }
        for item in items
    }


@dataclasses.dataclass(frozen=True)
class _Named(ocp.path.step.NameFormat):
    """The folder of one step, whatever its name."""

    path: Path

    def build_name(self, step: int) -> str:
        return self.path.name

    def find_step(self, base_path: Any, step: int) -> ocp.path.step.Metadata:
        return ocp.path.step.Metadata(step=step, path=epath.Path(self.path))

    def find_all(self, base_path: Any) -> Iterator[ocp.path.step.Metadata]:
        yield self.find_step(base_path, self.number())

    def number(self) -> int:
        """The step; where that cannot be read, that of the name."""
        try:
            return int(json.loads((self.path / "meta" / "metadata").read_text())["step"])
        except (OSError, ValueError, LookupError, TypeError):
            return int(self.path.name) if self.path.name.isdigit() else 0


class Damaged(UserError):
    """A committed step whose files differ from what was saved."""


def _unreadable(step: int, error: Exception, what: str = "") -> UserError:
    """Damaged, unless the machine is at fault: then an older step would not help."""
    collect_abandoned(error)
    gone = isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    if isinstance(error, MemoryError) or isinstance(error, OSError) and not gone or str(error).startswith(_PASSING):
        problem = f"checkpoint step {step} could not be read: {what}{first_line(error)}"
        fix = "repair that, or move the step away to continue from the one before"
        return UserError(problem, name=f"checkpoint step {step}", fix=fix)
    return _damaged(step, f"{what}{first_line(error)}")


def _damaged(step: int, what: str) -> Damaged:
    return Damaged(f"checkpoint step {step} is damaged: {what}", name=f"checkpoint step {step}")


class Checkpoints:
    """The checkpoints of a run, or `only` one folder of them; a context manager, which waits for an unfinished save."""

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int | None = None,
        read_only: bool = False,
        only: Path | None = None,
    ):
        self.directory = run_path(directory, "checkpoint")
        self._only = _Named(only) if only else None
        remote = is_remote(self.directory)
        self._read_only = read_only
        self._empty_trash()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            step_name_format=self._only,
            todelete_subdir=None if read_only or remote else _TRASH,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            # Written under another name and renamed when whole: what a kill leaves is never taken for a step. A bucket
            # cannot rename; there the last object makes a step whole.
            atomicity_options=AtomicityOptions(
                mode=AtomicityMode.COMMIT_FILE if remote else AtomicityMode.ATOMIC_RENAME
            ),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._one_report = one_report()
        self._failure: Exception | None = None  # of a save

    def __enter__(self) -> "Checkpoints":
        self._one_report.__enter__()
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            with warn_if_failing(kind):
                self.wait()
        finally:
            # Private: without it the thread that looks for half-written steps outlives the manager, and complains in
            # forty lines where the command ends at once, after its one line.
            with contextlib.suppress(OSError):  # a half-written step that cannot be removed is never read
                self._manager._maybe_await_cleanup_tmp_directory()
            self._manager.close()
            self._empty_trash()
            if self._failure:
                del self._manager  # it holds the failures of other items
                collect_abandoned(self._failure)
            self._one_report.__exit__(None, None, None)

    def _empty_trash(self) -> None:
        if not self._read_only and processes.is_first():
            remove_folder(self.directory / _TRASH)

    def steps(self) -> list[int]:
        """Committed steps, newest first; files, links and empty directories named like one are left out."""
        if self._only:
            return [self._only.number()]
        listed = (step for step in self._manager.all_steps() if self._is_whole(self.directory / str(step)))
        return sorted(listed, reverse=True)

    @staticmethod
    def _is_whole(path: Path) -> bool:
        return (is_remote(path) or not path.is_symlink()) and (path / "meta").is_dir() and (path / _COMMITTED).is_file()

    def _put_aside_after(self, step: int) -> None:
        """Move damaged later steps away: they would block the steps to be saved and be kept in place of older ones."""
        later = [found for found in self._manager.all_steps() if found > step]
        processes.wait_for_all("damaged steps are known")
        for found in later if processes.is_first() else ():
            aside = self.directory / _DAMAGED / f"{found}-{time.strftime('%Y%m%d-%H%M%S')}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            (self.directory / str(found)).rename(aside)
        processes.wait_for_all("damaged steps are away")
        if later:
            self._manager.reload()

    def save(self, step: int, items: Items, meta: dict) -> None:
        """Start writing `items` in the background; `meta` is JSON and gains step and array descriptions.

        Raises: UserError when this or the previous save could not be written.
        """
        meta = _full_meta(step, items, meta)
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        try:
            self._manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saves), force=True)
        except (OSError, ValueError) as error:  # ValueError: how a full disk comes back from the background
            raise self._unwritable(error) from error

    def wait(self) -> None:
        """Block until every started save is committed.  Raises: UserError when one could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> UserError:
        self._failure = error
        what = f"checkpoint directory {str(self.directory)!r} could not be written: {first_line(error)}"
        fix = "committed steps are intact, free space or choose another --workdir"
        return UserError(what, name="checkpoint directory", value=str(self.directory), fix=fix)

    def restore_newest(
        self,
        wanted: Callable[[dict], Items],
        *,
        as_readers: bool = False,
        before_reading: Callable[[dict], None] = lambda meta: None,
    ) -> tuple[dict[str, Any], dict] | None:
        """(items, meta) of the newest whole step; None where nothing was ever saved.

        `wanted(meta)` gives the shapes, dtypes and shardings of the items to read; others are not read.
        as_readers: return for each array of an item {name: array} a function that reads it from the disk; all are
        read and checked once, but are never in memory together.
        before_reading(meta) is called for each step tried, once its shapes and dtypes are known to be those wanted.
        Raises: UserError when steps exist but all are damaged, or when shapes or dtypes differ.
        """
        damage: list[str] = []
        for candidate in self.steps():
            try:
                meta = self._meta(candidate)
                layout = wanted(meta)
                for item, want in layout.items():
                    _check_arrays(item, want, meta["arrays"])
                before_reading(meta)
                items = (self._readers if as_readers else self._restore)(candidate, layout, meta)
            except Damaged as error:
                damage.append(str(error))
                continue
            for line in damage:
                print(f"ig_jax: warning: {line}; taking step {candidate}", file=sys.stderr, flush=True)
            if not self._read_only:
                self._put_aside_after(candidate)
            return items, meta
        # Files of a step that was never committed: nothing was saved whole, but nothing starts afresh either.
        torn = [path.name for path in self.directory.glob("[0-9]*") if _has_files(path)]
        if damage or torn:
            why = damage[0] if damage else f"{', '.join(sorted(torn))} never committed"
            what = f"checkpoint directory {str(self.directory)!r} holds no whole step ({why})"
            fix = "restore a copy or move it away"
            raise UserError(what, name="checkpoint directory", value=str(self.directory), fix=fix)
        return None

    def _meta(self, step: int) -> dict:
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            if (meta["format"], meta["step"]) != (FORMAT, step):
                raise ValueError(f"format {meta['format']} step {meta['step']}, expected {FORMAT} and {step}")
        except Exception as error:  # Orbax raises bare Exception, KeyError or JSONDecodeError for torn files
            raise _unreadable(step, error, "meta: ") from error
        return meta

    def _restore(self, step: int, layout: Items, meta: dict) -> dict[str, Any]:
        if not layout:
            return {}  # Orbax takes an empty request for everything
        try:
            args = {item: ocp.args.StandardRestore(want) for item, want in layout.items()}
            restored = dict(self._manager.restore(step, args=ocp.args.Composite(**args)).items())
        except Exception as error:  # as in _meta
            raise _unreadable(step, error) from error
        for item, tree in restored.items():
            _check_digests(step, item, tree, meta)
        return restored

    def _readers(self, step: int, layout: Items, meta: dict) -> dict[str, dict[str, Callable]]:
        """Functions that read and check one array each; every one has been called once."""
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

        def read(item: str, name: str) -> jax.Array:
            want = {name: layout[item][name]}
            placed = ocp.checkpoint_utils.construct_restore_args(want)
            args = ocp.args.PyTreeRestore(item=want, restore_args=placed, partial_restore=True)
            try:
                tree = reader.restore((self._only.path if self._only else self.directory / str(step)) / item, args=args)
            except Exception as error:  # as in _meta
                raise _unreadable(step, error) from error
            _check_digests(step, item, tree, meta)
            return tree[name]

        readers: dict[str, dict[str, Callable]] = {
            item: {name: partial(read, item, name) for name in want} for item, want in layout.items()
        }
        for call in (call for item in readers.values() for call in item.values()):
            call()
        return readers


def write_step(directory: str | os.PathLike, step: int, items: Mapping[str, dict[str, jax.Array]], meta: dict) -> None:
    """Write one committed step of `items` into the new checkpoint directory `directory`.

    Unlike `save` it keeps no second copy of the arrays: the number of bytes in flight is bounded.
    Raises: UserError when it cannot be written.
    """
    meta = _full_meta(step, items, meta)
    largest = max(leaf.nbytes for item in items.values() for leaf in item.values())
    limit = max(_WRITTEN_AT_ONCE, largest) / 1e9  # Orbax refuses an array that is larger
    handlers = {name: ocp.StandardCheckpointHandler(save_concurrent_gb=limit) for name in items}
    handlers["meta"] = ocp.JsonCheckpointHandler()
    options = ocp.CheckpointManagerOptions(
        enable_async_checkpointing=False, atomicity_options=AtomicityOptions(mode=AtomicityMode.COMMIT_FILE)
    )
    saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}

    def unwritable(why: str) -> UserError:
        what, fix = f"the checkpoint could not be written: {why}", "free space or write elsewhere"
        return UserError(what, name="checkpoint directory", value=str(directory), fix=fix)

    with one_error((OSError, ValueError), unwritable):  # ValueError: how a full disk comes back
        with ocp.CheckpointManager(
            local_path(directory, "checkpoint"), options=options, item_handlers=handlers
        ) as manager:
            manager.save(step, args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **saves))


def _full_meta(step: int, items: Items, meta: dict) -> dict:
    return {"format": FORMAT, "step": step, **meta, "arrays": {name: describe(item) for name, item in items.items()}}


def _check_digests(step: int, item: str, tree, meta: dict) -> None:
    for name, found in describe(tree).items():
        if found != meta["arrays"][item][name]:
            raise _damaged(step, f"{item}/{name} does not match its digest")


def _check_arrays(item: str, want, stored: dict) -> None:
    """Raise UserError naming the first array that differs between the layout asked for and the stored one."""
    fix = "a converted or thinned one can be sampled, and start another run by --config.init.checkpoint"
    check(item in stored, "checkpoint item", item, f"one of {', '.join(stored)}, which it holds", fix)
    wanted = {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaf_names(want).items()}
    for name in sorted(wanted.keys() | stored[item].keys()):
        found, needed = stored[item].get(name, [None, None])[:2], wanted.get(name, [None, None])
        if found != needed:
            (shape, dtype), (stored_shape, stored_dtype) = needed, found
            value = f"{stored_dtype or 'absent'} {stored_shape or ''}".strip()
            expected = f"{dtype or 'none'} {shape or ''}".strip()
            name, fix = f"checkpoint array {item}/{name}", "use the config it was trained with or another --workdir"
            what = f"{name} is {value} but the config needs {expected}"
            raise UserError(what, name=name, value=value, expected=expected, fix=fix)


def _has_files(path: Path) -> bool:
    return path.name.isdigit() and (is_remote(path) or not path.is_symlink()) and any(path.glob("*"))
