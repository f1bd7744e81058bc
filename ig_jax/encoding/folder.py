"""A folder of shards while it is being written: which shards it has, and the plan that they follow."""

import json
from pathlib import Path

import jax
import numpy as np

from ig_jax.base.errors import UserError, check, one_line
from ig_jax.base.files import free_bytes, remove_leftovers, user_path, write_text, writing
from ig_jax.data.shards import CARD, shard_file
from ig_jax.parallel import processes

PLAN = "plan.json"  # everything that decides the bytes of the shards
RESERVE = 2**20  # bytes for the card and what TFDS wants next to the shards


class Folder:
    """Where `count` images of a source go, a fixed number of them in each shard."""

    def __init__(self, path: str | Path, split: str, count: int, shard_size: int):
        self.path = user_path(path, "--out")
        self._count, self._size = count, shard_size
        shards = -(-count // shard_size)
        self.files = [self.path / shard_file(split, index, shards) for index in range(shards)]

    def rows(self, shard: int) -> range:
        """The rows of the source whose images belong to a shard."""
        return range(shard * self._size, min((shard + 1) * self._size, self._count))

    def prepare(self, plan: dict) -> None:
        """Make the folder and write its plan; what a killed run left half written is removed.

        Raises: UserError when it holds something else, or cannot be written.
        """
        check(not self.path.exists() or self.path.is_dir(), "--out", str(self.path), "a directory, not a file")
        stored = self._plan()
        different = next((name for name in plan if stored is not None and stored.get(name) != plan[name]), None)
        if stored is not None and different is not None:
            raise UserError(
                f"--out={str(self.path)!r} holds shards of another {different} ({stored.get(different)}, not "
                f"{plan[different]})",
                name="--out",
                value=str(self.path),
                expected=f"shards of the same {different}",
                fix="choose another --out",
            )
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
        if stored is None:
            write_text(self.path / PLAN, json.dumps(plan, indent=1))

    def begin(self, plan: dict, record: int) -> None:
        """Prepare the folder for records of `record` bytes, in the first process, while the others wait.

        Raises: UserError as `prepare` and `check_space`.
        """
        if processes.is_first():
            self.prepare(plan)
            self.check_space(record)
        processes.wait_for_all("the folder is there")

    def own(self) -> list[int]:
        """The missing shards that this process writes: every one of some process."""
        missing = np.flatnonzero(processes.from_first(self.missing()))
        return missing[jax.process_index() :: jax.process_count()].tolist()

    def is_complete(self) -> bool:
        """Whether the card, which is written last, is there with all the shards."""
        return (self.path / CARD).exists() and not self.missing().any()

    def missing(self) -> np.ndarray:
        """bool (shards,): those that are not there yet."""
        return np.asarray([not file.exists() for file in self.files])

    def check_space(self, record: int) -> None:
        """Raise UserError unless the missing records, of `record` bytes each, fit on the disk."""
        images = sum(len(self.rows(shard)) for shard in np.flatnonzero(self.missing()).tolist())
        needed = images * record + RESERVE
        free = free_bytes(self.path)
        if needed > free:
            sizes = f"{needed / 1e9:,.1f} GB of shards do not fit into the {free / 1e9:,.1f} GB free there"
            fix = "make space, or name another disk"
            raise UserError(f"--out={str(self.path)!r}: {sizes}", name="--out", value=str(self.path), fix=fix)

    def _plan(self) -> dict | None:
        """The stored plan, None for a new folder.  Raises: UserError when it cannot be read, or shards lack it."""
        try:
            return json.loads((self.path / PLAN).read_text())
        except FileNotFoundError:
            lone = next(iter([*self.path.glob("*.array_record-*"), *self.path.glob(CARD)]), None)
            check(lone is None, "--out", str(self.path), f"a folder whose shards have a {PLAN}", "choose another --out")
            return None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path / PLAN} cannot be read ({one_line(error)})",
                name=str(self.path / PLAN),
                fix="choose another --out",
            ) from error
