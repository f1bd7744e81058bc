"""Compiled programs kept on disk, for every run on this machine, or in this bucket."""

import contextlib
import os
from pathlib import Path

from ig_jax.base.buckets import is_remote
from ig_jax.base.files import cache_folder, run_path

LARGEST = 4_000_000_000  # bytes; the train step of an XL network takes some tens of millions


def keep_compilations(workdir: str) -> None:
    """Cache compilations in $IG_JAX_CACHE, or beside a work directory in a bucket, which outlives its machines.

    JAX_COMPILATION_CACHE_DIR names another place, which is left as it is.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    path = run_path(workdir, "workdir")
    folder = (path.parent if is_remote(path) else cache_folder()) / "compilations"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # The digests of a restored state alone are dozens of programs below JAX's threshold of one second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # Their paths would be part of the key of every program: a folder that was moved would hold none.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    if not is_remote(path):
        trim(folder, LARGEST)


def trim(folder: Path, largest: int) -> None:
    """Remove the programs that were not used for longest, until at most so many bytes are left.

    JAX's own bound, jax_compilation_cache_max_size, locks the folder around every read and gives up after ten seconds,
    which the processes of a large machine exceed together.
    """
    total = 0
    with contextlib.suppress(OSError):  # another process trims too; a folder that cannot be read is JAX's to report
        found = [(file, file.stat()) for file in folder.glob("*-cache")]
        for file, stat in sorted(found, key=lambda pair: -max(pair[1].st_atime, pair[1].st_mtime)):
            total += stat.st_size
            if total > largest:
                file.unlink(missing_ok=True)
